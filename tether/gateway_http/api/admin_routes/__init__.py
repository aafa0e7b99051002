"""Routes for administrators: keys, tenants, sessions, audit log, chunk store."""

"""Routes for operators: keys, tenants, sessions, audit, the chunk store."""

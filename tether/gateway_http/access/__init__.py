"""Who may ask, and how much: keys, sessions, tenants, rate limits."""

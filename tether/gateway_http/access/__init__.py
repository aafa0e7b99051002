"""Access control: API keys, sessions, tenants, rate limits."""

"""Which jobs run next, together, and how many to ask for. Pure."""

"""The NATS server: its configuration, its permissions, and the embedded one that ``tether up`` starts."""

"""The NATS server: its configuration, its permissions, and the embedded one of ``tether up``."""

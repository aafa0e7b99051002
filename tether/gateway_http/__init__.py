"""The gateway: turns HTTP requests into jobs."""

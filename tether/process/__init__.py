"""What every process of the platform has: logs, metrics, clock, data directory, shutdown."""

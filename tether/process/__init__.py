"""Shared by every process of the platform: logs, metrics, clock, data directory, shutdown."""

"""Durable jobs: submitted, queued, listed, cancelled."""

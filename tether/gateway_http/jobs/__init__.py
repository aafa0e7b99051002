"""Durable jobs: submission, queueing, listing, cancellation."""

"""Durable jobs in the dispatcher: lost jobs are failed, finished ones deleted."""

"""Selects the jobs of the next run and the number of messages to pull. Pure."""

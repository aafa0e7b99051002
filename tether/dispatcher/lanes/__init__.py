"""Lanes and streams that the dispatcher creates, checks and removes."""

"""Waiting requests on their way to lanes, many in one message."""

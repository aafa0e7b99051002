"""Reads and runs a pushed model in a confined process before it becomes a version."""

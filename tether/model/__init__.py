"""Decisions about a model: configuration, version policy, ownership, metadata. Pure."""

"""What is decided about a model: configuration, version policy, ownership, metadata. Pure."""

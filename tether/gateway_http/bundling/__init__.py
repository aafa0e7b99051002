"""Bundling of synchronous requests: many jobs of one lane in one message."""

"""Formats between processes: msgpack, JSON tensors, NATS subjects."""

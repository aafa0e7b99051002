"""Connects to NATS and JetStream; the only importer of nats."""

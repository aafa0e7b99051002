"""The NATS form of the ports, and the only importer of nats."""

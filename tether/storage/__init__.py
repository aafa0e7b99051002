"""Model files as chunks in the JetStream object store."""

"""Removal of unreferenced chunks, key rotation, partitions."""

"""Entries that the model store writes into the broker's buckets."""

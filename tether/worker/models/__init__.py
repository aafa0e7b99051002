"""Instances of models in a worker's memory: loaded, replaced, unloaded."""

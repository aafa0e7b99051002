"""Models in a worker's memory: loaded, replaced, unloaded."""

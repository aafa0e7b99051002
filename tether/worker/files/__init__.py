"""Files of model versions on a worker's disk."""

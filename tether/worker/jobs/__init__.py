"""Jobs in a worker: pulled, verified, run, answered."""

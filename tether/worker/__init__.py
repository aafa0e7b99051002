"""The worker daemon: pulls bundles from lanes, batches their jobs, runs models, delivers outcomes."""

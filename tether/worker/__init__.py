"""The worker daemon: pulls bundles from lanes, joins them into batches, runs the model, answers."""

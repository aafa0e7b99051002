"""Features that a model's configuration adds to its requests: cache, coalescing, shadow traffic."""

"""What a model's configuration adds to a request: cache, coalescing, shadow traffic."""

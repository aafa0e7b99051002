"""Routes for callers and owners of models."""

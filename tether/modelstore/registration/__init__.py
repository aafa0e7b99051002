"""From a push to a version, and changes of models."""

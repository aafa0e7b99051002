"""Makes versions of pushes, and changes models."""

"""The control plane: tracks workers, assigns versions, creates lanes. Off the data path."""

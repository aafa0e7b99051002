"""A pushed model is read and tried in a confined process before it becomes a version."""

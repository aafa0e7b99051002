"""Request bodies that are read outside the event loop."""

"""Bodies of requests that are read outside of the event loop."""

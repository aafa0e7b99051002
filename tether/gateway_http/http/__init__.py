"""HTTP itself: the server's interface, requests, errors, timeouts."""

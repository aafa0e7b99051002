"""HTTP: the server interface, requests, errors, timeouts."""

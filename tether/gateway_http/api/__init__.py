"""The HTTP interface: routes, schemas, and the handling of a request."""

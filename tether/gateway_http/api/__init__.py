"""The HTTP interface: routes, schemas, and the way of a request through them."""

"""The Python client: ``Client`` blocks, ``AsyncClient`` does not."""

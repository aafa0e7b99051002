"""Pushes of models: recognizes formats, cuts files into chunks and uploads them."""

"""The front door: HTTP in, jobs out."""

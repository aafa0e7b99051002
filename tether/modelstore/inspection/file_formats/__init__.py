"""Inspection by file format. Each module is the program of a confined process."""

"""Runs of a version: takes jobs, returns their outcomes."""

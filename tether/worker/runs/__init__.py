"""Runs of a version: jobs in, outcomes out."""

"""Runs and checks a platform on one machine: ``tether up``, ``status``, ``doctor``."""

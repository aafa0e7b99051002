"""What runs and watches a platform on one machine: ``tether up``, ``status``, ``doctor``."""

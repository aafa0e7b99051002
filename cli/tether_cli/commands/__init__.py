"""Commands of ``tether``, one file per group."""

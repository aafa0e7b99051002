"""The commands of ``tether``, one file a group."""

"""The command line of Tether."""

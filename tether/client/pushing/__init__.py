"""What a push does before and while files are sent."""

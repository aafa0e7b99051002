"""Models as a gateway sees them: versions, aliases, files, ready workers."""

"""Models as a gateway knows them: versions, aliases, files, workers that are ready."""

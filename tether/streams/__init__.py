"""JetStream streams: lanes of jobs, results, their consumers and limits."""

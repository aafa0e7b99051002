"""Model frameworks, for the model store and the workers: runtimes, and facts read from model files alone."""

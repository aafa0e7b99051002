"""What is known of models from their files alone, without loading a framework; for the model store and the workers."""

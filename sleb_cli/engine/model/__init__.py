"""What the model is: where it comes from, its config, its blocks and their sizes; no weight is read."""

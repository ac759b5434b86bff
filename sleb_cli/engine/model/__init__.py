"""What the model is: its source, config, blocks and sizes. No weights are read."""

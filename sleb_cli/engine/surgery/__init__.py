"""The model after its cuts: its tensors and settings, and the model in memory."""

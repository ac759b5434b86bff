"""The model without blocks: which tensors and settings remain, and the model that they make in memory."""

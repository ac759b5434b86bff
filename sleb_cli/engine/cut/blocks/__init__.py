"""The cut of blocks, of a checkpoint and of a GGUF file."""

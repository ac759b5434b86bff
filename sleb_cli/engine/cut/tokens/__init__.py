"""The cut of the tokens of other scripts, of a checkpoint and of a GGUF file."""

"""GGUF files: reading and writing them, what a removal of blocks changes in them, and what llama.cpp makes of it."""

"""GGUF files: read and write them, remove blocks from them, and know how llama.cpp loads the result."""

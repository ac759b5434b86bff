"""GGUF files: read and write them, and know how llama.cpp loads them."""

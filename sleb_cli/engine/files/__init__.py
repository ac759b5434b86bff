"""What is on disk: weight files, their tensors and bytes, and the cache."""

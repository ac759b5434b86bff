"""The cut of experts of a mixture-of-experts model: of each block, the same number."""

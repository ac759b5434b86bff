"""What a removal costs and gains: perplexity and tasks, speed and memory, a sample of what the model says."""

"""Where texts come from: files, data sets, and what the model writes. No torch is imported."""

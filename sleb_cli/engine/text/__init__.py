"""What is read, and which of its tokens count: texts, windows, conversations, calibration."""

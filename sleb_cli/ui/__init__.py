"""What the user sees: progress on stderr, results on stdout."""

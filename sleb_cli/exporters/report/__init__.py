"""A report that a person can look at."""

"""Resolve the request of each command against its model: what is asked for becomes a few values."""

"""The door of each command: it turns a request into a few values, and compares options."""

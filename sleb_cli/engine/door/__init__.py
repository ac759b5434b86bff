"""The second leaf of the door of each command: it looks at the model, and turns a request into a few values."""

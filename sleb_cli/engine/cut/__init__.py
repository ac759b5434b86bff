"""What a removal does to a model: one protocol, and a room for each kind of part."""

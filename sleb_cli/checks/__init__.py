"""The first leaf of the door: what can be checked without the model or torch."""

"""The first leaf of the door: requests are checked and completed as far as that goes without the
model, or torch.
"""

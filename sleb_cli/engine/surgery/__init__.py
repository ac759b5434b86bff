"""The model after its cuts: which tensors and settings remain, and the model that they make in
memory.
"""

"""Other formats that a model's folder may hold the same weights in; they are neither downloaded nor copied."""

import re

SUFFIXES = ("ckpt", "gguf", "h5", "msgpack", "nemo", "onnx", "onnx_data", "ot", "pt", "pth", "tflite")
"""Suffixes of weight files."""

_WEIGHTS = re.compile(rf".*\.(safetensors|bin|{'|'.join(SUFFIXES)})|.*\.index\.json", re.IGNORECASE)

FOLDERS = ("coreml", "gguf", "metal", "onnx", "openvino", "original")
"""Folders with a copy of the model for other programs, including settings that count all its blocks."""


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, in any format, or is an index of such files."""
    return _WEIGHTS.fullmatch(name) is not None

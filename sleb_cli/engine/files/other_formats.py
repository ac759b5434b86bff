"""Formats in which a model's folder may hold the weights again; they are neither downloaded nor
copied.
"""

import re

SUFFIXES = (
    "ckpt",
    "gguf",
    "h5",
    "msgpack",
    "nemo",
    "onnx",
    "onnx_data",
    "ot",
    "pt",
    "pth",
    "tflite",
)
"""Suffixes of weight files."""

WEIGHTS = re.compile(rf".*\.(safetensors|bin|{'|'.join(SUFFIXES)})|.*\.index\.json", re.IGNORECASE)
"""The names of files of weights, in any format, and of indices of such files."""

FOLDERS = ("coreml", "gguf", "metal", "onnx", "openvino", "original")
"""Folders with a copy of the model for other programs, including settings that count all its
blocks.
"""

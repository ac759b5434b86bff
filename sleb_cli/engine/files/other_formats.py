"""Other formats of the weights in a model's folder, which are not downloaded or copied."""

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

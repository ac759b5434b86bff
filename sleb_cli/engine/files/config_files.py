"""The files with settings in a model's folder, and the values in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CONFIG = "config.json"

QUANTIZATION_SETTINGS = (
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"
)  # fmt: skip
SETTINGS = (
    *QUANTIZATION_SETTINGS,
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
)
"""Files with settings besides `config.json`, which may name parts of the model, or local folders.
"""


def map_values(settings: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return settings with each value changed, by its key, also in nested settings and lists of
    them.
    """

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return map_values(value, change)
        # A list of plain values, such as numbers of tokens, is one value of its key.
        if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            return [changed(key, item) for item in value]
        return change(key, value)

    return {key: changed(key, value) for key, value in settings.items()}

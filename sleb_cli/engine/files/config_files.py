"""The files with settings in a model's folder, and the values in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sleb_cli.engine.files.copying import reading
from sleb_plugins import ModelError

CONFIG = "config.json"

QUANTIZATION_SETTINGS = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
)
SETTINGS = (
    *QUANTIZATION_SETTINGS,
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
)
"""Files with settings besides `config.json`, which may name parts of the model or folders."""

MAX_JSON_BYTES = 100_000_000
"""The limit of safetensors for a header. No other JSON of a checkpoint comes near it."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint."""
    value: dict[str, Any] = _read(path, dict, "a JSON object")
    return value


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON list of a checkpoint."""
    value: list[Any] = _read(path, list, "a JSON list")
    return value


def _read(path: Path, kind: type, what: str) -> Any:
    hint = "Copy or download the model again."
    with reading(path), path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ModelError(f"{path} is not readable JSON.", hint=hint) from error
    if not isinstance(value, kind):
        raise ModelError(f"{path} is not {what}.", hint=hint)
    return value


def parse_json(text: bytes) -> Any:
    """Parse JSON; whatever is wrong with it is a ValueError."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError("too long")
    try:
        return json.loads(text.decode("utf-8"))
    except (RecursionError, MemoryError) as error:
        raise ValueError("too deep or too long") from error


def map_values(settings: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return settings with each value changed by its key, also in nested settings and lists."""
    return {key: _map_value(key, value, change) for key, value in settings.items()}


def _map_value(key: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return map_values(value, change)
    # A list of plain values, such as numbers of tokens, is one value of its key.
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [_map_value(key, item, change) for item in value]
    return change(key, value)

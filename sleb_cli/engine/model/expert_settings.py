"""Settings of a config that count experts: find them, change them, and build such a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sleb_cli.engine.model.architecture import Architecture

ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
"""Config keys of the number of experts that a token uses."""

Key = tuple[str, ...]
"""The keys that lead to a setting in a config, which may be nested."""


def integer_settings(config: Mapping[str, Any]) -> dict[Key, int]:
    """Return each whole number in a config by its key."""
    numbers: dict[Key, int] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            for inner, number in integer_settings(value).items():
                numbers[str(name), *inner] = number
        elif type(value) is int:
            numbers[(str(name),)] = value
    return numbers


def with_setting(
    architecture: Architecture, raw: Mapping[str, Any], key: Key, value: int
) -> dict[str, Any]:
    """Return a config with this value of a setting of the language model.

    The setting changes under each name that the file gives it.
    """
    *path, name = key
    text_key = architecture.text_key_in(raw)
    if text_key:
        path.insert(0, text_key)
    changed = dict(raw)
    settings = changed
    for step in path:
        settings[step] = dict(settings.get(step) or {})
        settings = settings[step]
    aliases = type(architecture.text_config).attribute_map
    names = []
    for existing in settings:
        if existing == name or aliases.get(existing) == name or aliases.get(name) == existing:
            names.append(existing)
    for setting in names or [name]:
        settings[setting] = value
    return changed


def build_with_setting(architecture: Architecture, key: Key, value: int) -> nn.Module:
    """Build the model without weights, with this value of a setting."""
    raw = dict(architecture.source.raw_config)
    raw.pop("quantization_config", None)
    return architecture.build(architecture.read_config(with_setting(architecture, raw, key, value)))

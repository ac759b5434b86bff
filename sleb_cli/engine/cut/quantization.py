"""Renumber the names of modules in the settings of a quantized checkpoint, and drop those that go.

The packed tensors are copied like any others. But every format lists elsewhere which modules were
quantized in which way: `ignore`, `modules_to_not_convert`, `config_groups.*.targets`, GPTQ's
`dynamic`, a dictionary by module. So every string is checked. A name is renumbered like a tensor's.
A pattern (a regex or a glob) stays if it means all blocks alike, and is refused if it has numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sleb_cli.engine.files.config_files import CONFIG, QUANTIZATION_SETTINGS
from sleb_cli.engine.model.architecture import Architecture
from sleb_plugins import UnsupportedModelError

_KEYS = {"quantization_config", "compression_config"}
_NAME = re.compile(r"[\w.-]*")
# Before a regex: "re:" in compressed-tensors; in GPTQ, "+:" and "-:" for what it leaves in or out.
_PATTERN = re.compile(r"(re|[+-]):.*|\S*[*?|()\[\]\\^$]\S*")
_ANY_DIGIT = re.compile(r"\[0-9\]|\\[a-zA-Z]")
_NUMBER = re.compile(
    r"(?<![\w{,])\d"  # not in a name, such as "fc1", or in "{1,3}"
    r"|(?:\\\.|\[\.\])\.(?:\\\.|\[\.\])|\.\?\."  # any number of one digit
)


@dataclass(frozen=True)
class ModuleNames:
    """Translates names of modules in the dense model's settings to the pruned model's.

    Attributes:
        renamed: returns the new name of a module, or None for one that goes.
    """

    architecture: Architecture
    renamed: Callable[[str], str | None]

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the new contents of `config.json` or of another file of settings."""
        if file in QUANTIZATION_SETTINGS:
            return dict(self.in_settings(values))
        return self.in_config(values) if file == CONFIG else values

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config whose quantization settings, at any depth, name the modules that stay."""
        changed = dict(config)
        for key, value in config.items():
            if key in _KEYS:
                changed[key] = self.in_settings(value)
            elif isinstance(value, dict):
                changed[key] = self.in_config(value)
        return changed

    def in_settings(self, value: Any) -> Any:
        """Renumber the modules that settings name anywhere, and drop those that go.

        Returns:
            None for the name of a module that goes.
        """
        if isinstance(value, str):
            return self._renamed(value)
        if isinstance(value, list):
            return self._in_list(value)
        if isinstance(value, dict):
            return self._in_dict(value)
        return value

    def _in_list(self, values: list[Any]) -> list[Any]:
        changed = []
        for old in values:
            new = self.in_settings(old)
            if new is not None or old is None:
                changed.append(new)
        return changed

    def _in_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        changed = {}
        for key, old in values.items():
            name = self._renamed(key)
            new = self.in_settings(old)
            if name is None or (new is None and old is not None):
                continue
            # A group of compressed-tensors goes with the last of its targets.
            if isinstance(old, dict) and old.get("targets") and not new.get("targets"):
                continue
            changed[name] = new
        return changed

    def _renamed(self, text: str) -> str | None:
        if _NAME.fullmatch(text):
            return self._renamed_module(text)
        if _PATTERN.fullmatch(text) and _NUMBER.search(_ANY_DIGIT.sub("", text)):
            raise UnsupportedModelError(
                f"The quantization settings name modules by number, in the pattern {text!r}, which "
                f"would match other modules of the pruned model.",
                hint="Prune the original model first, then quantize it.",
            )
        return text

    def _renamed_module(self, name: str) -> str | None:
        renamed = self.renamed(name)
        if renamed != name or name in self._modules:
            return renamed
        # A block of the language model by its name in a larger model: "language_model." +
        # "model.layers.3".
        prefix, path, inner = name.partition(f".{self.architecture.adapter.blocks_path}.")
        if not path:
            return name
        renamed = self.renamed(f"{path[1:]}{inner}")
        return None if renamed is None else f"{prefix}.{renamed}"

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The names of all modules, as in the model and as in the files."""
        names = set()
        for name in self.architecture.source.weights.tensor_names():
            names.add(name.rpartition(".")[0])
        for name, _ in self.architecture.skeleton.named_modules():
            names.add(name)
        return frozenset(names)

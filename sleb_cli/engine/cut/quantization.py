"""Renumber the names of modules in the settings of a quantized checkpoint, and drop the names of
removed parts.

The packed tensors are copied like any others. But every format lists elsewhere which modules were
quantized in which way: `ignore`, `modules_to_not_convert`, `config_groups.*.targets`, GPTQ's
`dynamic`, a dictionary by module. So every string is checked. A name is renumbered like a tensor's.
A pattern (a regex or a glob) stays if it still matches the same modules, and is refused otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any, Literal

from sleb_cli.engine.files.config_files import CONFIG, QUANTIZATION_SETTINGS
from sleb_cli.engine.model.architecture import Architecture
from sleb_plugins import UnsupportedModelError

_KEYS = {"quantization_config", "compression_config"}
# Before a regex: in compressed-tensors, and in GPTQ for modules that it includes or excludes.
_PREFIX = re.compile("re:|[+]:|-:")
_NAME = re.compile(r"[\w.-]*")
_ANY_DIGIT = re.compile(r"\[0-9\]|\\d")
_DOT = r"(?:\\\.|\[\.\])"


@dataclass(frozen=True)
class ModuleNames:
    """Translates names of modules in the dense model's settings to the pruned model's.

    Attributes:
        unit: the kind of parts that are removed.
        renamed: returns the new name of a module, or None for one that goes.
    """

    architecture: Architecture
    unit: Literal["blocks", "experts"]
    renamed: Callable[[str], str | None]

    def settings(self, file: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the new contents of `config.json` or of another file of settings."""
        if file in QUANTIZATION_SETTINGS:
            return dict(self.in_settings(values))
        return self.in_config(values) if file == CONFIG else values

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a `config.json` whose quantization settings name the modules that stay, in nested
        configs too.
        """
        return {
            key: self.in_settings(value)
            if key in _KEYS
            else self.in_config(value)
            if isinstance(value, dict)
            else value
            for key, value in config.items()
        }

    def in_settings(self, value: Any) -> Any:
        """Renumber the modules that settings name anywhere, and drop those that go; None for such a
        name.
        """
        if isinstance(value, str):
            return self._renamed(value)
        if isinstance(value, list):
            return [
                new for item in value if (new := self.in_settings(item)) is not None or item is None
            ]
        if not isinstance(value, dict):
            return value
        result = {}
        for key, old in value.items():
            name, new = self._renamed(key), self.in_settings(old)
            # A group of compressed-tensors goes with the last of its targets.
            lost_its_targets = (
                isinstance(old, dict) and old.get("targets") and not new.get("targets")
            )
            if name is not None and (new is not None or old is None) and not lost_its_targets:
                result[name] = new
        return result

    def _renamed(self, text: str) -> str | None:
        if _NAME.fullmatch(text):
            return self._renamed_module(text)
        if self._matches_others(_PREFIX.sub("", text, count=1)):
            raise UnsupportedModelError(
                f"The quantization settings name {self.unit} by the pattern {text!r}, which would "
                f"match other "
                f"{self.unit}.",
                hint="Prune the original model first, then quantize it.",
            )
        return text

    def _matches_others(self, pattern: str) -> bool:
        """Whether the pattern would match other modules than before, by their new names, as a regex
        or as a glob.
        """
        matchers = [re.compile(translate(pattern)).match]
        with suppress(re.error):  # "*.mlp" is no regex
            matchers += [re.compile(pattern).match, re.compile(pattern).search]
        matches = {
            (bool(match(name)), bool(match(new)))
            for match in matchers
            for name, new in self._kept_names
        }
        if matches != {(False, False)}:
            return not matches <= {(False, False), (True, True)}
        if self.unit == "experts":  # the new names were all there before
            return False
        # It may match what engines call parts of a block, such as vLLM's fused `qkv_proj`.
        blocks = re.escape(self.architecture.adapter.blocks_path.rpartition(".")[2])
        return bool(
            re.search(rf"(?:{_DOT}|(?<!\w){blocks}\.)[(?:\[]*\d", _ANY_DIGIT.sub("", pattern))
        )

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
        architecture = self.architecture
        in_files = (name.rpartition(".")[0] for name in architecture.source.weights.tensor_names())
        return frozenset(in_files) | {name for name, _ in architecture.skeleton.named_modules()}

    @cached_property
    def _kept_names(self) -> list[tuple[str, str]]:
        """Pairs of old and new names."""
        return [(name, new) for name in self._modules if (new := self.renamed(name)) is not None]

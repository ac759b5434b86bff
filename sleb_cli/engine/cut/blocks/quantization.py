"""Renumber the names of modules in the settings of a quantized checkpoint, and drop those of removed blocks.

The packed tensors are copied like any others. But the settings list by name which modules were quantized in which way,
and every format does so elsewhere: `ignore`, `modules_to_not_convert`, `config_groups.*.targets`, GPTQ's `dynamic`, a
dictionary by module. So every string is checked. A name is renumbered like a tensor's. A pattern (a regex or a glob)
stays if it still matches the same modules, and is refused otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import BlockNames
from sleb_plugins import UnsupportedModelError

_KEYS = {"quantization_config", "compression_config"}
# Before a regex: in compressed-tensors, and in GPTQ for modules that it includes or excludes.
_PREFIX = re.compile("re:|[+]:|-:")
_NAME = re.compile(r"[\w.-]*")
_ANY_DIGIT = re.compile(r"\[0-9\]|\\d")
_DOT = r"(?:\\\.|\[\.\])"

Matches = Callable[[str], object]
"""A pattern, read in one way: truthy if it matches a name."""


def prune_quantization(config: Mapping[str, Any], architecture: Architecture, names: BlockNames) -> dict[str, Any]:
    """Return a `config.json` whose quantization settings name the kept blocks, in nested configs too.

    Raises:
        UnsupportedModelError: a pattern would match other modules than before.
    """
    pruned = dict(config)
    for key, value in config.items():
        if key in _KEYS:
            pruned[key] = prune_module_names(value, architecture, names)
        elif isinstance(value, dict):
            pruned[key] = prune_quantization(value, architecture, names)
    return pruned


def prune_module_names(settings: Any, architecture: Architecture, names: BlockNames) -> Any:
    """Renumber the modules that `settings` names anywhere, and drop those of removed blocks.

    Raises:
        UnsupportedModelError: a pattern would match other modules than before.
    """
    return _walk(settings, _Renaming(architecture, names))


def _walk(value: Any, renaming: _Renaming) -> Any:
    """Return `value` with its strings renamed; None for a string that is dropped."""
    if isinstance(value, str):
        return renaming.rename(value)
    if isinstance(value, list):
        walked = ((part, _walk(part, renaming)) for part in value)
        return [new for old, new in walked if new is not None or old is None]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, part in value.items():
        name, new = renaming.rename(key), _walk(part, renaming)
        lost_its_targets = isinstance(part, dict) and part.get("targets") and not new.get("targets")
        if name is not None and (new is not None or part is None) and not lost_its_targets:
            result[name] = new
    return result


@dataclass(frozen=True)
class _Renaming:
    """Translates strings of the dense model's settings to the pruned model's."""

    architecture: Architecture
    names: BlockNames

    def rename(self, text: str) -> str | None:
        """Return the renumbered name or the pattern, or None for the name of a removed block or a part of it."""
        if _NAME.fullmatch(text):
            return self._rename_module(text)
        if not self._stays_right(_PREFIX.sub("", text, count=1)):
            raise UnsupportedModelError(
                f"The quantization settings name blocks by the pattern {text!r}, which would match other blocks.",
                hint="Prune the original model first, then quantize it.",
            )
        return text

    def _stays_right(self, pattern: str) -> bool:
        """Whether the pattern matches the same modules under their new names as before."""
        found = [
            (bool(matches(name)), bool(matches(new))) for matches in _ways_to_read(pattern) for name, new in self._kept
        ]
        if any(map(any, found)):
            return all(before == after for before, after in found)
        # It may match what engines call parts of a block, such as vLLM's fused `qkv_proj`.
        blocks = self.architecture.adapter.blocks_path.rpartition(".")[2]
        number = rf"(?:{_DOT}|(?<!\w){re.escape(blocks)}\.)[(?:\[]*\d"
        return not re.search(number, _ANY_DIGIT.sub("", pattern))

    def _rename_module(self, name: str) -> str | None:
        renamed = self.names.renamed(name)
        if renamed != name or name in self._modules:
            return renamed
        # A block of the language model by its name in a larger model: "language_model." + "model.layers.3".
        path = re.escape(self.architecture.adapter.blocks_path)
        found = re.search(rf"\.{path}\.(\d{{1,9}})(?=\.|$)", name)
        if found is None:
            return name
        number = self.names.kept.new_number.get(int(found[1]))
        return None if number is None else f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The names of all modules, as in the model and as in the files."""
        architecture = self.architecture
        in_files = (name.rpartition(".")[0] for name in architecture.source.weights.tensor_names())
        return frozenset(in_files) | {name for name, _ in architecture.skeleton.named_modules()}

    @cached_property
    def _kept(self) -> list[tuple[str, str]]:
        """The names of the kept modules, before and after."""
        return [(name, new) for name in self._modules if (new := self.names.renamed(name)) is not None]


def _ways_to_read(pattern: str) -> list[Matches]:
    """Return the ways in which programs may read a pattern: as a regex, and as a glob."""
    glob = re.compile(translate(pattern)).match
    try:
        regex = re.compile(pattern)
    except re.error:  # "*.mlp"
        return [glob]
    return [regex.match, regex.search, glob]

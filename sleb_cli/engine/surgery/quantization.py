"""Renumber the names of modules in the settings of a quantized checkpoint, and drop those of removed blocks.

The packed tensors are copied like any others. But the settings list by name which modules were quantized in which way,
and every format does so elsewhere: `ignore`, `modules_to_not_convert`, `config_groups.*.targets`, GPTQ's `dynamic`, a
dictionary by module. So every string is checked. A name is renumbered like a tensor's. A pattern (a regex or a glob) is
renumbered where it contains numbers, and must then match the same modules as before, under their new names.

Patterns are not replaced by lists of the modules that they match, because inference engines match them against names of
their own, such as vLLM's fused `qkv_proj` and `gate_up_proj`, which no list of transformers' modules contains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import BlockNames
from sleb_plugins import UnsupportedModelError

QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
"""Files other than `config.json` that hold settings of quantization."""

_KEYS = {"quantization_config", "compression_config"}
# Prefixes of regexes: in compressed-tensors, and in GPTQ for modules that it includes or excludes.
_PREFIXES = ("re:", "+:", "-:")
_NAME = re.compile(r"[\w.-]*")
_GLOB = re.compile(r"[\w.*?-]*")
_DOT = r"(?:\\\.|\[\.\]|\.)"
# What may match a number in a pattern: any text at the start, digits, classes, groups, repetitions.
_NUMBER = r"(?:\.[*+])?(?:\d|\\d|[*+?]|\{[\d,]+\}|\[(?!\.\])[^\]]+\]|\((?:[^()]|\([^()]*\))*\))*"
# Numbers without the name of a list, as in GPTQ's `.*\.18\..*gate.*`.
_BETWEEN_DOTS = r"(?:\\\.|\[\.\])(?=[\d(\[])"
_NOTHING = "(?!)"

Matches = Callable[[str, str], object]
"""A way to interpret a pattern, the first argument: truthy if it matches a name, the second one."""


def prune_quantization(config: Mapping[str, Any], architecture: Architecture, names: BlockNames) -> dict[str, Any]:
    """Return a `config.json` whose quantization settings name the kept blocks, in nested configs too.

    Raises:
        UnsupportedModelError: a pattern names blocks in a way that cannot be renumbered exactly.
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
        UnsupportedModelError: a pattern names blocks in a way that cannot be renumbered exactly.
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
        """Return the renumbered name or pattern, or None if it names removed blocks only."""
        if _NAME.fullmatch(text):
            return self._rename_module(text)
        prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), "")
        pattern = text.removeprefix(prefix)
        syntaxes = _syntaxes(pattern, prefix)
        names_blocks = any(matches(pattern, name) for matches in syntaxes for name in self._block_modules)
        path = rf"(?<!\w){re.escape(self._path)}\.[\d(\[]"
        if not names_blocks and not re.search(path, re.sub(_DOT, ".", pattern)):
            return text
        after_path = rf"(?:(?<!\w)|(?<=\\b)){re.escape(self._path.rpartition('.')[2])}{_DOT}"
        for before in (after_path, _BETWEEN_DOTS):
            renumbered, removed = self._renumber(pattern, before)
            pairs = [
                (bool(matches(pattern, name)), bool(matches(renumbered, new)))
                for matches in syntaxes
                for name, new in self._kept
            ]
            if all(before == after for before, after in pairs):
                useless = removed and not any(after for _, after in pairs)
                return None if useless else prefix + renumbered
        raise UnsupportedModelError(
            f"The quantization settings name blocks by {text!r}, which cannot be renumbered exactly.",
            hint="List those modules one by one in the model's quantization_config, then try again.",
        )

    def _rename_module(self, name: str) -> str | None:
        renamed = next((new for new, _ in self.names.prune([(name, None)])), None)
        if renamed != name or name in self._modules:
            return renamed
        # A block of the language model by its name in a larger model: "language_model." + "model.layers.3".
        found = re.search(rf"\.{re.escape(self._path)}\.(\d{{1,9}})(?=\.|$)", name)
        if found is None:
            return name
        number = self.names.kept.new_number.get(int(found[1]))
        return None if number is None else f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"

    @property
    def _path(self) -> str:
        return self.architecture.adapter.blocks_path

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The names of all modules, as in the model and as in the files."""
        architecture = self.architecture
        in_files = (name.rpartition(".")[0] for name in architecture.source.weights.tensor_names())
        return frozenset(in_files) | {name for name, _ in architecture.skeleton.named_modules()}

    @cached_property
    def _block_modules(self) -> frozenset[str]:
        return frozenset(name for name in self._modules if self.names.block_of(name) is not None)

    @cached_property
    def _kept(self) -> list[tuple[str, str]]:
        """The names of the kept modules, before and after."""
        return [(name, new) for new, name in self.names.prune((name, name) for name in self._modules)]

    def _renumber(self, pattern: str, before: str) -> tuple[str, bool]:
        """Return the pattern with new numbers of blocks after `before`, and whether it named removed blocks only."""
        removed: list[bool] = []

        def renumber(found: re.Match[str]) -> str:
            named = self._numbers(found[2])
            if named is None:
                return found[0]
            new_number = self.names.kept.new_number
            kept = [str(new_number[block]) for block in named if block in new_number]
            removed.append(not kept)
            return found[1] + (kept[0] if len(kept) == 1 else f"(?:{'|'.join(kept)})" if kept else _NOTHING)

        return re.sub(f"({before})({_NUMBER})", renumber, pattern), bool(removed) and all(removed)

    def _numbers(self, part: str) -> list[int] | None:
        """Return the blocks that a part of a pattern matches; None if it matches all, or no number."""
        blocks = range(self.architecture.block_count)
        try:
            named = [block for block in blocks if re.fullmatch(part, str(block))]
        except re.error:
            return None
        return None if len(named) == len(blocks) or not (named or part.isdigit()) else named


def _syntaxes(pattern: str, prefix: str) -> list[Matches]:
    """Return all the ways in which programs may interpret a pattern: as a regex, or as a glob."""
    try:
        re.compile(pattern)
    except re.error:  # "*.mlp"
        return [_as_glob]
    return [re.match, re.search, *([_as_glob] if not prefix and _GLOB.fullmatch(pattern) else [])]


def _as_glob(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern)

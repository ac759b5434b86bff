"""Names of modules in the settings of a quantized checkpoint: renumbered, or dropped with their blocks.

The packed tensors themselves are bytes like any others. But the settings say by name which modules were quantized how,
and every format says it elsewhere: `ignore`, `modules_to_not_convert`, `config_groups.*.targets`, GPTQ's `dynamic`, a
dictionary by module... So every string is looked at. A name is renumbered as a tensor's is. A pattern (a regex, or a
glob) is renumbered where it says numbers, and then held to match the same modules as before, under their new names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.block_names import BlockNames
from sleb_plugins import UnsupportedModelError

QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
"""Where formats say it beside `config.json`."""

_KEYS = {"quantization_config", "compression_config"}
# What a format writes in front of a regex: compressed-tensors; GPTQ, for what it takes and what it leaves alone.
_MARKS = ("re:", "+:", "-:")
_NAME = re.compile(r"[\w.-]*")
_GLOB = re.compile(r"[\w.*?-]*")
_DOT = r"(?:\\\.|\[\.\]|\.)"
_NOTHING = "(?!)"

Matches = Callable[[str], bool]
PatternSyntax = Callable[[str], Matches]
"""A way to read a pattern."""


def prune_quantization(config: Mapping[str, Any], architecture: Architecture, names: BlockNames) -> dict[str, Any]:
    """Give a `config.json` whose quantization settings, also those of a part of the model, name the kept blocks.

    Raises:
        UnsupportedModelError: a pattern names blocks in a way that cannot be renumbered exactly.
    """
    pruned: dict[str, Any] = {}
    for key, value in config.items():
        if key in _KEYS:
            pruned[key] = prune_module_names(value, architecture, names)
        else:
            pruned[key] = prune_quantization(value, architecture, names) if isinstance(value, dict) else value
    return pruned


def prune_module_names(settings: Any, architecture: Architecture, names: BlockNames) -> Any:
    """Renumber the modules that `settings` names, wherever they stand, and drop those of removed blocks.

    Raises:
        UnsupportedModelError: a pattern names blocks in a way that cannot be renumbered exactly.
    """
    return _walk(settings, _Renaming(architecture, names))


def _walk(value: Any, renaming: _Renaming) -> Any:
    """Give `value` with its strings renamed; None where it was a string and is dropped."""
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
        if name is not None and (new is not None or part is None) and not _lost_its_targets(part, new):
            result[name] = new
    return result


def _lost_its_targets(before: Any, after: Any) -> bool:
    """Whether a group of modules, which has `targets`, has none left."""
    return isinstance(before, dict) and bool(before.get("targets")) and not after.get("targets")


@dataclass(frozen=True)
class _Renaming:
    """From a string in the dense model's settings to the pruned model's, or None where its blocks are gone."""

    architecture: Architecture
    names: BlockNames

    def rename(self, text: str) -> str | None:
        if _NAME.fullmatch(text):
            return self._rename_module(text)
        mark = next((mark for mark in _MARKS if text.startswith(mark)), "")
        pattern = text.removeprefix(mark)
        syntaxes = _syntaxes(pattern, mark)
        matched = {name for syntax in syntaxes for name in filter(syntax(pattern), self._modules)}
        if matched.isdisjoint(self._block_modules) and not self._says_the_path(pattern):
            return text
        for find_numbers in (self._after_the_path, _between_dots):
            renumbered, gone = self._renumber(pattern, find_numbers)
            if all(self._same_modules(pattern, renumbered, syntax) for syntax in syntaxes):
                useless = gone and not any(self._any_module(renumbered, syntax) for syntax in syntaxes)
                return None if useless else mark + renumbered
        raise UnsupportedModelError(
            f"The quantization settings name blocks by {text!r}, which cannot be renumbered exactly.",
            hint="Name those modules one by one in the model's quantization_config, then try again.",
        )

    def _rename_module(self, name: str) -> str | None:
        renamed = next((new for new, _ in self.names.prune([(name, None)])), None)
        if renamed != name or name in self._modules:
            return renamed
        # The blocks of a part of a larger model, by their name there: "language_model." + "model.layers.3".
        found = re.search(rf"\.{re.escape(self._path)}\.(\d+)(?=\.|$)", name)
        if found is None:
            return name
        number = self.names.new_number.get(int(found[1]))
        return None if number is None else f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"

    @property
    def _path(self) -> str:
        return self.architecture.adapter.blocks_path

    @cached_property
    def _modules(self) -> frozenset[str]:
        """Every module's name, as the model has it and as the files have it."""
        architecture = self.architecture
        in_files = (name.rpartition(".")[0] for name in architecture.source.weights.tensor_names())
        return frozenset(in_files) | {name for name, _ in architecture.skeleton.named_modules()}

    @cached_property
    def _block_modules(self) -> frozenset[str]:
        return frozenset(name for name in self._modules if self.names.locate(name))

    @cached_property
    def _kept(self) -> list[tuple[str, str]]:
        """The kept modules' names, before and after."""
        return [(name, new) for new, name in self.names.prune((name, name) for name in self._modules)]

    def _says_the_path(self, pattern: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(self._path)}\.[\d(\[]", re.sub(_DOT, ".", pattern)) is not None

    def _after_the_path(self, pattern: str) -> Iterator[int]:
        """Say where in a pattern, after the name of the list of blocks, a number stands."""
        tail = re.escape(self._path.rpartition(".")[2])
        for found in re.finditer(rf"(?:(?<!\w)|(?<=\\b)){tail}{_DOT}", pattern):
            yield found.end()

    def _renumber(self, pattern: str, find_numbers: Callable[[str], Iterator[int]]) -> tuple[str, bool]:
        """Replace what stands for numbers of blocks; say too whether only removed blocks were named."""
        done, parts, gone = 0, [], []
        for start in find_numbers(pattern):
            end = _end_of_number(pattern, start)
            named = self._numbers(pattern[start:end])
            if start < done or named is None:
                continue
            kept = [str(self.names.new_number[block]) for block in named if block in self.names.new_number]
            parts += [pattern[done:start], kept[0] if len(kept) == 1 else f"(?:{'|'.join(kept)})" if kept else _NOTHING]
            gone.append(not kept)
            done = end
        return "".join([*parts, pattern[done:]]), bool(gone) and all(gone)

    def _numbers(self, part: str) -> list[int] | None:
        """Give the blocks that a part of a pattern stands for; None where it stands for all, or for no number."""
        blocks = range(self.architecture.block_count)
        try:
            named = [block for block in blocks if re.fullmatch(part, str(block))]
        except re.error:
            return None
        return None if len(named) == len(blocks) or not (named or part.isdigit()) else named

    def _same_modules(self, before: str, after: str, syntax: PatternSyntax) -> bool:
        matches_before, matches_after = syntax(before), syntax(after)
        return all(matches_before(name) == matches_after(new) for name, new in self._kept)

    def _any_module(self, pattern: str, syntax: PatternSyntax) -> bool:
        matches = syntax(pattern)
        return any(matches(new) for _, new in self._kept)


def _between_dots(pattern: str) -> Iterator[int]:
    """Say where a number stands alone, as in GPTQ's `.*\\.18\\..*gate.*`."""
    for found in re.finditer(r"(?:\\\.|\[\.\])(?=[\d(\[])", pattern):
        yield found.end()


def _syntaxes(pattern: str, mark: str) -> list[PatternSyntax]:
    """Give every way in which programs may read such a pattern: as a regex, or as a glob."""
    try:
        re.compile(pattern)
    except re.error:  # "*.mlp"
        return [_as_glob]
    return [_from_the_start, _anywhere, *([_as_glob] if not mark and _GLOB.fullmatch(pattern) else [])]


def _from_the_start(pattern: str) -> Matches:
    regex = re.compile(pattern)
    return lambda name: regex.match(name) is not None


def _anywhere(pattern: str) -> Matches:
    regex = re.compile(pattern)
    return lambda name: regex.search(name) is not None


def _as_glob(pattern: str) -> Matches:
    return _from_the_start(translate(pattern))


def _end_of_number(pattern: str, start: int) -> int:
    """Say where what stands for a number ends: before the next dot, or where its alternative or group does."""
    depth, here = 0, start
    while here < len(pattern):
        character, next_one = pattern[here], pattern[here + 1 : here + 2]
        any_text = here == start and character == "." and next_one in ("*", "+")
        if depth == 0 and (re.match(r"\\\.|\[\.\]|[|$)]", pattern[here:]) or (character == "." and not any_text)):
            break
        if character == "\\":
            here += 1
        elif character == "[":
            here = max(here, pattern.find("]", here + 2))
        depth += (character == "(") - (character == ")")
        here += 1
    return min(here, len(pattern))

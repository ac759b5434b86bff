"""Compare structures without weights: a removal must not change the remaining blocks.

A family builds each block from the config and the block's number. If the number decides more than a
position (a kind by period, a constant that grows with depth), a remaining block may be built
differently under its new number. The classes, parameters and plain attributes of its modules show
it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sleb_plugins.config_keys import NUMBERED_PARTS, Kept, by_block, sliced_axis


@dataclass(frozen=True)
class Structure:
    """The modules, parameters and settings of a module, by dotted names.

    Attributes:
        parts: classes of modules and shapes of parameters.
        attributes: numbers, strings, and lists of them, that modules keep for their forward pass.
    """

    parts: Mapping[str, Any]
    attributes: Mapping[str, Any]


_NUMBER_NAMES = re.compile(r"layer|block|depth|number|idx|index|seed|(^|_)id($|_)")

_SMALL = re.compile("Norm|Identity|Dropout")


def structure_of(module: nn.Module, without: str | None = None) -> Structure:
    """Return the structure of a module, without anything under the path `without`."""
    parts: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for path, submodule in module.named_modules():
        if without is not None and (path == without or path.startswith(f"{without}.")):
            continue
        parts[path or "class"] = type(submodule).__name__
        for name, parameter in submodule.named_parameters(recurse=False):
            parts[f"{path}.{name}".lstrip(".")] = tuple(parameter.shape)
        for name, value in vars(submodule).items():
            if not name.startswith("_") and name != "training" and _is_plain(value):
                attributes[f"{path}.{name}".lstrip(".")] = value
    return Structure(parts, attributes)


def tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters and buffers, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def block_changes(before: Structure, after: Structure, old: int, kept: Kept) -> list[str]:
    """Return the differences in block `old` after the removal, one clause each."""

    def is_same(name: str, a: Any, b: Any) -> bool:
        return _is_same(a, b, kept) or (
            _is_number(name, a, b) and b in _expected_numbers(name, a, old, kept)
        )

    return [
        *_changes(before.parts, after.parts),
        *_changes(before.attributes, after.attributes, is_same),
    ]


def _expected_numbers(name: str, number: int, old: int, kept: Kept) -> set[int | None]:
    """Return the values that a number of block `old` may have after the removal."""
    moved = kept.new_number[old] - old
    # A number relative to its own, or the number of a block that it refers to.
    expected = {number + moved, kept.new_number.get(number)}
    if number == kept.count:
        expected.add(len(kept.blocks))
    for end, count in NUMBERED_PARTS.items():
        if name.endswith(end):
            expected.add(number + count * moved)
    return expected


def outer_changes(before: Structure, after: Structure, kept: Kept) -> list[str]:
    """Return the differences outside the blocks.

    Counts of blocks and lists with one value per block are none.
    """

    def is_same_part(name: str, a: Any, b: Any) -> bool:
        axis = sliced_axis(name)
        if axis is None:
            return bool(a == b)
        wide = list(a)
        slim = list(b)
        width = wide.pop(axis)
        new_width = slim.pop(axis)
        return width * len(kept.blocks) == new_width * kept.count and wide == slim

    def is_same(name: str, a: Any, b: Any) -> bool:
        if _is_same(a, b, kept) or _fewer_kinds(a, b):
            return True
        if not (isinstance(a, int) and isinstance(b, int)):
            return False
        if sliced_axis(f"{name.rpartition('.')[0]}.weight") is not None:
            # The width of such a tensor.
            return a * len(kept.blocks) == b * kept.count
        # The number of blocks, or where a run of them begins.
        return _is_number(name, a, b) and 0 <= a <= kept.count and kept.below(a) == b

    old_attributes = {}
    new_attributes = {}
    for name in sorted(before.attributes.keys() & after.attributes.keys()):
        old_attributes[name] = before.attributes[name]
        new_attributes[name] = after.attributes[name]
    return [
        *_changes(before.parts, after.parts, is_same_part),
        *_changes(old_attributes, new_attributes, is_same),
    ]


def shared_weights(blocks: nn.ModuleList) -> bool:
    """Whether any parameter belongs to more than one block."""
    return sum(len(list(block.parameters())) for block in blocks) > len(list(blocks.parameters()))


def refine_kinds(blocks: nn.ModuleList, kinds: Sequence[str]) -> list[str]:
    """Add to each block's kind the classes of the parts that differ among blocks of that kind."""
    classes_of_blocks = []
    names = dict.fromkeys([""])
    for block in blocks:
        classes = {"": type(block).__name__}
        for name, child in block.named_children():
            classes[name] = type(child).__name__
        classes_of_blocks.append(classes)
        names |= dict.fromkeys(classes)
    words_of_blocks = [[kind] for kind in kinds]
    for name in names:
        part_classes = [classes.get(name, "") for classes in classes_of_blocks]
        pairs = set()
        for kind, part_class in zip(kinds, part_classes, strict=True):
            if not _SMALL.search(part_class):
                pairs.add((kind, part_class))
        # More pairs than kinds: blocks of one kind differ in this part.
        if len(pairs) > len({kind for kind, _ in pairs}):
            for words, part_class in zip(words_of_blocks, part_classes, strict=True):
                words.append(part_class)
    return [", ".join(dict.fromkeys(filter(None, words))) for words in words_of_blocks]


def _is_same(a: Any, b: Any, kept: Kept) -> bool:
    if a == b:
        return True
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)  # the same constant, summed in another order
    # Lists with one value per block differ by the removed blocks.
    return _is_list(a) and _is_list(b) and list(by_block(a, kept)) == list(b)


def _is_number(name: str, a: Any, b: Any) -> bool:
    if not isinstance(a, int) or not isinstance(b, int):
        return False
    return _NUMBER_NAMES.search(name.rpartition(".")[2]) is not None


def _fewer_kinds(a: Any, b: Any) -> bool:
    """Whether `b` lacks some of the kinds in `a`: an attribute for the last block of a kind."""
    if not _is_list(a) or not _is_list(b):
        return False
    are_distinct = len(set(map(str, a))) == len(a)
    return are_distinct and len(a) > len(b) and set(b) <= set(a)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    is_same: Callable[[str, Any, Any], bool] = lambda name, a, b: a == b,
) -> list[str]:
    changes = []
    for name in dict.fromkeys((*before, *after)):
        if name in before and name in after and is_same(name, before[name], after[name]):
            continue
        new = after.get(name, "absent")
        old = before.get(name, "absent")
        changes.append(f"{name} would be {new}, not {old}")
    return changes


def _is_plain(value: Any) -> bool:
    if _is_list(value):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | torch.dtype)

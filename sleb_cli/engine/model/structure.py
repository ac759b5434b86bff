"""What a model is made of, told without its weights: so that a removal which changes other blocks is seen beforehand.

A family builds each block from the config and the block's number. Where the number decides more than a place (a kind
by period, a constant that grows with depth), the blocks that remain may come out as others than they were. Their
classes, parameters and plain attributes tell.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sleb_plugins.config_keys import Kept, by_block, sliced_axis


@dataclass(frozen=True)
class Structure:
    """A module taken apart, by dotted names.

    Attributes:
        parts: classes of modules and shapes of parameters.
        attributes: numbers, words, and lists of them, that modules keep for their forward pass.
    """

    parts: Mapping[str, Any]
    attributes: Mapping[str, Any]


_NUMBER_NAMES = re.compile(r"layer|block|depth|number|idx|index|seed|(^|_)id($|_)")

_SMALL = re.compile("Norm|Identity|Dropout")


def structure_of(module: nn.Module, without: str | None = None) -> Structure:
    """Take a module apart; everything under the path `without` is left out."""
    parts: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for path, part in module.named_modules():
        if without is not None and (path == without or path.startswith(f"{without}.")):
            continue
        parts[path or "class"] = type(part).__name__
        for name, parameter in part.named_parameters(recurse=False):
            parts[f"{path}.{name}".lstrip(".")] = tuple(parameter.shape)
        for name, value in vars(part).items():
            if not name.startswith("_") and name != "training" and _is_plain(value):
                attributes[f"{path}.{name}".lstrip(".")] = value
    return Structure(parts, attributes)


def block_changes(before: Structure, after: Structure, old: int, kept: Kept) -> list[str]:
    """Say what is different about block `old` after the others are gone, one clause each."""
    new = kept.blocks.index(old)

    def same(name: str, a: Any, b: Any) -> bool:
        if _equal(a, b) or _same_list(a, b, kept):
            return True
        if not _is_number(name, a, b):
            return False
        # Counted from its own number, the number of a block it refers to, or how many there are; and a block with two
        # attentions counts these.
        if (
            a - old == b - new
            or (a in kept.blocks and kept.blocks.index(a) == b)
            or (a, b) == (kept.count, len(kept.blocks))
        ):
            return True
        return name.endswith("layer_idx") and a - 2 * old == b - 2 * new

    return [*_changes(before.parts, after.parts), *_changes(before.attributes, after.attributes, same)]


def outer_changes(before: Structure, after: Structure, kept: Kept) -> list[str]:
    """Say what is different about the rest of the model, where it is not just a count or a list by block.

    What it kept for the last block of a kind may go with it, and tensors that hold a slice for each block shrink.
    """

    def same(name: str, a: Any, b: Any) -> bool:
        if _equal(a, b) or _same_list(a, b, kept) or _fewer_kinds(a, b):
            return True
        if not (isinstance(a, int) and isinstance(b, int)):
            return False
        if sliced_axis(f"{name.rpartition('.')[0]}.weight") is not None:  # its width
            return a * len(kept.blocks) == b * kept.count
        # How many blocks there are, or where a stretch of them begins.
        return _is_number(name, a, b) and 0 <= a <= kept.count and kept.below(a) == b

    def same_part(name: str, a: Any, b: Any) -> bool:
        axis = sliced_axis(name)
        if axis is None:
            return bool(a == b)
        wide, slim = list(a), list(b)
        return bool(wide.pop(axis) * len(kept.blocks) == slim.pop(axis) * kept.count and wide == slim)

    common = before.attributes.keys() & after.attributes.keys()
    was, is_now = ({name: which.attributes[name] for name in sorted(common)} for which in (before, after))
    return [*_changes(before.parts, after.parts, same_part), *_changes(was, is_now, same)]


def shared_weights(blocks: nn.ModuleList) -> bool:
    """Say whether any parameter belongs to more than one block."""
    owners = Counter(id(parameter) for block in blocks for parameter in set(block.parameters()))
    return any(count > 1 for count in owners.values())


def tell_apart(blocks: nn.ModuleList, kinds: Sequence[str]) -> list[str]:
    """Add to each block's kind the classes of those parts that differ among blocks of its kind.

    With no kinds yet, these classes are all there is; empty where all blocks are alike.
    """
    classes = [{"": type(b).__name__} | {n: type(m).__name__ for n, m in b.named_children()} for b in blocks]
    names = dict.fromkeys(name for parts in classes for name in parts)
    said = [[kind] for kind in kinds]
    for name in names:
        found: dict[str, set[str]] = defaultdict(set)
        for kind, parts in zip(kinds, classes, strict=True):
            if not _SMALL.search(parts.get(name, "")):
                found[kind].add(parts.get(name, ""))
        if any(len(different) > 1 for different in found.values()):
            for words, parts in zip(said, classes, strict=True):
                words.append(parts.get(name, ""))
    return [", ".join(dict.fromkeys(filter(None, words))) for words in said]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)  # the same constant by another order of the same sums
    return bool(a == b)


def _is_number(name: str, a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and _NUMBER_NAMES.search(name.rpartition(".")[2]) is not None


def _same_list(a: Any, b: Any, kept: Kept) -> bool:
    return isinstance(a, list | tuple) and isinstance(b, list | tuple) and list(by_block(a, kept)) == list(b)


def _fewer_kinds(a: Any, b: Any) -> bool:
    """Say whether two lists are names of kinds, of which some are gone."""
    are_lists = isinstance(a, list | tuple) and isinstance(b, list | tuple)
    return are_lists and len(set(map(str, a))) == len(a) > len(b) and set(b) <= set(a)


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], same: Callable[[str, Any, Any], bool] = lambda n, a, b: a == b
) -> list[str]:
    return [
        f"{name} would be {after.get(name, 'absent')}, not {before.get(name, 'absent')}"
        for name in dict.fromkeys((*before, *after))
        if (name in before) != (name in after) or not same(name, before[name], after[name])
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | torch.dtype)

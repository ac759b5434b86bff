"""Would a removal change the remaining blocks? Structures without weights are compared.

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


def block_changes(before: Structure, after: Structure, old: int, kept: Kept) -> list[str]:
    """Return the differences in block `old` after the removal, one clause each."""
    moved = kept.new_number[old] - old

    def same(name: str, a: Any, b: Any) -> bool:
        if _same(a, b, kept):
            return True
        if not _is_number(name, a, b):
            return False
        # A number relative to its own, the number of a block that it refers to, or the number of
        # blocks.
        expected = {a + moved, kept.new_number.get(a)} | (
            {len(kept.blocks)} if a == kept.count else set()
        )
        return b in expected | {
            a + count * moved for end, count in NUMBERED_PARTS.items() if name.endswith(end)
        }

    return [
        *_changes(before.parts, after.parts),
        *_changes(before.attributes, after.attributes, same),
    ]


def outer_changes(before: Structure, after: Structure, kept: Kept) -> list[str]:
    """Return the differences outside the blocks, apart from counts of blocks and lists with one
    value per block.
    """

    def same(name: str, a: Any, b: Any) -> bool:
        if _same(a, b, kept) or _fewer_kinds(a, b):
            return True
        if not (isinstance(a, int) and isinstance(b, int)):
            return False
        if (
            sliced_axis(f"{name.rpartition('.')[0]}.weight") is not None
        ):  # the width of such a tensor
            return a * len(kept.blocks) == b * kept.count
        # The number of blocks, or where a run of them begins.
        return _is_number(name, a, b) and 0 <= a <= kept.count and kept.below(a) == b

    def same_part(name: str, a: Any, b: Any) -> bool:
        axis = sliced_axis(name)
        if axis is None:
            return bool(a == b)
        wide, slim = list(a), list(b)
        return bool(
            wide.pop(axis) * len(kept.blocks) == slim.pop(axis) * kept.count and wide == slim
        )

    common = before.attributes.keys() & after.attributes.keys()
    was, is_now = (
        {name: model.attributes[name] for name in sorted(common)} for model in (before, after)
    )
    return [*_changes(before.parts, after.parts, same_part), *_changes(was, is_now, same)]


def shared_weights(blocks: nn.ModuleList) -> bool:
    """Whether any parameter belongs to more than one block."""
    return sum(len(list(block.parameters())) for block in blocks) > len(list(blocks.parameters()))


def refine_kinds(blocks: nn.ModuleList, kinds: Sequence[str]) -> list[str]:
    """Add to each block's kind the classes of the parts that differ among blocks of that kind."""
    classes = [
        {"": type(b).__name__} | {n: type(m).__name__ for n, m in b.named_children()}
        for b in blocks
    ]
    names = dict.fromkeys(name for parts in classes for name in parts)
    refined = [[kind] for kind in kinds]
    for name in names:
        by_block = [parts.get(name, "") for parts in classes]
        pairs = {
            (kind, cls) for kind, cls in zip(kinds, by_block, strict=True) if not _SMALL.search(cls)
        }
        # More pairs than kinds: blocks of one kind differ in this part.
        if len(pairs) > len({kind for kind, _ in pairs}):
            for words, cls in zip(refined, by_block, strict=True):
                words.append(cls)
    return [", ".join(dict.fromkeys(filter(None, words))) for words in refined]


def _same(a: Any, b: Any, kept: Kept) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)  # the same constant, summed in another order
    are_lists = isinstance(a, list | tuple) and isinstance(b, list | tuple)
    # Lists with one value per block differ by the removed blocks.
    return bool(a == b) or (are_lists and list(by_block(a, kept)) == list(b))


def _is_number(name: str, a: Any, b: Any) -> bool:
    return (
        isinstance(a, int)
        and isinstance(b, int)
        and _NUMBER_NAMES.search(name.rpartition(".")[2]) is not None
    )


def _fewer_kinds(a: Any, b: Any) -> bool:
    # An attribute for the last block of a kind may disappear with it.
    are_lists = isinstance(a, list | tuple) and isinstance(b, list | tuple)
    return are_lists and len(set(map(str, a))) == len(a) > len(b) and set(b) <= set(a)


def _changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    same: Callable[[str, Any, Any], bool] = lambda n, a, b: a == b,
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

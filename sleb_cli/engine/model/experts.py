"""Where does a model keep its experts? Which setting counts them, and which tensors are theirs?

No weight is read, and no family is named: the model is built without weights with fewer experts,
and tensors that shrink with their number are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sleb_cli.engine.files.slices import Slices
from sleb_cli.engine.transformers_internals import revert_weight_conversion
from sleb_plugins import ModelError, UnsupportedModelError
from sleb_plugins.config_keys import OTHER_TEXT_KEYS

if TYPE_CHECKING:
    from sleb_cli.engine.model.architecture import Architecture

MIN_EXPERTS = 4
"""A model with fewer has none to spare: twice as many as are active must stay, and one must go."""

ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
"""Config keys of the number of experts that a token uses."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A tensor with `units` equal slices along `axis`: first one of each expert, then slices of
    none, which stay.
    """

    axis: int
    units: int

    def slices_of(self, experts: Sequence[int], count: int) -> Slices:
        """Return the slices of these experts, of `count`."""
        return Slices(self.axis, self.units, (*experts, *range(count, self.units)))


@dataclass(frozen=True)
class Experts:
    """The experts of a model. Names of tensors and modules are those in a block:
    `mlp.experts.gate_up_proj`.

    Attributes:
        key: the setting of the language model's config that counts them; in some families, in a
            dictionary there.
        count: in each block.
        active: used for a token.
        groups: of which the router first chooses some.
        blocks: the blocks that have experts.
        module: holds their weights.
        router: the tensors by which they are chosen.
        parts: the tensors with a slice of each, by their names in the model and in the files.
        numbered: what precedes an expert's number in names of tensors of one expert:
            `mlp.experts.`.
    """

    key: tuple[str, ...]
    count: int
    active: int
    groups: int
    blocks: tuple[int, ...]
    module: str
    router: Mapping[str, Part]
    parts: Mapping[str, Part]
    numbered: frozenset[str]

    def numbered_in(self, name: str) -> tuple[str, int, str] | None:
        """Split the name of an expert, or of a tensor or module of one, around its number."""
        for before in self.numbered:
            if name.startswith(before) and (
                match := re.fullmatch(r"(\d{1,6})(|\..*)", name[len(before) :], re.DOTALL)
            ):
                return before, int(match[1]), match[2]
        return None


def find_experts(architecture: Architecture) -> Experts:
    """Find the experts of a model."""
    text, skeleton = architecture.text_config, architecture.skeleton
    state, groups = dict(skeleton.state_dict()), getattr(text, "n_group", None) or 1
    counts, settings = {}, dict(integer_settings(text.to_dict()))
    for key, count in settings.items():
        can_be = "expert" in key[-1] and count >= MIN_EXPERTS and count > 2 * groups
        if can_be and (fewer := _build_with_fewer(architecture, key, count, groups)):
            first, second = (
                _shrinking_parts(state, dict(model.state_dict()), less) for model, less in fewer
            )
            # Twice as many less must change the same tensors by twice as much.
            if first and first == second and sum(state[name].ndim > 1 for name in first) > 2:
                counts[key] = count, first, fewer[0][0]
    if not counts:
        raise refusal(architecture, "no setting of its config counts experts that its blocks have")
    largest = max(len(parts) for _, parts, _ in counts.values())
    keys = [key for key, (_, parts, _) in counts.items() if len(parts) == largest]
    if len(keys) > 1:
        raise refusal(
            architecture,
            f"several settings count its experts: {', '.join('.'.join(key) for key in keys)}",
        )
    count, parts, fewer_experts = counts[keys[0]]
    split = {name: architecture.names.split(name) for name in parts}
    blocks = sorted({-1 if block is None else block for block, _ in split.values()})
    if blocks[0] < 0:
        raise refusal(architecture, "it has experts outside its blocks, too")
    by_name = {inner: parts[name] for name, (_, inner) in split.items()}
    module, router = _module_and_router(architecture, state, by_name, blocks, count)
    in_files, numbered = _parts_in_files(architecture, skeleton, fewer_experts, groups)
    # Beside the count of experts, or else at the top.
    active_keys = ((*around, name) for name in ACTIVE for around in (keys[0][:-1], ()))
    active = next((settings[key] for key in active_keys if key in settings), 1)
    experts = Experts(
        keys[0], count, active, groups, tuple(blocks), module, router, by_name | in_files, numbered
    )
    return _with_siblings(architecture, experts)


def expert_parameters(architecture: Architecture) -> int:
    """Count the parameters of one expert in each block, with its slice of the router."""
    split, parts, total = architecture.names.split, architecture.experts.parts, 0
    for name, parameter in architecture.skeleton.named_parameters():
        if part := parts.get(split(name)[1]):
            total += parameter.numel() // part.units
    return total


def refusal(architecture: Architecture, why: str) -> UnsupportedModelError:
    """Return the error for a model whose experts cannot be removed."""
    return UnsupportedModelError(
        f"No expert can be removed from {architecture.source.id} "
        f"({architecture.config.model_type}), because {why}.",
        hint="Remove blocks: leave out --unit experts. docs/experts.md says which models have "
        "experts to remove.",
    )


def integer_settings(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield each whole number in a config, and the keys that lead to it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from integer_settings(value, (*path, str(key)))
        elif type(value) is int:
            yield (*path, str(key)), value


def with_setting(
    architecture: Architecture, raw: Mapping[str, Any], key: tuple[str, ...], value: int
) -> dict[str, Any]:
    """Return a config with this value of a setting of the language model, under each name that the
    file gives it.
    """
    text_keys = (architecture.text_key, *OTHER_TEXT_KEYS) if architecture.text_key else ()
    text = next((text_key for text_key in text_keys if isinstance(raw.get(text_key), dict)), "")
    changed = inner = dict(raw)
    for step in (*([text] if text else []), *key[:-1]):
        # Targets are assigned from left to right: the copy goes into `inner`, and then becomes it.
        inner[step] = inner = dict(inner.get(step) or {})
    aliases = type(architecture.text_config).attribute_map
    names = [
        name
        for name in inner
        if name == key[-1] or aliases.get(name) == key[-1] or aliases.get(key[-1]) == name
    ]
    inner |= dict.fromkeys(names or [key[-1]], value)
    return changed


def build_with_setting(architecture: Architecture, key: tuple[str, ...], value: int) -> nn.Module:
    """Build the model without weights, with this value of a setting."""
    raw = dict(architecture.source.raw_config)
    raw.pop("quantization_config", None)
    return architecture.build(architecture.read_config(with_setting(architecture, raw, key, value)))


def _build_with_fewer(
    architecture: Architecture, key: tuple[str, ...], count: int, groups: int
) -> list[tuple[nn.Module, int]]:
    """Build the model with one expert less in each group, and with two; return nothing if either
    cannot be built.
    """
    try:
        return [
            (build_with_setting(architecture, key, count - less), less)
            for less in (groups, 2 * groups)
        ]
    except ModelError:
        return []


def _shrinking_parts(before: Tensors, after: Tensors, less: int) -> dict[str, Part] | None:
    """Return the tensors that shrink with the number of experts; None if anything else changes."""
    parts = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None or old.ndim != new.ndim:
            return None
        axes = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
        if not axes:
            continue
        axis = axes[0]
        width, rest = divmod(old.shape[axis] - new.shape[axis], less)
        first = all(size == 1 for size in old.shape[:axis])
        if len(axes) > 1 or not first or rest or width < 1 or old.shape[axis] % width:
            return None
        parts[name] = Part(axis, old.shape[axis] // width)
    return parts


def _module_and_router(
    architecture: Architecture,
    state: Tensors,
    parts: Mapping[str, Part],
    blocks: Sequence[int],
    count: int,
) -> tuple[str, dict[str, Part]]:
    path = architecture.adapter.blocks_path
    first = {name: state.get(f"{path}.{blocks[0]}.{name}") for name in parts}
    shapes = {name: tensor.shape for name, tensor in first.items() if tensor is not None}
    if shapes.keys() != parts.keys():
        raise refusal(architecture, "its blocks keep their experts in different ways")

    def is_weight(name: str) -> bool:
        return len(shapes[name]) > 2 or shapes[name][parts[name].axis] > 2 * count

    holders = sorted({name.rpartition(".")[0] for name in parts if is_weight(name)})
    if not holders:
        raise refusal(architecture, "none of its tensors holds weights of experts")
    module = holders[0] if len(holders) == 1 else holders[0].rpartition(".")[0]
    if any(holder != module and holder.rpartition(".")[0] != module for holder in holders):
        raise refusal(architecture, f"it has two kinds of experts: {', '.join(holders)}")
    router = {name: part for name, part in parts.items() if not name.startswith(f"{module}.")}
    if not router:
        raise refusal(architecture, "it has no router")
    if any("." not in name for name in router):
        raise refusal(architecture, "its blocks hold tensors of their routers themselves")
    around = f"{path}.{blocks[0]}.{module.rpartition('.')[0]}".rstrip(".")
    for name, tensor in state.items():
        if name.startswith(f"{around}.") and not tensor.is_floating_point() and tensor.numel() > 1:
            raise refusal(
                architecture, f"{name} may hold numbers of experts, as for routing by hash"
            )
    return module, router


def _parts_in_files(
    architecture: Architecture, model: nn.Module, fewer: nn.Module, less: int
) -> tuple[dict[str, Part], frozenset[str]]:
    """Return the parts and `numbered` of `Experts`, by names in files."""
    # transformers may write each expert apart.
    before, after = (
        revert_weight_conversion(one, dict(one.state_dict())) for one in (model, fewer)
    )
    names = architecture.names
    parts, numbered = dict[str, Part](), set[str]()
    for name, old in before.items():
        block, rest = names.split(name)
        new = after.get(name)
        if block is None or (new is not None and new.shape == old.shape):
            continue
        if new is None and (match := re.match(r"(.*?\.)\d+\.", rest)):
            numbered.add(match[1])  # of the last expert, but its name begins like all others'
        elif changed := _shrinking_parts({name: old}, after, less):
            parts[rest] = changed[name]
        else:
            raise refusal(
                architecture, f"{name} is stored in a way that no part of it is one expert's"
            )
    return parts, frozenset(numbered)


def _with_siblings(architecture: Architecture, experts: Experts) -> Experts:
    """Add the scales and packed values that quantized files hold beside stacked weights."""
    names = architecture.names
    stems, blocks, parts = (
        [name.removesuffix(".weight") for name in experts.parts],
        set(),
        dict(experts.parts),
    )
    for tensor in architecture.source.weights.stored:
        block, rest = names.split(tensor.name)
        if (
            rest not in parts
            and tensor.shape[:1] == (experts.count,)
            and any(map(rest.startswith, stems))
        ):
            parts[rest] = Part(0, experts.count)
        if rest not in experts.router and (rest in parts or experts.numbered_in(rest)):
            blocks.add(block)
    if missing := sorted({*experts.blocks} - blocks):
        raise refusal(
            architecture,
            f"its weight files hold no experts of block {missing[0]} under a known name",
        )
    return replace(experts, parts=parts)

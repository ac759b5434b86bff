"""Find a model's experts: the setting that counts them, and the tensors that are theirs.

No weight is read, and no family is named: the model is built without weights with fewer experts,
and tensors that shrink with their number are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor, nn

from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.expert_settings import ACTIVE, Key, build_with_setting, integer_settings
from sleb_cli.engine.transformers_internals import revert_weight_conversion
from sleb_plugins import ModelError, UnsupportedModelError

MIN_EXPERTS = 4
"""A model with fewer has none to spare: twice as many as are active must stay, and one must go."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A tensor with `units` equal slices along `axis`.

    First comes one slice of each expert, then slices of none, which stay.
    """

    axis: int
    units: int


Parts = dict[str, Part]


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    Names of tensors and modules are those in a block: `mlp.experts.gate_up_proj`.

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

    key: Key
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
            if not name.startswith(before):
                continue
            match = re.fullmatch(r"(\d{1,6})(|\..*)", name[len(before) :], re.DOTALL)
            if match:
                return before, int(match[1]), match[2]
        return None


@lru_cache(maxsize=2)
def find_experts(architecture: Architecture) -> Experts:
    """Find the experts of a model.

    Raises:
        UnsupportedModelError: it has none, or some that cannot be removed.
    """
    text = architecture.text_config
    groups = getattr(text, "n_group", None) or 1
    settings = integer_settings(text.to_dict())
    counted = _find_count(architecture, settings, groups)
    blocks, parts = _parts_in_blocks(architecture, counted.parts)
    module, router = _module_and_router(architecture, parts, blocks[0], counted.count)
    in_files, numbered = _parts_in_files(architecture, counted.fewer, groups)
    experts = Experts(
        key=counted.key,
        count=counted.count,
        active=_find_active(settings, counted.key),
        groups=groups,
        blocks=blocks,
        module=module,
        router=router,
        parts=parts | in_files,
        numbered=numbered,
    )
    return _with_siblings(architecture, experts)


def expert_parameters(architecture: Architecture) -> int:
    """Count the parameters of one expert in each block, with its slice of the router."""
    parts = find_experts(architecture).parts
    total = 0
    for name, parameter in architecture.skeleton.named_parameters():
        _, inner = architecture.names.split(name)
        if inner in parts:
            total += parameter.numel() // parts[inner].units
    return total


def refusal(architecture: Architecture, why: str) -> UnsupportedModelError:
    """Return the error for a model whose experts cannot be removed."""
    return UnsupportedModelError(
        f"No expert can be removed from {architecture.source.id} "
        f"({architecture.config.model_type}), because {why}.",
        hint="Remove blocks: leave out --unit experts. docs/experts.md says which models have "
        "experts to remove.",
    )


@dataclass(frozen=True)
class _Counted:
    """A setting that counts experts.

    Attributes:
        parts: the tensors that shrink with it, by their names in the model.
        fewer: the model with one expert less in each group, without weights.
    """

    key: Key
    count: int
    parts: Parts
    fewer: nn.Module


def _find_count(architecture: Architecture, settings: Mapping[Key, int], groups: int) -> _Counted:
    """Find the setting with which the most tensors shrink."""
    counting = []
    for key, count in settings.items():
        if "expert" in key[-1] and count >= MIN_EXPERTS and count > 2 * groups:
            counted = _try_setting(architecture, key, count, groups)
            if counted:
                counting.append(counted)
    if not counting:
        raise refusal(architecture, "no setting of its config counts experts that its blocks have")
    most = max(len(counted.parts) for counted in counting)
    largest = [counted for counted in counting if len(counted.parts) == most]
    if len(largest) > 1:
        names = ", ".join(".".join(counted.key) for counted in largest)
        raise refusal(architecture, f"several settings count its experts: {names}")
    return largest[0]


def _try_setting(architecture: Architecture, key: Key, count: int, groups: int) -> _Counted | None:
    """Build the model with one expert less in each group, and with two; see what shrinks."""
    try:
        fewer = build_with_setting(architecture, key, count - groups)
        still_fewer = build_with_setting(architecture, key, count - 2 * groups)
    except ModelError:
        return None
    state = architecture.skeleton.state_dict()
    parts = _shrinking_parts(state, fewer.state_dict(), groups)
    # Twice as many less must change the same tensors by twice as much.
    if not parts or parts != _shrinking_parts(state, still_fewer.state_dict(), 2 * groups):
        return None
    matrices = [name for name in parts if state[name].ndim > 1]
    return _Counted(key, count, parts, fewer) if len(matrices) > 2 else None


def _shrinking_parts(before: Tensors, after: Tensors, less: int) -> Parts | None:
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
        if len(axes) > 1 or any(size != 1 for size in old.shape[:axis]):
            return None
        width, rest = divmod(old.shape[axis] - new.shape[axis], less)
        if rest or width < 1 or old.shape[axis] % width:
            return None
        parts[name] = Part(axis, old.shape[axis] // width)
    return parts


def _find_active(settings: Mapping[Key, int], count_key: Key) -> int:
    """Return the number of experts per token: a setting beside the count, or else at the top."""
    for name in ACTIVE:
        for around in (count_key[:-1], ()):
            if (*around, name) in settings:
                return settings[*around, name]
    return 1


def _parts_in_blocks(architecture: Architecture, parts: Parts) -> tuple[tuple[int, ...], Parts]:
    """Return the blocks that have experts, and the parts by their names in a block."""
    blocks = set()
    by_name = {}
    for name, part in parts.items():
        block, inner = architecture.names.split(name)
        if block is None:
            raise refusal(architecture, "it has experts outside its blocks, too")
        blocks.add(block)
        by_name[inner] = part
    return tuple(sorted(blocks)), by_name


def _module_and_router(
    architecture: Architecture, parts: Parts, first_block: int, count: int
) -> tuple[str, Parts]:
    """Return the module that holds the experts' weights, and the parts outside it: the router."""
    state = architecture.skeleton.state_dict()
    block = f"{architecture.adapter.blocks_path}.{first_block}"
    holders = set()
    for name, part in parts.items():
        tensor = state.get(f"{block}.{name}")
        if tensor is None:
            raise refusal(architecture, "its blocks keep their experts in different ways")
        if tensor.ndim > 2 or tensor.shape[part.axis] > 2 * count:
            holders.add(name.rpartition(".")[0])
    if not holders:
        raise refusal(architecture, "none of its tensors holds weights of experts")
    module = min(holders)
    if len(holders) > 1:
        module = module.rpartition(".")[0]
    if any(module not in (holder, holder.rpartition(".")[0]) for holder in holders):
        kinds = ", ".join(sorted(holders))
        raise refusal(architecture, f"it has two kinds of experts: {kinds}")
    router = {name: part for name, part in parts.items() if not name.startswith(f"{module}.")}
    if not router:
        raise refusal(architecture, "it has no router")
    if any("." not in name for name in router):
        raise refusal(architecture, "its blocks hold tensors of their routers themselves")
    _require_no_expert_numbers(architecture, f"{block}.{module}".rpartition(".")[0])
    return module, router


def _require_no_expert_numbers(architecture: Architecture, around: str) -> None:
    """Refuse tensors of whole numbers beside the experts, which may be numbers of experts."""
    for name, tensor in architecture.skeleton.state_dict().items():
        if name.startswith(f"{around}.") and not tensor.is_floating_point() and tensor.numel() > 1:
            raise refusal(
                architecture, f"{name} may hold numbers of experts, as for routing by hash"
            )


def _parts_in_files(
    architecture: Architecture, fewer: nn.Module, less: int
) -> tuple[Parts, frozenset[str]]:
    """Return the parts and `numbered` of `Experts`, by names in files."""
    # transformers may write each expert apart.
    model = architecture.skeleton
    before = revert_weight_conversion(model, dict(model.state_dict()))
    after = revert_weight_conversion(fewer, dict(fewer.state_dict()))
    parts: Parts = {}
    numbered = set()
    for name, old in before.items():
        block, inner = architecture.names.split(name)
        new = after.get(name)
        if block is None or (new is not None and new.shape == old.shape):
            continue
        of_one_expert = re.match(r"(.*?\.)\d+\.", inner)
        if new is None and of_one_expert:
            # Of the last expert, but its name begins like all others'.
            numbered.add(of_one_expert[1])
            continue
        changed = _shrinking_parts({name: old}, after, less)
        if not changed:
            raise refusal(
                architecture, f"{name} is stored in a way that no part of it is one expert's"
            )
        parts[inner] = changed[name]
    return parts, frozenset(numbered)


def _with_siblings(architecture: Architecture, experts: Experts) -> Experts:
    """Add the scales and packed values that quantized files hold beside stacked weights."""
    stems = tuple(name.removesuffix(".weight") for name in experts.parts)
    parts = dict(experts.parts)
    blocks = set()
    for tensor in architecture.source.weights.stored:
        block, inner = architecture.names.split(tensor.name)
        is_stacked = tensor.shape[:1] == (experts.count,)
        if inner not in parts and is_stacked and inner.startswith(stems):
            parts[inner] = Part(0, experts.count)
        if inner in experts.router:
            continue
        if inner in parts or experts.numbered_in(inner):
            blocks.add(block)
    missing = sorted(set(experts.blocks) - blocks)
    if missing:
        raise refusal(
            architecture,
            f"its weight files hold no experts of block {missing[0]} under a known name",
        )
    return replace(experts, parts=parts)

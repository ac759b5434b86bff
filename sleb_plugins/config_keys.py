"""How config keys describe single blocks, as data.

A `KeyPruner` takes a key's value and the kept blocks, and returns the value for the pruned model's
config. A value that is not of the key's type is returned unchanged: transformers refuses it if the
model reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sleb_plugins.errors import UsageError


@dataclass(frozen=True)
class Kept:
    """The kept blocks, in order, by their numbers in the original, and the `count` of blocks in the
    original.
    """

    blocks: tuple[int, ...]
    count: int

    @cached_property
    def new_number(self) -> dict[int, int]:
        """The number of each kept block in the pruned model, by its number in the original."""
        return {old: new for new, old in enumerate(self.blocks)}

    def below(self, block: int) -> int:
        """Count the kept blocks among the first `block`."""
        return sum(number < block for number in self.blocks)


def kept_blocks(count: int, removals: Sequence[int]) -> Kept:
    """Return the kept blocks of a model of `count` blocks."""
    return Kept(tuple(block for block in range(count) if block not in removals), count)


def require_removable(
    removals: Sequence[int], count: int, model: str, *, further: str = ""
) -> None:
    """Check that these blocks can be removed from a model of `count`; `further` is added to a
    message on its size.

    Raises:
        UsageError: a block is named twice or does not exist, or no block would remain.
    """
    repeated = [block for block in removals if removals.count(block) > 1]
    if repeated:
        raise UsageError(f"Block {repeated[0]} is named twice.", hint="Name each block once.")
    absent = [block for block in removals if not 0 <= block < count]
    if absent:
        raise UsageError(
            f"There is no block {absent[0]}: {model} has {count} blocks, 0 to "
            f"{count - 1}{further}.",
            hint="Blocks are numbered from 0, as in the original model.",
        )
    if len(removals) == count:
        raise UsageError(f"All {count} blocks would be removed.", hint="Keep at least one.")


KeyPruner = Callable[[Any, Kept], Any]


def by_block(values: Any, kept: Kept) -> Any:
    """Prune a list with one value per block, or a text with one letter per block, such as
    Nemotron-H's "M-M*-".

    Values of another type or length are returned unchanged.
    """
    if not isinstance(values, list | tuple | str) or len(values) != kept.count:
        return values
    pruned = [values[block] for block in kept.blocks]
    return "".join(pruned) if isinstance(values, str) else pruned


def block_numbers(numbers: Any, kept: Kept) -> Any:
    """Renumber a list of block numbers, from 0, without the removed ones."""
    if not isinstance(numbers, list | tuple):
        return numbers
    return [kept.blocks.index(number) for number in numbers if number in kept.blocks]


def numbers_from_one(values: Any, kept: Kept) -> Any:
    """Renumber lists of block numbers, from 1, in a mapping with other settings (Kimi-Linear)."""
    if not isinstance(values, dict):
        return values
    renumbered = {}
    for key, value in values.items():
        is_list = key.endswith("_layers") and isinstance(value, list)
        if is_list and all(isinstance(number, int) for number in value):
            from_zero = block_numbers([number - 1 for number in value], kept)
            value = [number + 1 for number in from_zero]
        renumbered[key] = value
    return renumbered


def keyed_by_block(values: Any, kept: Kept) -> Any:
    """Renumber the keys of a mapping from some blocks, as numbers or text, to their settings."""
    if not isinstance(values, dict):
        return values
    new = {str(old): str(number) for old, number in kept.new_number.items()}
    return {new[str(key)]: value for key, value in values.items() if str(key) in new}


def leading_blocks(count: Any, kept: Kept) -> Any:
    """Prune a count of blocks at the start; a count beyond the last block is returned unchanged."""
    if not isinstance(count, int) or count > kept.count:
        return count
    return kept.below(count)


def trailing_blocks(count: Any, kept: Kept) -> Any:
    """Prune a count of blocks at the end."""
    if not isinstance(count, int):
        return count
    return len(kept.blocks) - kept.below(kept.count - count)


def last_block(number: Any, kept: Kept) -> Any:
    """Renumber the last block of a run, which may itself be removed; -1 means the last of all."""
    if not isinstance(number, int) or number < 0:
        return number
    return kept.below(number + 1) - 1


_PRUNED_BY: Mapping[KeyPruner, Sequence[str]] = {
    by_block: (
        "layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers",
        "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "layer_rope_theta",
        "activation_sparsity_pattern", "indexer_types", "block_configs", "ffn_multipliers",
        "hybrid_override_pattern",
    ),
    block_numbers: (
        "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices",
        "cross_attention_layers", "rope_scaling_layers", "ple_layer_ids", "local_layer_ids",
        "global_attention_blocks",
    ),
    leading_blocks: (
        "first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers",
        "moe_layer_start_index", "num_first_full_attention_layers",
    ),
    trailing_blocks: ("num_kv_shared_layers", "num_last_full_attention_layers"),
    last_block: ("moe_layer_end_index",),
    keyed_by_block: ("per_layer_config",),
    numbers_from_one: ("linear_attn_config",),
}  # fmt: skip

KEY_PRUNERS: Mapping[str, KeyPruner] = {
    key: pruner for pruner, keys in _PRUNED_BY.items() for key in keys
}
"""The keys of transformers' configs that describe single blocks; a family's own `config_keys` take
precedence.
"""

KINDS_BY_BLOCK = ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types")
"""Keys that list the kind of each block."""

REDUNDANT = ("max_window_layers",)
"""Keys that may be wrong, because `layer_types` overrides them."""

SLICED: Mapping[str, int] = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}
"""Suffixes of tensors outside the blocks that hold one slice per block, with the axis of the
slices.
"""


def sliced_axis(name: str) -> int | None:
    """Return the axis along which a tensor of this name holds one slice per block, or None."""
    return next((axis for ending, axis in SLICED.items() if name.endswith(ending)), None)


PERIOD_KEYS = (
    "full_attention_interval", "attn_layer_period", "expert_layer_period", "decoder_sparse_step",
    "interleave_moe_layer_step", "no_rope_layer_interval", "sliding_window_pattern",
    "global_attn_every_n_layers", "moe_layer_interval", "moe_layer_freq", "layer_group_size",
    "cross_attention_interval",
)  # fmt: skip
"""Keys that derive a block's kind from its number, in configs without a list of kinds."""

PREDICTION_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "n_predict")
"""Keys that count blocks for multi-token prediction, which checkpoints number after the last block.
"""

NOT_BY_BLOCK = (
    "_token_id", "_token_ids", "_tokens", "_section", "_limit", "_multipliers", "_group_size",
    "_sizes", "architectures",
)  # fmt: skip
"""Suffixes of keys whose lists never have one value per block, whatever their length."""


def means_blocks(key: str, value: Any, count: int) -> bool:
    """Whether an unknown key's value seems to have one value per block: a list of that length."""
    return (
        isinstance(value, list | tuple) and len(value) == count and not key.endswith(NOT_BY_BLOCK)
    )


OTHER_TEXT_KEYS = ("language_config", "llm_config")
"""Where config.json may have the language model's settings instead of where transformers has them.
"""

OBSTACLES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "scale_attn_by_inverse_layer_idx": (
        bool,
        "each block divides its attention scores by its number",
    ),
    "rescale_every": (bool, "the hidden states are halved at regular intervals of blocks"),
    "indexer_types": (
        lambda kinds: "shared" in kinds,
        "blocks pass the indices they attend to on to the next ones",
    ),
}
"""Keys whose values can make a block depend on its number or on another block, with a test and a
clause for that.
"""


LEADING_INPUTS: Mapping[str, str] = {
    "deepstack_visual_indexes": "features of images enter the first {count} blocks"
}
"""Keys, also of the vision config, with an item for each of the first blocks, which get an input;
with a clause.
"""

NUMBERED_PARTS: Mapping[str, int] = {"layer_idx": 2}
"""Endings of attributes that may number parts through all blocks, with the parts of a block, such
as two attentions.
"""


def explicit_experts(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Replace `decoder_sparse_step` (Qwen-MoE: every n-th has experts) by `mlp_only_layers`."""
    step = config["decoder_sparse_step"]
    dense = config["mlp_only_layers"] or []
    numbers = [new for new, old in enumerate(kept.blocks) if old in dense or (old + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": numbers}


def explicit_attention(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Replace GPT-Neo's runs of attention kinds with one run of the kept blocks' kinds."""
    return {"attention_types": [[by_block(config["attention_layers"], kept), 1]]}


def explicit_cycle(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Expand the cycle of kinds that RecurrentGemma repeats to the kept blocks' kinds."""
    cycle = config["block_types"]
    return {"block_types": [cycle[block % len(cycle)] for block in kept.blocks]}


def same_scale(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Keep MiniCPM's factor scale_depth / sqrt(blocks), which would grow with fewer blocks."""
    return {"scale_depth": config["scale_depth"] * (len(kept.blocks) / kept.count) ** 0.5}


KeyRewriter = Callable[[Mapping[str, Any], Kept], dict[str, Any]]

KEY_REWRITERS: Mapping[str, KeyRewriter] = {
    "decoder_sparse_step": explicit_experts,
    "attention_types": explicit_attention,
    "block_types": explicit_cycle,
    "scale_depth": same_scale,
}
"""Keys that must change together with others; each function returns the keys that it sets."""

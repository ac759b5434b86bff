"""What llama.cpp derives from a block's number or the number of blocks, as data (late 2026).

A GGUF file defines most of a block by tensors and by lists with one value per block. llama.cpp
derives the rest from the block's number: for example, every sixth block of Gemma 3 has full
attention. A removal renumbers the later blocks, so it is right only if no block gets a number at
which llama.cpp builds another kind of block. The blocks for multi-token prediction come last in the
file, and are not counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sleb_cli.engine.gguf.file import GgufFile
from sleb_plugins.errors import UnsupportedModelError


@dataclass(frozen=True)
class Period:
    """One block in each `period` is of another kind.

    Attributes:
        difference: how that block differs, as in "the last of every 4 blocks has no rotary
            positions".
        period: llama.cpp's default; 1 (all blocks are alike) if only the file sets it.
        key: the architecture's own key for the period; if it holds a list, numbers do not matter.
        position: which block of a period differs; "one" if unknown.
        only_with: an own key without which (or with 0) all blocks are alike.
        unless: an own key that lists the kinds of all blocks instead.
    """

    difference: str
    period: int = 1
    key: str = ""
    position: Literal["the last", "the first", "one"] = "the last"
    only_with: str = ""
    unless: str = ""

    def length_in(self, file: GgufFile) -> int:
        """Return the period in this file; 1 if all blocks are alike, or numbers do not matter."""
        length = file.setting(self.key)
        has_one_kind = self.only_with and not file.setting(self.only_with)
        if has_one_kind or isinstance(length, list) or file.setting(self.unless) is not None:
            return 1
        return self.period if length is None else file.count(self.key) or 1

    def kind(self, block: int, period: int) -> int:
        """Return a number that two blocks share if llama.cpp builds one kind of block for both."""
        position = block % period
        if self.position == "the first":
            return position == 0
        if self.position == "the last":
            return position == period - 1
        return position  # which one is special is unknown, so each must keep its position


_WINDOW = "attention.sliding_window"
_SPARSE = "interleave_moe_layer_step"


def _window(
    period: int, position: Literal["the last", "the first"] = "the last", only_with: str = ""
) -> Period:
    return Period(
        "has full attention instead of a window", period, f"{_WINDOW}_pattern", position, only_with
    )


_RECURRENT = Period(
    "has full attention", 4, "full_attention_interval", unless="attention.recurrent_layers"
)
_NO_ROPE = Period("has no rotary positions", 4)
_EXPERTS = Period("has experts", 1, _SPARSE)

PERIODS: Mapping[str, tuple[Period, ...]] = {
    **dict.fromkeys(("gemma2", "gpt-oss"), (_window(2),)),
    **dict.fromkeys(("cohere2", "exaone-moe", "muse-glimmer"), (_window(4),)),
    **dict.fromkeys(("mellum", "olmo2"), (_window(4, only_with=_WINDOW),)),
    **dict.fromkeys(("laguna", "smallthinker"), (_window(4, "the first", only_with=_WINDOW),)),
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), (_RECURRENT,)),
    "afmoe": (_window(4, only_with=_WINDOW), _NO_ROPE),
    "cohere2moe": (_window(4, "the first"),),
    "ernie4_5-moe": (_EXPERTS,),
    "gemma-embedding": (_window(6),),
    "gemma3": (_window(6, only_with=_WINDOW),),
    "llama4": (_window(4), _NO_ROPE, _EXPERTS),
    "modern-bert": (_window(3, "the first"),),
    "plamo3": (_window(8, only_with=_WINDOW),),
    "smollm3": (_NO_ROPE,),
}

_ANY_ARCHITECTURE = (
    Period("is of another kind", 1, f"{_WINDOW}_pattern", "one"),
    Period(
        "is of another kind",
        1,
        "full_attention_interval",
        "one",
        unless="attention.recurrent_layers",
    ),
    Period("is of another kind", 1, _SPARSE, "one"),
    Period("is of another kind", 1, "moe_every_n_layers", "one"),
)
"""The periods of architectures that are not in the table."""


def _deepseek2_form(file: GgufFile, blocks: int) -> str:
    vocabulary = file.setting("vocab_size") or len(file.get("tokenizer.ggml.tokens") or [])
    if blocks in (26, 27) or (blocks == 48 and vocabulary == 128256):
        return "without low-rank queries"
    gates = file.setting("expert_gating_func")
    if gates is None and blocks in (47, 48) and vocabulary == 154880:
        return "with other gates"
    return "the usual"


BY_COUNT: Mapping[str, Callable[[GgufFile, int], object]] = {
    "baichuan": lambda file, blocks: {32: "rotary positions", 40: "ALiBi"}.get(blocks),
    "command-r": lambda file, blocks: "normalised queries" if blocks >= 64 else "plain queries",
    "deepseek2": _deepseek2_form,
    "exaone4": lambda file, blocks: "windows" if blocks == 64 else "no windows",
    "gemma2": lambda file, blocks: "the 27B's scale" if blocks == 46 else "the usual scale",
    "gemma3": lambda file, blocks: "the 27B's scale" if blocks == 62 else "the usual scale",
    "minicpm": lambda file, blocks: file.setting("residual_scale") or f"a scale by {blocks} blocks",
    "minicpm3": lambda file, blocks: f"a scale by {blocks} blocks",
    "minimax-01": lambda file, blocks: f"slopes by {blocks} blocks",
}
"""The variant that llama.cpp infers from the number of blocks alone; a removal must not change it.
"""

_FIRST_STAYS = ("arwkv7", "rwkv7")

_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("dflash", "eagle3", "gemma4-assistant"),
        "it drafts for another model, whose blocks it names",
    ),
    **dict.fromkeys(("t5", "t5encoder"), "it has an encoder"),
    **dict.fromkeys(
        ("glm-dsa", "hy-v4"), "its blocks share what they attend to with blocks counted by number"
    ),
    "gemma3n": "its last blocks share the keys and values of block 18 and 19, by number",
    "graniteswitch": "its last block chooses the adapters of all others",
    "hrm_text": "it runs its blocks in stacks of a fixed size",
    "kimi-k3": "its residuals span groups of blocks of a fixed size",
    "nanbeige": "it runs its blocks several times",
    "qwen4exp": "additional inputs enter at blocks that it names",
}

_REFUSED_WITH: Mapping[str, str] = {
    "attention.shared_kv_layers": "its last blocks share the keys and values of earlier ones, by "
    "number",
    "decoder_block_count": "it has an encoder",
    "embedding_length_per_layer_input": "each of its blocks has a part in one table of inputs",
    "rescale_every_n_layers": "its weights are scaled by the number of their block",
}
"""Own keys that rule out any removal unless they are missing or 0."""

LEADING = ("leading_dense_block_count", "hash_layer_count")
"""Own keys that count blocks at the start, and fall with each one that is removed."""

LEADING_STAY = "n_deepstack_layers"
"""The own key that counts blocks at the start with an additional input each."""

NOT_PER_BLOCK = ("rope.dimension_sections", "classifier.output_labels", "target_layers")
"""Own keys whose lists never have one value per block, even if their length is the number of
blocks.
"""

PER_BLOCK_PREFIX = "xielu."
"""The prefix of keys that have lists with one value per block but do not start with the
architecture's name.
"""


_NAMES: Mapping[str, frozenset[str]] = {
    "cohere": frozenset({"command-r"}),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), frozenset({"deepseek2"})),
    "glm": frozenset({"chatglm"}),
    "gpt_bigcode": frozenset({"starcoder"}),
    "granitemoehybrid": frozenset({"granitehybrid"}),
    "mistral": frozenset({"llama", "mistral3"}),
    "mixtral": frozenset({"llama"}),
    "nemotron_h": frozenset({"nemotron_h", "nemotron_h_moe"}),
    "olmo3": frozenset({"olmo2"}),
    "phi": frozenset({"phi2"}),
    "qwen3_5": frozenset({"qwen35"}),
    "qwen3_5_moe": frozenset({"qwen35moe"}),
}
"""GGUF's names of a `model_type` of transformers, if they differ in more than spelling."""


def holds_model_type(architecture: str, model_type: str) -> bool | None:
    """Whether files of a GGUF architecture hold models of this `model_type`; None if unknown."""
    from gguf.constants import MODEL_ARCH_NAMES

    model_type = model_type.removesuffix("_text")
    if model_type in _NAMES:
        return architecture in _NAMES[model_type]
    if plain_name(model_type) == plain_name(architecture):
        return True
    return False if plain_name(model_type) in map(plain_name, MODEL_ARCH_NAMES.values()) else None


def plain_name(name: str) -> str:
    """Return one spelling for "gpt-oss" and "gpt_oss"."""
    return name.replace("-", "").replace("_", "")


def require_same_kinds(file: GgufFile, blocks: int, kept_blocks: tuple[int, ...]) -> None:
    """Refuse a removal after which llama.cpp would build a kept block differently."""
    architecture = file.architecture
    if architecture in _REFUSED:
        raise _refused(file, _REFUSED[architecture])
    for key, reason in _REFUSED_WITH.items():
        if file.setting(key):
            raise _refused(file, f"{reason} ({architecture}.{key})")
    if architecture in _FIRST_STAYS and kept_blocks[0] != 0:
        raise _refused(
            file, "the values of its block 0 are mixed into all later blocks", "Keep block 0."
        )
    for block in _blocks_with_other_inputs(file, blocks):
        if block not in kept_blocks:
            raise _refused(file, f"additional inputs enter block {block}", f"Keep block {block}.")
    after = len(kept_blocks)
    form = BY_COUNT.get(architecture)
    if form and form(file, blocks) != form(file, after):
        raise _refused(
            file,
            f"llama.cpp tells its variants apart by the number of blocks, and {after} selects "
            f"another than {blocks}",
        )
    _require_same_positions(file, kept_blocks)


def _require_same_positions(file: GgufFile, kept_blocks: tuple[int, ...]) -> None:
    """Refuse a removal after which a block of a period would be another than it was."""
    for rule in PERIODS.get(file.architecture, _ANY_ARCHITECTURE):
        period = rule.length_in(file)
        for new, old in enumerate(kept_blocks):
            if rule.kind(old, period) != rule.kind(new, period):
                raise _refused(
                    file,
                    f"in llama.cpp, {rule.position} of every {period} blocks {rule.difference}, "
                    f"and block {old} would become block {new}, which is of another kind",
                    f"Remove whole groups of {period} consecutive blocks, or write a checkpoint "
                    f"instead: `sleb apply -o FOLDER`.",
                )


def _blocks_with_other_inputs(file: GgufFile, blocks: int) -> list[int]:
    """Return the blocks that also get features of images (deepstack)."""
    fed = list(range(min(file.count(LEADING_STAY) or 0, blocks)))
    mapping = file.setting("deepstack_mapping")
    if isinstance(mapping, list):
        for block, entry in enumerate(mapping):
            if isinstance(entry, int) and entry >= 0:
                fed.append(block)
    return fed


def _refused(file: GgufFile, reason: str, hint: str | None = None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"These blocks cannot be removed from a GGUF file of the architecture {file.architecture}: "
        f"{reason}.",
        hint=hint or "Write a checkpoint instead: `sleb apply -o FOLDER`.",
    )

"""The model families that ship with `sleb`; blocks of all others are found by structure."""

from sleb_plugins.family import FamilyAdapter
from sleb_plugins.hookspecs import hookimpl

LLAMA = FamilyAdapter("llama", frozenset({"llama"}), blocks_path="model.layers")
OPT = FamilyAdapter("opt", frozenset({"opt"}), blocks_path="model.decoder.layers")

# Standalone decoders of encoder-decoder families, in which `num_hidden_layers` counts the encoder's
# blocks.
BART = FamilyAdapter(
    "bart",
    frozenset({
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
        "pegasus", "plbart", "trocr", "whisper",
    }),
    blocks_path="model.decoder.layers",
    count_key="decoder_layers",
)  # fmt: skip

LONGCAT = FamilyAdapter(
    "longcat", frozenset({"longcat_flash"}), blocks_path="model.layers", count_key="num_layers"
)
XLSTM = FamilyAdapter(
    "xlstm", frozenset({"xlstm"}), blocks_path="backbone.blocks", count_key="num_blocks"
)

_CACHE_DIFFERS = "transformers decodes it differently with a KV cache than without one"
_EARLIER_GROUPS = (
    "its blocks attend to what groups of earlier blocks made, and the groups are counted by number"
)

REFUSED = {
    "albert": "it runs one block many times, so there is none to remove",
    "cpmant": _CACHE_DIFFERS,
    "dory": "its middle blocks run several times, and which these are is counted from both ends",
    "dots3_note_text": _CACHE_DIFFERS,
    "funnel": "its blocks lie in groups, and the text gets shorter from one to the next",
    "granite4_vision": "features of images enter blocks that its config counts by number",
    "hrm_text": "its blocks form two stacks that run in turn, several times each",
    "inkling2_loop_text": _EARLIER_GROUPS,
    "inkling2_text": _EARLIER_GROUPS,
    "kolibri1_1": "its blocks read the keys and values of others, by number (kv_source_layers)",
    "lilt": "its blocks take and give two streams of hidden states: of a text, and of its layout",
    "moshi": _CACHE_DIFFERS,
    "paligemma": "it attends to its prompt in both directions, so a text has no loss token by "
    "token",
    "prophetnet": "transformers does not decode it with a KV cache",
    "reformer": "its blocks are reversible: each takes and gives two streams of hidden states",
    "squeezebert": "its blocks return dictionaries, not hidden states",
    "zaya": "the router of each block reads what the router of the block before it made",
}
"""Families from which no block can be removed, and why; most others of that sort are detected by
their structure.
"""


@hookimpl
def sleb_families() -> list[FamilyAdapter]:
    """Offer the families that ship with `sleb`, including those that cannot be pruned."""
    refused = [FamilyAdapter(name, frozenset({name}), refusal=why) for name, why in REFUSED.items()]
    return [LLAMA, OPT, BART, LONGCAT, XLSTM, *refused]

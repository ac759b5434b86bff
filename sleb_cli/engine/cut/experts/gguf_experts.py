"""The cut of experts of a GGUF file: its count, and the outermost slices of tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sleb_cli.engine.cut.experts.expert_cut import (
    PREDICTION_NOTE,
    ExpertCut,
    ExpertRemoval,
    Removed,
    plan_experts,
    require_removable,
)
from sleb_cli.engine.cut.protocol import GgufCut
from sleb_cli.engine.gguf.blocks import BLOCK, stored_block_count
from sleb_cli.engine.gguf.file import GgufFile, GgufTensor
from sleb_cli.engine.gguf.removed_parts import REMOVED_BLOCKS, remaining, with_removals
from sleb_cli.engine.model.architecture import Architecture
from sleb_plugins import PlanError, UnsupportedModelError

REMOVED_EXPERTS = "sleb.removed_experts."
"""Before the number of a block: the key that records the experts that it lost, in order."""
_BY_EXPERT = re.compile(
    r"\.(ffn_(gate|up|down|gate_up)_exps(\.\w+)?|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?)"
)
"""Tensors with a part of each expert; their shape is checked, too."""
_MAYBE = re.compile(r"\.(ffn_gate_inp\.\w+|ffn_norm_exps\.\w+)|.*shexp.*")
"""Tensors that may have as many values as there are experts, but belong to none of them."""
_REFUSED = {
    "ffn_gate_tid2eid": "its routers choose experts by the numbers of tokens",
    "_chexps": "its experts share parts of one another",
}
_SPECIAL_COUNTS = {
    ("llama4", 128): "llama.cpp computes attention otherwise for 128 experts than for fewer"
}


@dataclass(frozen=True)
class GgufExpertCut(ExpertRemoval, GgufCut):
    """The cut of experts from a GGUF file.

    Attributes:
        predicts: whether the file also has experts for multi-token prediction.
    """

    predicts: bool = False

    @property
    def note(self) -> str | None:
        """A note on blocks for multi-token prediction."""
        return PREDICTION_NOTE if self.predicts else None

    def for_model(self, architecture: Architecture) -> ExpertCut:
        """Return the cut of these experts from the model that transformers reads in the file."""
        return plan_experts(architecture, self.removed)

    def header(self, file: GgufFile) -> GgufFile:
        """Return the header of the file with the experts that stay."""
        tensors = []
        for tensor in file.tensors:
            block = _block_with_experts(tensor, self.count)
            tensors.append(tensor if block is None else tensor.only(self.kept_experts(block)))
        cut = file.with_count("expert_count", self.count - self.fewer)
        cut = replace(cut, tensors=tuple(tensors))
        _, numbers = remaining(file, REMOVED_BLOCKS, stored_block_count(file))
        for block, removed in self.removed.items():
            cut = with_removals(cut, f"{REMOVED_EXPERTS}{numbers[block]}", self.count, removed)
        return cut


def plan_gguf_experts(file: GgufFile, removed: Removed) -> GgufExpertCut:
    """Plan the removal of these experts.

    It is checked against the file, and against how llama.cpp loads the result.
    """
    count = file.count("expert_count") or 0
    why = _SPECIAL_COUNTS.get((file.architecture, count))
    blocks = set()
    for tensor in file.tensors:
        for words, reason in _REFUSED.items():
            if words in tensor.name:
                why = why or reason
        block = _block_with_experts(tensor, count)
        if block is not None:
            blocks.add(block)
        elif "_exps." in tensor.name and not _MAYBE.search(tensor.name):
            why = why or f"sleb does not know what {tensor.name} holds"
    if why:
        raise UnsupportedModelError(
            f"No expert can be removed from {file.path}, because {why}.", hint="Remove blocks."
        )
    known = blocks & {*removed}
    if {*removed} != known or any(block < max(removed, default=0) for block in blocks - known):
        raise PlanError(
            f"{file.path} has {count} experts in each of {len(blocks)} blocks, which are not those "
            f"of the plan.",
            hint="Name a GGUF file of the plan's model.",
        )
    active = file.count("expert_used_count") or 1
    groups = file.count("expert_group_count") or 1
    require_removable(removed, count, active, groups, str(file.path))
    return GgufExpertCut(count, removed, predicts=bool(blocks - known))


def _block_with_experts(tensor: GgufTensor, count: int) -> int | None:
    match = BLOCK.fullmatch(tensor.name)
    if match and _BY_EXPERT.fullmatch(match[2]) and tensor.shape[-1:] == (count,):
        return int(match[1])
    return None

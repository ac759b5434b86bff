"""The kinds of cuts besides blocks, by the option or the plan's field that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sleb_cli.engine.cut.experts.active import plan_active, plan_gguf_active
from sleb_cli.engine.cut.experts.expert_cut import plan_experts
from sleb_cli.engine.cut.experts.gguf_experts import plan_gguf_experts
from sleb_cli.engine.cut.protocol import Cut, GgufCut
from sleb_cli.engine.cut.tokens.gguf_tokens import plan_gguf_tokens
from sleb_cli.engine.cut.tokens.token_cut import plan_tokens
from sleb_cli.engine.gguf.file import GgufFile
from sleb_cli.engine.model.architecture import Architecture


class CutKind(NamedTuple):
    """How the option's value becomes a cut of a checkpoint, and of a GGUF file.

    `gguf_count` is the key of a GGUF file that counts such parts of a block, if there is one.
    """

    plan: Callable[[Architecture, Any], Cut]
    plan_gguf: Callable[[GgufFile, Any], GgufCut]
    gguf_count: str | None = None


CUTS: Mapping[str, CutKind] = {
    "experts": CutKind(plan_experts, plan_gguf_experts, "expert_count"),
    "experts_per_token": CutKind(plan_active, plan_gguf_active),
    "scripts": CutKind(plan_tokens, plan_gguf_tokens),
}

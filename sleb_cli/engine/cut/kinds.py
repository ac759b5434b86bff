"""The cuts besides that of blocks, by the option of `sleb apply` that asks for them: here alone are they registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sleb_cli.engine.cut.protocol import Cut, GgufCut
from sleb_cli.engine.cut.tokens.gguf_tokens import plan_gguf_tokens
from sleb_cli.engine.cut.tokens.token_cut import plan_tokens
from sleb_cli.engine.gguf.file import GgufFile
from sleb_cli.engine.model.architecture import Architecture


class Kind(NamedTuple):
    """How a kind of cut is planned from the option's value, for a checkpoint and for a GGUF file."""

    plan: Callable[[Architecture, Any], Cut]
    plan_gguf: Callable[[GgufFile, Any], GgufCut]


KINDS: Mapping[str, Kind] = {"scripts": Kind(plan_tokens, plan_gguf_tokens)}

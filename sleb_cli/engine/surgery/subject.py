"""A model and the blocks to remove from it, and the checks that a plan was made for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sleb_cli.engine.model.architecture import Architecture, untrusted_code
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.order import BLOCKS, PER_TOKEN, Order
from sleb_cli.plan import Plan
from sleb_cli.records import ModelRecord, differences, same_fingerprint
from sleb_plugins import PlanError


@dataclass(frozen=True)
class Subject:
    """A model, the surgery on it (of no block for a model alone), and its plan and file, if any.

    `other` has other weights than the dense model, and is measured in place of a pruned one: the
    checkpoint of a plan, recovered or trained since, or, without a plan, any model to compare.
    """

    surgery: Surgery
    plan: Plan | None
    file: Path | None = None
    other: Architecture | None = None

    @property
    def architecture(self) -> Architecture:
        """The model."""
        return self.surgery.architecture

    @property
    def checkpoint(self) -> Architecture | None:
        """The checkpoint that holds the plan, if its weights are not the dense model's."""
        return self.other if self.plan else None

    @property
    def compared(self) -> Architecture | None:
        """The other model, if any two are compared."""
        return None if self.plan else self.other

    @property
    def pair(self) -> tuple[Architecture, Architecture]:
        """The dense and the other model of a comparison."""
        assert self.compared
        return self.architecture, self.compared

    @property
    def order(self) -> Order:
        """What goes at each size: of the plan, or of the model if only that was named."""
        if self.plan:
            return self.plan.order
        removals = self.surgery.removals
        per_token = self.surgery.other_cuts.get("experts_per_token")
        if per_token:
            return Order(PER_TOKEN, per_token + len(self.surgery.size_key))
        sizes = tuple(removals[:size] for size in range(1, len(removals) + 1))
        return Order(BLOCKS, self.architecture.block_count, sizes)

    @property
    def own_plan(self) -> Plan | None:
        """The plan, if its numbers were measured on this very model."""
        measured = self.architecture.record.fingerprint
        if self.plan and same_fingerprint(self.plan.model.fingerprint, measured):
            return self.plan
        return None


def require_same_code(path: Path, plan: Plan, source: ModelSource) -> None:
    """Check that a model's own Python code is the plan's, which grants trust to nothing else."""
    planned = plan.made_for.code
    current = source.code
    if planned == current:
        return
    if not source.trust_remote_code and "auto_map" in source.raw_config:
        raise untrusted_code(source)
    hashes = ""
    if current and planned:
        hashes = f" (SHA-256 {current[:12]}, not {planned[:12]})"
    raise PlanError(
        f"The Python code of {source.id} has changed since {path} was made{hashes}.",
        hint="Restore that code, or search again.",
    )


def require_same_model(path: Path, plan: Plan, architecture: Architecture) -> None:
    """Check that a plan was made for this model, wherever the model is stored now."""
    planned = plan.made_for
    named = architecture.record
    by_fingerprint = not same_fingerprint(planned.fingerprint, named.fingerprint)
    identity = partial(_identity, by_fingerprint=by_fingerprint)
    differing = differences(identity(named), identity(planned))
    if differing:
        raise PlanError(
            f"{path} was made for {planned.id}, but {named.id} is a different model ({differing}).",
            hint="Name the plan's model with --model, or use the plan on this one with "
            "--any-model.",
        )


def _identity(model: ModelRecord, *, by_fingerprint: bool) -> dict[str, Any]:
    identity: dict[str, Any] = {"model_type": model.model_type, "blocks": model.blocks}
    if by_fingerprint:
        parts = model.fingerprint.split("-")
        identity["fingerprint"] = "-".join(piece[:12] for piece in parts)
    return identity

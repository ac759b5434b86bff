"""What `apply`, `eval`, `bench` and `export` work on: a plan or a model, and the blocks to remove."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import DEMO, locate_model
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.events import Notify
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import ModelRecord, differences
from sleb_cli.requests import DEFAULT_PLAN, SubjectRequest
from sleb_plugins import PlanError, UsageError


@dataclass(frozen=True)
class Subject:
    """A model, the surgery on it (of no block if only the model was named), and the plan, if any."""

    surgery: Surgery
    plan: Plan | None

    @property
    def architecture(self) -> Architecture:
        """The model."""
        return self.surgery.architecture


def resolve_subject(
    request: SubjectRequest, registry: Registry, notify: Notify, *, needs_removals: bool = False
) -> Subject:
    """Read the plan, find its model, and check that the plan was made for it.

    Raises:
        PlanError: the plan is unreadable, or was made for another model.
        UsageError: the blocks or their number do not fit, or none are given although some are needed.
    """
    quiet_libraries()
    named = request.subject or str(DEFAULT_PLAN)
    if is_plan(named):
        return _from_plan(Path(named), request, registry, notify)
    if request.model is not None:
        raise UsageError(f"--model applies to a plan, and {named} is a model.", hint="Leave out --model.")
    if request.blocks is None and (needs_removals or request.remove is not None):
        raise UsageError(f"No blocks given for {named}.", hint="Name a plan, or use --blocks 5,4,9.")
    removals = first_removals(request.blocks or (), request.remove, "--blocks")
    architecture = _architecture(named, request.revision, request, registry, notify)
    return Subject(plan_surgery(architecture, removals), None)


def is_plan(named: str) -> bool:
    """Whether the user named a plan rather than a model, by the name or by the file there."""
    path = Path(named)
    return path.suffix == ".json" or (path.is_file() and path.suffix != ".gguf")


def _from_plan(path: Path, request: SubjectRequest, registry: Registry, notify: Notify) -> Subject:
    if request.blocks is not None:
        raise UsageError(
            f"--blocks applies to a model, and {path} is a plan with its own blocks.", hint="Leave out --blocks."
        )
    plan = read_plan(path)
    plan = first_of_plan(plan, request.remove, path)
    if request.model is None:
        _require_located(path, plan.model)
    revision = request.revision or (plan.model.revision if request.model is None else None)
    architecture = _architecture(request.model or plan.model.id, revision, request, registry, notify)
    if not request.any_model:
        require_same_model(path, plan, architecture)
    return Subject(plan_surgery(architecture, plan.removals), plan)


def _require_located(path: Path, model: ModelRecord) -> None:
    """Make sure that a plan from a checkpoint, which has only the name of a local model, does not lead to the Hub.

    Raises:
        PlanError: there is no such folder or file here.
    """
    if model.revision is None and model.id != DEMO and not Path(model.id).is_absolute() and not Path(model.id).exists():
        raise PlanError(
            f"{path} was made for {model.id}, and does not say where that is.", hint="Name its folder with --model."
        )


def _architecture(
    model: str, revision: str | None, request: SubjectRequest, registry: Registry, notify: Notify
) -> Architecture:
    source = locate_model(model, notify, revision=revision, trust_remote_code=request.trust_remote_code)
    return read_architecture(source, registry, notify)


def first_removals(removals: tuple[int, ...], count: int | None, where: str) -> tuple[int, ...]:
    """Return the first `count` removals of `where`; all of them by default.

    Raises:
        UsageError: `where` has fewer.
    """
    if count is None:
        return removals
    if not 1 <= count <= len(removals):
        raise UsageError(
            f"Cannot remove {count} blocks: {where} names {len(removals)}.",
            hint=f"Use --remove 1 to {len(removals)}.",
        )
    return removals[:count]


def first_of_plan(plan: Plan, count: int | None, path: Path) -> Plan:
    """Return the plan for `count` removals; all of it by default. Raises like `first_removals`."""
    return plan.first(len(first_removals(plan.removals, count, str(path))))


def require_same_model(path: Path, plan: Plan, architecture: Architecture) -> None:
    """Check that a plan was made for this model, wherever the model is stored now.

    Raises:
        PlanError: it was made for another model; the message names the differences.
    """
    planned, found = plan.model, architecture.record
    if differing := differences(_identity(found), _identity(planned)):
        raise PlanError(
            f"{path} was made for {planned.id}, and {found.id} is a different model ({differing}).",
            hint="Name the plan's model with --model, or use the plan on this one with --any-model.",
        )


def _identity(model: ModelRecord) -> dict[str, Any]:
    """Return what identifies a model, wherever it is stored."""
    return {"model_type": model.model_type, "blocks": model.blocks, "fingerprint": model.fingerprint[:12]}

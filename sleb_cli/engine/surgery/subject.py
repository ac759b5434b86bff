"""What `apply`, `eval`, `bench` and `export` work on: a plan or a model, and the blocks that go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.events import Notify
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.records import ModelRecord, differences
from sleb_plugins import PlanError, UsageError

DEFAULT_PLAN = "plan.json"


@dataclass(frozen=True)
class SubjectRequest:
    """What the user named. `remove` takes only the first removals; `model` says where the plan's model is now."""

    named: str | None
    blocks: tuple[int, ...] | None = None
    remove: int | None = None
    model: str | None = None
    any_model: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Subject:
    """A model, the surgery on it (of no block where only the model was named), and the plan behind it."""

    surgery: Surgery
    plan: Plan | None

    @property
    def architecture(self) -> Architecture:
        """The model."""
        return self.surgery.architecture


def resolve_subject(
    request: SubjectRequest, registry: Registry, notify: Notify, *, needs_removals: bool = False
) -> Subject:
    """Read the plan, find its model, and check that the two belong together.

    Raises:
        PlanError: the plan is unreadable, or was made for another model.
        UsageError: the blocks or their number do not fit, or there are none where some are needed.
    """
    quiet_libraries()
    named = request.named or DEFAULT_PLAN
    if is_plan(named):
        return _from_plan(Path(named), request, registry, notify)
    if request.model is not None:
        raise UsageError("--model goes with a plan; here MODEL is named already.", hint="Leave out --model.")
    if request.blocks is None and (needs_removals or request.remove is not None):
        raise UsageError(f"Which blocks of {named} are to go?", hint="Name a plan, or give --blocks 5,4,9.")
    removals = first_removals(request.blocks or (), request.remove, "--blocks")
    architecture = _architecture(named, request.revision, request, registry, notify)
    return Subject(plan_surgery(architecture, removals), None)


def is_plan(named: str) -> bool:
    """Whether what the user named is a plan and not a model, by its name or by what lies there."""
    path = Path(named)
    return path.suffix == ".json" or (path.is_file() and path.suffix != ".gguf")


def _from_plan(path: Path, request: SubjectRequest, registry: Registry, notify: Notify) -> Subject:
    if request.blocks is not None:
        raise UsageError("--blocks goes with a model; a plan names its own blocks.", hint="Give one of the two.")
    plan = read_plan(path)
    plan = first_of_plan(plan, request.remove, path)
    revision = request.revision or (plan.model.revision if request.model is None else None)
    architecture = _architecture(request.model or plan.model.id, revision, request, registry, notify)
    if not request.any_model:
        require_same_model(path, plan, architecture)
    return Subject(plan_surgery(architecture, plan.removals), plan)


def _architecture(
    model: str, revision: str | None, request: SubjectRequest, registry: Registry, notify: Notify
) -> Architecture:
    source = locate_model(model, notify, revision=revision, trust_remote_code=request.trust_remote_code)
    return read_architecture(source, registry, notify)


def first_removals(removals: tuple[int, ...], count: int | None, where: str) -> tuple[int, ...]:
    """Give the first `count` removals of `where`, or all of them.

    Raises:
        UsageError: there are not so many.
    """
    if count is None:
        return removals
    if not 1 <= count <= len(removals):
        raise UsageError(
            f"--remove {count} is not possible: {where} names {len(removals)} removals.",
            hint=f"Take 1 to {len(removals)}.",
        )
    return removals[:count]


def first_of_plan(plan: Plan, count: int | None, path: Path) -> Plan:
    """Give the plan for `count` removals, or all of it; raises as `first_removals` does."""
    return plan.first(len(first_removals(plan.removals, count, str(path))))


def require_same_model(path: Path, plan: Plan, architecture: Architecture) -> None:
    """Make sure that a plan was made for this model, wherever it is now.

    Raises:
        PlanError: it was made for another one; the sentence names the differences.
    """
    planned, found = plan.model, architecture.record
    if differing := differences(_identity(found), _identity(planned)):
        raise PlanError(
            f"{path} was made for {planned.id}, and {found.id} is another model ({differing}).",
            hint="Name the plan's model with --model, or use the plan on this one with --any-model.",
        )


def _identity(model: ModelRecord) -> dict[str, Any]:
    """Give what makes it the same model, wherever it lies."""
    return {"model_type": model.model_type, "blocks": model.blocks, "fingerprint": model.fingerprint[:12]}

"""What `apply`, `eval`, `bench` and `export` work on: a plan or a model, and the blocks to remove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.source import DEMO, ModelSource, locate_model
from sleb_cli.engine.surgery.loading import quiet_libraries
from sleb_cli.engine.surgery.subject import Subject, require_same_code, require_same_model
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.events import Notify
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import DEFAULT_PLAN, OneSizeRequest, SizesRequest
from sleb_cli.units import plural
from sleb_plugins import PlanError, UsageError
from sleb_plugins.errors import did_you_mean


def sizes(subject: Subject, request: SizesRequest) -> tuple[Surgery, ...]:
    """Return the surgery for each size to be measured, the fewest removals first; none if no block is removed.

    Raises:
        UsageError: there is no such size.
    """
    most, every = len(subject.surgery.removals), request.every
    hint = "Use --every 2, or --remove 2,4,6."
    if every is not None and request.remove:
        raise UsageError(f"--every {every} cannot be combined with --remove.", hint=hint)
    if every is not None and not most:
        raise UsageError(f"--every {every} needs a plan or --blocks.", hint=hint)
    if not most:
        return ()
    counts = set(request.remove) or {most, *range(every or most, most, every or most)}
    if subject.recovered and counts != {most}:
        raise _has_one_size(subject.recovered.source, most)
    if min(counts) < 1:
        raise UsageError(f"Cannot remove {min(counts)} blocks.", hint=f"Use --remove 1 to {most}.")
    by_size = subject.plan.by_size if subject.plan else [subject.surgery.removals[:size] for size in range(1, most + 1)]
    return tuple(plan_surgery(subject.architecture, by_size[count - 1]) for count in sorted(counts))


def resolve_subject(
    request: OneSizeRequest | SizesRequest,
    registry: Registry,
    notify: Notify,
    *,
    plan: Plan | None = None,
    needs_removals: bool = False,
    others: Mapping[str, Any] | None = None,
) -> Subject:
    """Read the plan (unless it is given), find its model, and check that the plan was made for it.

    What goes besides blocks is in `others`, as `plan_surgery` takes it.

    Raises:
        PlanError: the plan is unreadable, or was made for another model.
        UsageError: the blocks or their number do not fit, or none are given although some are needed.
    """
    quiet_libraries()
    model, revision, removals = request.subject or str(DEFAULT_PLAN), request.revision, request.blocks
    path = Path(model)
    if plan is None and is_plan(model):
        plan = read_named_plan(path, request)
    if plan:
        removals = plan.removals
        model, revision = place_of_model(path, plan, request.model, revision)
    elif request.model is not None:
        raise UsageError(f"--model applies to a plan, but {model} is a model.", hint="Leave out --model.")
    elif removals is not None:
        removals = first_removals(removals, _most(request), "--blocks")
    elif (needs_removals and not others) or _most(request) is not None:
        hint = "Name a plan, or use --blocks 5,4,9."
        if path.exists():
            raise UsageError(f"No blocks given for {model}.", hint=hint)
        plans = [file.name for file in path.parent.glob("*.json")]
        hint = did_you_mean(path.name, plans, otherwise=hint)
        raise UsageError(f"There is no plan {model}, and no blocks are given.", hint=hint)
    source = locate_model(model, notify, revision=revision, trust_remote_code=request.trust_remote_code)
    if plan and not request.any_model:
        require_same_code(path, plan, source)  # before any of it runs
    architecture = read_architecture(source, registry, notify)
    if plan and not request.any_model:
        require_same_model(path, plan, architecture)
    return Subject(plan_surgery(architecture, removals or (), others), plan, path if plan else None)


def place_of_model(path: Path, plan: Plan, named: str | None, revision: str | None) -> tuple[str, str | None]:
    """Return the model of a plan, and its revision, unless the user named another place or revision.

    Raises:
        PlanError: the plan does not say where it is.
    """
    of = plan.model
    if named is not None:
        return named, revision
    # A plan from a checkpoint, which has only the name of a local model, must not lead to the Hub.
    if of.revision is None and of.id != DEMO and not Path(of.id).is_absolute() and not Path(of.id).exists():
        raise PlanError(
            f"{path} was made for {of.id}, and does not say where that is.", hint="Name its folder with --model."
        )
    return of.id, revision or (None if Path(of.id).exists() else of.revision)


def with_recovered(subject: Subject, registry: Registry, notify: Notify) -> Subject:
    """Add the checkpoint around the plan, if its blocks were recovered: it is the pruned model, and not the removals.

    Raises:
        ModelError: the checkpoint is not whole.
        UsageError: another size is asked for.
    """
    plan, file = subject.plan, subject.file
    if plan is None or plan.recovery is None or file is None or file.name != CHECKPOINT_PLAN:
        return subject
    trusts_code = subject.architecture.source.trust_remote_code
    checkpoint = locate_model(str(file.absolute().parent), notify, trust_remote_code=trusts_code)
    if (most := len(read_plan(file).removals)) != len(plan.removals):
        raise _has_one_size(checkpoint, most)
    recovered = read_architecture(checkpoint, registry, notify)
    if recovered.text_config.vocab_size != subject.architecture.text_config.vocab_size:
        raise PlanError(
            f"{checkpoint.id} has another vocabulary than {subject.architecture.source.id}, so their tokens cannot be "
            "compared.",
            hint=f"Measure each by itself: sleb eval {checkpoint.id}.",
        )
    return replace(subject, recovered=recovered)


def _has_one_size(checkpoint: ModelSource, most: int) -> UsageError:
    return UsageError(
        f"{checkpoint.id} was recovered without {plural(most, 'block')}, and has no other size.",
        hint="Leave out --remove and --every, or name the plan of the search.",
    )


def is_plan(named: str) -> bool:
    """Whether the user named a plan rather than a model, by the name or by the file there."""
    path = Path(named)
    return path.suffix == ".json" or (path.is_file() and path.suffix != ".gguf")


def _most(request: OneSizeRequest | SizesRequest) -> int | None:
    """Return the number of removals of the smallest requested model; None for all."""
    return max(request.remove, default=None) if isinstance(request, SizesRequest) else request.remove


def read_named_plan(path: Path, request: OneSizeRequest | SizesRequest) -> Plan:
    """Read the plan that the user named, for the requested number of removals.

    Raises:
        PlanError: the plan is unreadable.
        UsageError: it has fewer removals, or other blocks were named, too.
    """
    if request.blocks is not None:
        raise UsageError(
            f"--blocks applies to a model, but {path} is a plan with its own blocks.", hint="Leave out --blocks."
        )
    plan = read_plan(path)
    return plan.first(len(first_removals(plan.removals, _most(request), str(path))))


def first_removals(removals: tuple[int, ...], count: int | None, where: str) -> tuple[int, ...]:
    """Return the first `count` removals of `where`; all of them by default.

    Raises:
        UsageError: `where` has fewer.
    """
    if count is None:
        return removals
    if not 1 <= count <= len(removals):
        raise UsageError(
            f"Cannot remove {count} blocks: {where} names {len(removals)}.", hint=f"Use --remove 1 to {len(removals)}."
        )
    return removals[:count]

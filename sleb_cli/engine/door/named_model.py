"""Resolve a named model or plan: to an architecture, and the surgeries to perform on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sleb_cli.checks.subjects import NamedSubject
from sleb_cli.engine.model.architecture import Architecture, read_architecture
from sleb_cli.engine.model.source import ModelSource, locate_checkpoint
from sleb_cli.engine.surgery.subject import Subject, require_same_code, require_same_model
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.engine.third_party import quiet_libraries
from sleb_cli.events import Notify
from sleb_cli.plan import Plan, read_plan
from sleb_cli.plugin_manager import Registry
from sleb_plugins import PlanError, UsageError


def needs_language_head(what: str, architecture: Architecture) -> str:
    """Say why an option or a format does not apply to a model that only reads."""
    return f"{what} needs a language head, and {architecture.source.id} only reads."


def plan_surgeries(subject: Subject, sizes: Sequence[int]) -> tuple[Surgery, ...]:
    """Plan the surgery for each size to be measured."""
    most = len(subject.surgery.size_key)
    if subject.compared:
        return ()
    if subject.plan and subject.checkpoint and tuple(sizes) != (most,):
        raise _has_one_size(subject.checkpoint.source, subject.plan, most)
    if not subject.plan and subject.surgery.other_cuts:
        return (subject.surgery,)
    order = subject.order
    return tuple(plan_surgery(subject.architecture, *order.by_size(size)) for size in sizes)


def resolve_subject(
    named: NamedSubject, source: ModelSource, registry: Registry, notify: Notify
) -> Subject:
    """Read the model, and plan its surgery."""
    surgery = plan_surgery(
        read_model(named, source, registry, notify), named.removals, named.other_cuts
    )
    return Subject(surgery, named.plan, named.file)


def read_model(
    named: NamedSubject, source: ModelSource, registry: Registry, notify: Notify
) -> Architecture:
    """Read the model, and check that the plan was made for it."""
    quiet_libraries()
    if named.plan is None or named.file is None or named.any_model:
        return read_architecture(source, registry, notify)
    require_same_code(named.file, named.plan, source)  # before any of it runs
    architecture = read_architecture(source, registry, notify)
    require_same_model(named.file, named.plan, architecture)
    return architecture


def with_checkpoint(subject: Subject, registry: Registry, notify: Notify) -> Subject:
    """Add the checkpoint that holds the plan, unless its weights are the dense model's."""
    plan = subject.plan
    file = subject.file
    if plan is None or file is None:
        return subject
    checkpoint = locate_checkpoint(file, plan)
    if checkpoint is None:
        return subject
    if plan.recovery is None and checkpoint.fingerprint == plan.checkpoint:
        return subject
    if (count := len(read_plan(file).largest)) != len(plan.largest):
        raise _has_one_size(checkpoint, plan, count)
    architecture = read_architecture(checkpoint, registry, notify)
    if architecture.text_config.vocab_size != subject.architecture.text_config.vocab_size:
        raise PlanError(
            f"{checkpoint.id} has another vocabulary than {subject.architecture.source.id}, so "
            "their tokens cannot be compared.",
            hint=f"Measure each by itself: sleb eval {checkpoint.id}.",
        )
    return replace(subject, other=architecture)


def _has_one_size(checkpoint: ModelSource, plan: Plan, size: int) -> UsageError:
    return UsageError(
        f"{checkpoint.id} has weights of its own, without {plan.order.amount(size)}, and has no "
        "other size.",
        hint="Leave out --remove and --every, or name the plan of the search.",
    )

"""The subject of `apply`, `eval`, `bench` and `export`: a plan, or a model and its blocks."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path
from typing import Any

from sleb_cli.checks.clashes import given
from sleb_cli.plan import Plan, no_plan, read_plan
from sleb_cli.requests import (
    DEFAULT_PLAN,
    EvalRequest,
    OneSizeRequest,
    SearchRequest,
    SizesRequest,
    SubjectRequest,
    Unit,
)
from sleb_cli.results import EvalResult
from sleb_cli.units import in_shell
from sleb_plugins import PlanError, SlebError, UsageError

_FOR_BLOCKS = "recover device_map"
"""Options that do not suit experts: gaps between blocks are refitted, and accelerate replaces
routers as they run.
"""


@dataclass(frozen=True)
class NamedSubject:
    """A model, and the blocks to remove from it.

    Attributes:
        request: names it, with the revision of the plan's model if it has no other.
        model: the model that was named, or the plan's.
        removals: the blocks to remove; none if only a model was named.
        sizes: how many of them, for each pruned model to be measured, in ascending order.
        plan: the plan that names them, cut to this number.
        file: the file of the plan, or of the comparison.
        any_model: whether the model may be another than the plan was made for.
        other: the model that is compared with this one.
        comparison: what was measured of two models, if `file` is such a result.
        gguf: the GGUF file that is cut, instead of making a checkpoint of the model.
    """

    request: SubjectRequest | SearchRequest
    model: str
    removals: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    plan: Plan | None = None
    file: Path | None = None
    any_model: bool = False
    other: str | None = None
    comparison: EvalResult | None = None
    gguf: Path | None = None

    @property
    def other_cuts(self) -> dict[str, Any]:
        """What goes besides blocks, by the names of `CUTS`."""
        cuts: dict[str, Any] = {}
        if self.plan:
            _, cuts = self.plan.order.by_size(len(self.plan.largest))
        for option in ("experts_per_token", "scripts"):
            value = getattr(self.request, option, None)
            if value:
                cuts[option] = value
        return cuts


def read_subject(
    request: OneSizeRequest | SizesRequest, *, needs_removals: bool = False
) -> NamedSubject:
    """Read the plan, or the blocks of a model.

    Raises:
        PlanError: the plan is missing or unreadable, or does not say where its model is.
        UsageError: the blocks or their number do not fit, or none are given although some are
            needed.
    """
    model = fspath(request.subject or DEFAULT_PLAN)
    path = Path(model)
    if is_plan(path):
        plan = read_named_plan(path, request)
        _require_applicable(request, path, plan)
        model, revision = locate_planned_model(path, plan, request.model, request.revision)
        return NamedSubject(
            replace(request, revision=revision),
            model,
            plan.removals,
            _sizes(request, len(plan.largest), plan),
            plan=plan,
            file=path,
            any_model=request.any_model,
        )
    if request.model is not None:
        raise UsageError(
            f"--model applies to a plan, but {model} is a model.", hint="Leave out --model."
        )
    removals: tuple[int, ...] = ()
    if request.blocks is not None:
        removals = first_removals(request.blocks, _max_removals(request), "--blocks")
    elif needs_removals or _max_removals(request) is not None:
        raise _no_blocks_error(path)
    sizes = _sizes(request, len(removals), None)
    return NamedSubject(request, model, removals, sizes, any_model=request.any_model)


def read_pair(request: EvalRequest) -> NamedSubject:
    """Read the names of two models to compare, the one of `--against` as the dense one.

    Raises:
        UsageError: one of them is missing, or is a plan.
    """
    parent = str(request.against)
    if request.subject is None:
        raise UsageError(
            f"--against {parent} needs the model to compare with it.",
            hint=f"Name it: sleb eval MODEL --against {parent}.",
        )
    other = fspath(request.subject)
    for name in (other, parent):
        if is_plan(Path(name)):
            raise UsageError(
                f"--against compares two models, but {name} is a plan.",
                hint=f"Name the checkpoint, or leave out --against: sleb eval {name} compares its "
                "model with and without blocks.",
            )
    return NamedSubject(request, parent, (), other=other)


def _require_applicable(request: SubjectRequest, path: Path, plan: Plan) -> None:
    """Check that the options fit what a plan removes."""
    unfit = []
    if not plan.order.whole_blocks:
        unfit += given(request, _FOR_BLOCKS)
    if isinstance(request, SizesRequest):
        unfit += given(request, "experts_per_token")
    if unfit:
        raise UsageError(
            f"{unfit[0]} does not apply to {path}, a plan that removes {plan.unit}.",
            hint=f"Leave out {unfit[0]}.",
        )


def _no_blocks_error(path: Path) -> SlebError:
    if not path.exists():
        return no_plan(path)
    named = f"a plan, which `sleb search {in_shell(str(path))} --ratio 0.2` writes"
    for file in sorted({*path.parent.glob("*.json"), *Path().glob("*.json")}):
        with suppress(PlanError):
            if Path(read_plan(file).made_for.id) in (path.absolute(), path.resolve()):
                named = f"its plan, {file}"
    return UsageError(f"No blocks given for {path}.", hint=f"Name {named}, or use --blocks 5,4,9.")


def locate_planned_model(
    path: Path, plan: Plan, named: str | None, revision: str | None
) -> tuple[str, str | None]:
    """Return the place and the revision of a plan's model; what the user named takes precedence.

    Raises:
        PlanError: the plan does not say where its model is.
    """
    model = plan.made_for
    if named is not None:
        return named, revision
    # A plan from a checkpoint, which has only the name of a local model, must not lead to the Hub.
    if not model.has_place and not Path(model.id).exists():
        raise PlanError(
            f"{path} was made for {model.id}, and does not say where that is.",
            hint="Name its folder: --model FOLDER, or MODEL of a search.",
        )
    if revision is None and not Path(model.id).exists():
        revision = model.revision
    return model.id, revision


def is_plan(path: Path) -> bool:
    """Whether the user named a plan rather than a model, by the name or by the file there."""
    return path.suffix == ".json" or (path.is_file() and path.suffix != ".gguf")


def read_named_plan(path: Path, request: OneSizeRequest | SizesRequest) -> Plan:
    """Read the plan that the user named, for the requested number of removals.

    Raises:
        PlanError: the plan is unreadable.
        UsageError: it has fewer removals, or other blocks were named, too.
    """
    if request.blocks is not None:
        raise UsageError(
            f"--blocks applies to a model, but {path} is a plan with its own blocks.",
            hint="Leave out --blocks.",
        )
    plan = read_plan(path)
    count = len(first_removals(plan.largest, _max_removals(request), str(path), plan.unit))
    _require_whole_groups(plan, count)
    return plan.first(count)


def _require_whole_groups(plan: Plan, count: int) -> None:
    """Check that as many experts go of each group, where a model has groups."""
    order = plan.order
    if count % order.multiple:
        raise UsageError(
            f"Cannot remove {count} {order.unit}: {plan.model.id} has {order.multiple} groups of "
            f"{order.unit}.",
            hint=f"Use a multiple of {order.multiple}.",
        )


def first_removals(
    removals: Sequence[int], count: int | None, where: str, unit: Unit = "blocks"
) -> tuple[int, ...]:
    """Return the first `count` removals of `where`; all of them by default.

    Raises:
        UsageError: `where` has fewer.
    """
    if count is None:
        return tuple(removals)
    if not 1 <= count <= len(removals):
        raise UsageError(
            f"Cannot remove {count} {unit}: {where} names {len(removals)}.",
            hint=f"Use --remove 1 to {len(removals)}.",
        )
    return tuple(removals[:count])


def _max_removals(request: OneSizeRequest | SizesRequest) -> int | None:
    """Return the number of removals of the smallest requested model; None for all."""
    if isinstance(request, SizesRequest):
        return max(request.remove, default=None)
    return request.remove


def _sizes(request: OneSizeRequest | SizesRequest, most: int, plan: Plan | None) -> tuple[int, ...]:
    """Return how many parts go of each model to be measured, ascending."""
    if not isinstance(request, SizesRequest):
        return ()
    if not most:
        if request.every is not None:
            raise UsageError(
                f"--every {request.every} needs a plan or --blocks.",
                hint="Name a plan, or the blocks of the model: --blocks 5,4,9.",
            )
        return ()
    every = request.every or most
    sizes = set(request.remove) or {most, *range(every, most, every)}
    if min(sizes) < 1:
        unit = plan.unit if plan else "blocks"
        raise UsageError(f"Cannot remove {min(sizes)} {unit}.", hint=f"Use --remove 1 to {most}.")
    if plan:
        for size in sizes:
            _require_whole_groups(plan, size)
    return tuple(sorted(sizes))

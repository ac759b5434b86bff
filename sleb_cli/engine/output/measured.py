"""What `sleb eval` and `sleb bench` measured of a plan, kept beside it, for exporters."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from sleb_cli.atomic import to_json
from sleb_cli.events import Notify, Warned
from sleb_cli.kept_results import beside_plan
from sleb_cli.plan import CHECKPOINT_PLAN, Plan, public_name
from sleb_cli.records import UnreadableRecord, first_fault, read_text, without_folders
from sleb_cli.results import BenchResult, EvalResult

R = TypeVar("R", EvalResult, BenchResult)
Kind = Literal["eval", "bench"]

_RECORDS: dict[Kind, type[EvalResult | BenchResult]] = {"eval": EvalResult, "bench": BenchResult}


def measured_of_plan(path: Path, plan: Plan, kind: Kind, notify: Notify) -> dict[str, Any] | None:
    """Return what was measured of the sizes of a plan, without local folders.

    None if nothing was. What cannot be read or belongs to another model is left out, with a warning: a report with a
    gap is better than none.
    """
    file = results_of_plan(path, kind)
    if not file.exists():
        return None
    try:
        result = _RECORDS[kind].model_validate_json(read_text(file))
    except (UnreadableRecord, ValidationError) as error:
        reason = first_fault(error, "the result") if isinstance(error, ValidationError) else error
        notify(Warned(f"{file} is left out, because it cannot be read: {reason}."))
        return None
    if result.model.fingerprint != plan.model.fingerprint:
        notify(Warned(f"{file} is left out, because it was measured on another model than that of {path}."))
        return None
    planned = {frozenset(removals) for removals in plan.by_size}
    data = result.to_data()
    # A plan that was cut to fewer removals no longer tells its larger sizes from another plan's.
    strangers = {removals for removals in _sizes_in(data) - planned if len(removals) <= len(plan.removals)}
    if strangers:
        notify(Warned(f"What {file} says of {len(strangers)} other removals than those of {path} is left out."))
    data = _published(_only_sizes(data, planned))
    return data if _sizes_in(data) else None


def results_of_plan(path: Path, kind: Kind) -> Path:
    """Return where the results for a plan are kept: beside it, or else in the same checkpoint."""
    beside, inside = beside_plan(path, kind), path.with_name(f"sleb_{kind}.json")
    return inside if path.name == CHECKPOINT_PLAN and not beside.exists() else beside


def _sizes_in(data: Any) -> set[frozenset[int]]:
    """Return the sets of removed blocks that were measured."""
    if isinstance(data, list):
        return set[frozenset[int]]().union(*map(_sizes_in, data))
    if not isinstance(data, dict):
        return set()
    measured = {frozenset(entry["removals"]) for entry in _entries(data)}
    return measured.union(*map(_sizes_in, data.values()))


def _entries(data: dict[str, Any]) -> list[Any]:
    """Return the entries by size, if there are any here; in a flip, `pruned` is an answer."""
    entries = data.get("pruned")
    return entries if isinstance(entries, list) else []


def _only_sizes(data: Any, wanted: Collection[frozenset[int]]) -> Any:
    """Return results without the entries of other sizes, at every depth."""
    if isinstance(data, list):
        return [_only_sizes(value, wanted) for value in data]
    if not isinstance(data, dict):
        return data
    kept = {name: _only_sizes(value, wanted) for name, value in data.items()}
    if entries := _entries(kept):
        kept["pruned"] = [entry for entry in entries if frozenset(entry["removals"]) in wanted]
    if "sizes" in kept:
        kept["sizes"] = [removals for removals in kept["sizes"] if frozenset(removals) in wanted]
    return kept


def without_local_folders(result: R) -> R:
    """Return a result that may be published: files and local models are named without their folders."""
    return type(result).model_validate_json(to_json(_published(result.to_data())))


def _published(data: dict[str, Any]) -> dict[str, Any]:
    """Return results in which files and local models are named without their folders, so that they may be published."""
    model = data["model"] | {"id": without_folders(data["model"]["id"])}
    texts = [text | {"text": public_name(text["text"])} for text in data.get("texts", ())]
    files = [without_folders(f"./{name}") for name in data.get("lm_eval", ())]
    return data | {"model": model} | ({"texts": texts, "lm_eval": files} if "texts" in data else {})

"""What was found, in a few plain sentences."""

from __future__ import annotations

from sleb_cli.exporters.findings import Findings
from sleb_cli.tables.quality import ENOUGH, keeps_enough
from sleb_cli.tables.search_results import UNUSED, collapse
from sleb_cli.units import format_count, format_share, plural


def sentences(findings: Findings) -> list[str]:
    """Return what was removed, and where its speed and accuracy were measured."""
    count, whole, parts = findings.removed
    what = parts if findings.plan.experts else f"transformer {parts}"
    how = "and the others were given new weights" if findings.plan.recovery else "without training"
    were = "was" if count == 1 else "were"
    removed = f"{count} of {whole} {what} {were} removed ({format_share(count / whole)}), {how}"
    if findings.sizes:
        before, after = (format_count(size.parameters) for size in findings.sizes)
        removed += f": {after} parameters remain of {before}"
    said = [f"{removed}."]
    if findings.plan.experts:
        said.append(UNUSED)
    if findings.main_workloads and (benchmark := findings.benchmark):
        said.append(f"Timed on {benchmark.processor if benchmark.device == 'cpu' else benchmark.device}.")
    if tasks := findings.accuracy_tasks:
        lost, gained = (sum(getattr(entry, kind) for _, entry in tasks) for kind in ("lost", "gained"))
        items = plural(sum(len(task.doc_ids) for task, _ in tasks), "item")
        said.append(f"Of {items} in tasks, {lost:,} went from right to wrong and {gained:,} from wrong to right.")
    return said


def advice(findings: Findings) -> list[str]:
    """Say whether to use this size where most of the accuracy must stay, or which one that was measured.

    Where too few items were measured to tell, nothing is said.
    """
    own, most, unit = findings.plan.largest, f"{ENOUGH:.0%}", findings.plan.unit
    measured = {each.removals for task in findings.tasks for each in task.pruned if len(each.removals) <= len(own)}
    kept = {removals: keeps_enough(share[1]) for removals in measured if (share := findings.retention(removals))}
    if kept.get(own) is None:
        return []
    if kept[own]:
        return [f"Use it where {most} of the accuracy is enough."]
    if enough := [removals for removals, is_kept in kept.items() if is_kept]:
        fewer = plural(max(map(len, enough)), unit.removesuffix("s"))
        return [f"To keep {most} of the accuracy, remove {fewer}, the most of any measured size that keeps it."]
    if None in kept.values():
        return []
    recover = "" if findings.plan.recovery or findings.plan.experts else ", or apply the plan with --recover and --heal"
    return [f"To keep {most} of the accuracy, remove fewer {unit} than were measured{recover}."]


def warnings(findings: Findings) -> list[str]:
    """Return what should make a reader doubt the pruned model."""
    found = collapse(findings.plan.sample_generation)
    last = findings.plan.steps[-1].held_out if findings.plan.steps else None
    if last and last.overfits:
        found.append(
            "The search overfits its calibration text: on held-out text, the loss grew by "
            f"{last.generalization_gap:.3f} nats per token more. More or different calibration text may help."
        )
    unstable = sum(result.warmup.stable is False for result in findings.workloads)
    if unstable:
        found.append(
            f"The times of {plural(unstable, 'workload')} were not stable after the warm-up: another program may have "
            "used the machine."
        )
    return found

"""The findings in a few plain sentences."""

from __future__ import annotations

from sleb_cli.exporters.findings import Findings
from sleb_cli.tables.quality import ENOUGH, keeps_enough
from sleb_cli.tables.search_results import collapse_warnings
from sleb_cli.units import format_count, format_share, plural


def sentences(findings: Findings) -> list[str]:
    """Say what was removed, where it was timed, and how many answers changed."""
    order, count = findings.plan.order, len(findings.plan.largest)
    how = "and the others were given new weights" if findings.plan.recovery else "without training"
    were = "was" if count == 1 else "were"
    removed = f"{order.amount(count)} {were} removed ({format_share(count / order.count)}), {how}"
    if findings.sizes:
        before, after = (format_count(size.parameters) for size in findings.sizes)
        removed += f": {after} parameters remain of {before}"
    lines = [f"{removed}."]
    if order.caveat:
        lines.append(order.caveat)
    if findings.main_workloads and (benchmark := findings.benchmark):
        lines.append(
            f"Timed on {benchmark.processor if benchmark.device == 'cpu' else benchmark.device}."
        )
    if tasks := findings.accuracy_tasks:
        lost, gained = (
            sum(getattr(entry, kind) for _, entry in tasks) for kind in ("lost", "gained")
        )
        items = plural(sum(len(task.doc_ids) for task, _ in tasks), "item")
        lines.append(
            f"Of {items} in tasks, {lost:,} went from right to wrong and {gained:,} from wrong to "
            f"right."
        )
    return lines


def advice(findings: Findings) -> list[str]:
    """Recommend this size, or a smaller one that was measured; nothing if there were too few items
    to tell.
    """
    size, most, unit = findings.plan.largest, f"{ENOUGH:.0%}", findings.plan.unit
    measured = {scores.removals for task in findings.tasks for scores in task.pruned}
    shares = {
        removals: findings.retention(removals)
        for removals in measured
        if len(removals) <= len(size)
    }
    verdicts = {removals: keeps_enough(share[1]) for removals, share in shares.items() if share}
    if verdicts.get(size) is None:
        return []
    if verdicts[size]:
        return [f"Use it where {most} of the accuracy is enough."]
    if enough := [removals for removals, is_enough in verdicts.items() if is_enough]:
        fewer = plural(max(map(len, enough)), unit.removesuffix("s"))
        return [
            f"To keep {most} of the accuracy, remove {fewer}, the most of any measured size that "
            f"keeps it."
        ]
    if None in verdicts.values():
        return []
    recover = ""
    if findings.plan.order.whole_blocks and not findings.plan.recovery:
        recover = ", or apply the plan with --recover and --heal"
    return [f"To keep {most} of the accuracy, remove fewer {unit} than were measured{recover}."]


def warnings(findings: Findings) -> list[str]:
    """List reasons to doubt the pruned model."""
    reasons = collapse_warnings(findings.plan.sample_generation)
    last = findings.plan.steps[-1].held_out if findings.plan.steps else None
    if last and last.overfits:
        reasons.append(
            "The search overfits its calibration text: on held-out text, the loss grew by "
            f"{last.generalization_gap:.3f} nats per token more. More or different calibration "
            f"text may help."
        )
    unstable = sum(lines.warmup.stable is False for lines in findings.workloads)
    if unstable:
        reasons.append(
            f"The times of {plural(unstable, 'workload')} were not stable after the warm-up: "
            f"another program may have "
            "used the machine."
        )
    return reasons

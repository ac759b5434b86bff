"""The findings in a few plain sentences."""

from sleb_cli.exporters.findings import Findings
from sleb_cli.tables.quality import by_use, retention, verdict
from sleb_cli.tables.search_results import collapse_warnings
from sleb_cli.units import format_count, format_share, plural


def sentences(findings: Findings) -> list[str]:
    """Say what was removed, where it was timed, and how many answers changed."""
    lines = [_removal(findings)]
    if findings.plan.order.caveat:
        lines.append(findings.plan.order.caveat)
    benchmark = findings.benchmark
    if benchmark and findings.main_workloads:
        machine = benchmark.processor if benchmark.device == "cpu" else benchmark.device
        lines.append(f"Timed on {machine}.")
    if findings.accuracy_tasks:
        items = lost = gained = 0
        for task, scores in findings.accuracy_tasks:
            items += len(task.doc_ids)
            lost += scores.lost or 0
            gained += scores.gained or 0
        lines.append(
            f"Of {plural(items, 'item')} in tasks, {lost:,} went from right to wrong and "
            f"{gained:,} from wrong to right."
        )
    return lines


def _removal(findings: Findings) -> str:
    order = findings.plan.order
    count = len(findings.plan.largest)
    were = "was" if count == 1 else "were"
    how = "without training"
    if findings.plan.recovery:
        how = f"and the {order.recovered} were given new weights"
    share = format_share(count / order.count)
    removed = f"{order.amount(count)} {were} removed ({share}), {how}"
    if findings.sizes:
        dense, pruned = findings.sizes
        after = format_count(pruned.parameters)
        removed += f": {after} parameters remain of {format_count(dense.parameters)}"
    return f"{removed}."


def verdicts(findings: Findings) -> list[str]:
    """Judge the plan's size for each kind of use."""
    lines = []
    for use, tasks in by_use(findings.tasks).items():
        share = retention(tasks, findings.plan.largest)
        if share:
            kept_share, interval = share
            words = verdict(kept_share, interval)
            if words:
                lines.append(f"For {use}: {words}.")
    return lines


def warnings(findings: Findings) -> list[str]:
    """List reasons to doubt the pruned model."""
    reasons = collapse_warnings(findings.plan.sample_generation)
    last = findings.plan.steps[-1].held_out if findings.plan.steps else None
    if last and last.overfits:
        grew = f"loss grew by {last.generalization_gap:.3f} nats per token more"
        if findings.plan.model.output:
            grew = f"distance is {last.generalization_gap:.3f} larger"
        reasons.append(
            f"The search overfits its calibration text: on held-out text, the {grew}. More or "
            "different calibration text may help."
        )
    unstable = sum(result.warmup.stable is False for result in findings.workloads)
    if unstable:
        reasons.append(
            f"The times of {plural(unstable, 'workload')} were not stable after the warm-up: "
            "another program may have used the machine."
        )
    return reasons

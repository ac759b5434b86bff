"""The findings in a few plain sentences."""

from collections.abc import Sequence

from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.lines import Line, kept_line, speed_line, text_line
from sleb_cli.results import CorpusResult, TaskResult
from sleb_cli.tables.quality import KEPT, LOST, by_measure, by_use, retention, verdict
from sleb_cli.tables.search_results import collapse_warnings
from sleb_cli.tables.speed import workload_name
from sleb_cli.tables.table import WORKLOADS, Column, Table, between, model_name, tabulate
from sleb_cli.units import format_count, format_perplexity, format_share, plural


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


def uses(findings: Findings) -> dict[str, Sequence[TaskResult | CorpusResult]]:
    """Group what was measured by kind of use; each measure of a corpus is one."""
    return {**by_use(findings.tasks), **by_measure(findings.corpora)}


def verdicts(findings: Findings) -> list[str]:
    """Say what the plan's size is worth it for, and judge it for each kind of use."""
    judged = _judge(findings)
    worth, not_worth, unclear = _sort_workloads(findings)
    for use, words in judged.items():
        if words == KEPT:
            worth.append(use)
        elif words.endswith(LOST):
            not_worth.append(use)
    lines = []
    if worth:
        lines.append(f"This size is worth it for {'; '.join(worth)}.")
    if not_worth:
        lines.append(f"This size is not worth it for {'; '.join(not_worth)}.")
    if unclear:
        lines.append(f"It may be faster or slower in {'; '.join(unclear)}.")
    for use, words in judged.items():
        lines.append(f"For {use}: {words}.")
    return lines


def _sort_workloads(findings: Findings) -> tuple[list[str], list[str], list[str]]:
    """Name the workloads that are faster, those that are slower, and those that may be either."""
    faster = []
    slower = []
    unclear = []
    for result, timing in findings.main_workloads:
        name = workload_name(result)
        if not timing.interval:
            continue
        if timing.interval.low > 1:
            faster.append(f"{name} ({timing.speedup:.2f}x)")
        elif timing.interval.high < 1:
            slower.append(f"{name} ({timing.speedup:.2f}x)")
        else:
            unclear.append(f"{name} ({between(timing.interval, '{:.2f}x'.format)})")
    return faster, slower, unclear


def _judge(findings: Findings) -> dict[str, str]:
    """Judge the plan's size for each kind of use that has enough items for an interval."""
    judged = {}
    for use, results in uses(findings).items():
        share = retention(results, findings.plan.largest)
        if share and share[1]:
            judged[use] = verdict(*share)
    return judged


def every_size(findings: Findings) -> Table:
    """List the main numbers of each measured size."""
    columns: list[Column] = [("model", str)]
    lines: list[Line] = []
    for name, text in zip(findings.text_names, findings.texts, strict=True):
        columns.append((f"perplexity, {name}", format_perplexity))
        lines.append(text_line(name, text))
    for use, results in uses(findings).items():
        columns.append((f"kept, {use}", format_share))
        lines.append(kept_line(findings.plan, use, results))
    for result, _ in findings.main_workloads:
        columns.append((workload_name(result), "{:.2f}x".format))
        lines.append(speed_line(result))
    rows = []
    for key in ((), *findings.plan.size_keys):
        row: list[str | float | None] = [model_name(key)]
        for line in lines:
            value, _ = line.values.get(len(key), (None, None))
            row.append(value)
        if any(number is not None for number in row[1:]):
            rows.append(row)
    notes = [WORKLOADS] if findings.main_workloads else []
    return tabulate("Every measured size", columns, rows, notes)


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

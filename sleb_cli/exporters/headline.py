"""What was found, in a few plain sentences."""

from __future__ import annotations

from sleb_cli.exporters.findings import Estimate, Findings
from sleb_cli.results import PrunedTextScores, TextScores, Workload
from sleb_cli.tables.quality import perplexity_change
from sleb_cli.tables.search import collapse
from sleb_cli.tables.table import between
from sleb_cli.units import format_change, format_count, format_perplexity, format_share, plural

ENOUGH = 0.95
"""The share of the dense model's accuracy below which a size is not recommended."""
_DOES = {"generation": "generates text", "prompt": "processes prompts"}


def sentences(findings: Findings) -> list[str]:
    """Return what was removed, what that gains and costs, as far as it was measured, and what to do about it."""
    return [_removed(findings), *_gains(findings), *_costs(findings), *_advice(findings)]


def _removed(findings: Findings) -> str:
    count, blocks = len(findings.plan.removals), findings.plan.model.blocks
    how = "and the others were given new weights" if findings.plan.recovery else "without training"
    were = "was" if count == 1 else "were"
    text = f"{count} of {blocks} transformer blocks {were} removed ({format_share(count / blocks)}), {how}"
    if findings.sizes:
        before, after = (format_count(size.parameters) for size in findings.sizes)
        text += f": {after} parameters remain of {before}"
    return f"{text}."


def _gains(findings: Findings) -> list[str]:
    if (benchmark := findings.benchmark) is None:
        return []
    where = f"on {benchmark.processor if benchmark.device == 'cpu' else benchmark.device}"
    lines = []
    for result, timing in findings.main_workloads:
        few = "" if timing.interval else f" in {plural(len(timing.e2els), 'run')}, too few for an interval"
        ends = timing.interval
        interval = f" (95% interval {between(ends, '{:.2f}'.format)})" if ends else ""
        unclear = "no measurably faster or slower: " if ends and ends.low <= 1 <= ends.high else ""
        fast = f"{unclear}{timing.speedup:.2f} times as fast{interval}{few}"
        lines.append(f"It {_DOES[result.workload.name]} {fast}, {_work(result.workload)}, {where}.")
    return lines


def _work(workload: Workload) -> str:
    """Say what was run: with 4 prompts of 64 tokens and 32 new tokens each."""
    new = f" and {plural(workload.new_tokens, 'new token')} each" if workload.new_tokens else ""
    prompts = plural(workload.batch_size, "prompt")
    return f"with {prompts} of {plural(workload.prompt_length, 'token')}{new}"


def _costs(findings: Findings) -> list[str]:
    lines = [f"Its perplexity on {name} {_changes(text.dense, own)}." for name, text, own in findings.own_texts]
    kept = findings.retention(findings.plan.removals)
    return [*lines, _accuracy(findings, kept)] if kept else lines


def _changes(dense: TextScores, pruned: PrunedTextScores) -> str:
    change, interval = perplexity_change(pruned)
    before, after = format_perplexity(dense.perplexity), format_perplexity(pruned.perplexity)
    if interval and interval.low <= 0 <= interval.high:
        return f"does not change measurably: {before} and {after}"
    verb = "rises" if change > 0 else "falls"
    by = "" if change >= 2 else "by "
    ends = f" (95% interval {between(interval, format_change)})" if interval else ""
    return f"{verb} from {before} to {after}, {by}{format_change(change).lstrip('+-')}{ends}"


def _accuracy(findings: Findings, kept: Estimate) -> str:
    tasks = findings.accuracy_tasks
    names = f"on {tasks[0][0].task}" if len(tasks) == 1 else f"on average over {len(tasks)} tasks"
    text = f"It keeps {format_share(kept[0])} of the dense model's accuracy {names}"
    if kept[1]:
        text += f" (95% interval {between(kept[1], format_share)})"
    lost, gained = (sum(getattr(entry, kind) for _, entry in tasks) for kind in ("lost", "gained"))
    items = plural(sum(len(task.doc_ids) for task, _ in tasks), "item")
    return f"{text}; of {items}, {lost:,} went from right to wrong and {gained:,} from wrong to right."


def _advice(findings: Findings) -> list[str]:
    """Say whether to use this size where most of the accuracy must stay, or which one that was measured."""
    own, most = findings.plan.removals, f"{ENOUGH:.0%}"
    kept = {each.removals: found[0] for task in findings.tasks for each in task.pruned
            if len(each.removals) <= len(own) and (found := findings.retention(each.removals))}  # fmt: skip
    if own not in kept:
        return []
    if kept[own] >= ENOUGH:
        return [f"Use it where {most} of the accuracy is enough."]
    if enough := [removals for removals, share in kept.items() if share >= ENOUGH]:
        fewer = plural(max(map(len, enough)), "block")
        return [f"To keep {most} of the accuracy, remove {fewer}, the most of any measured size that keeps it."]
    recover = "" if findings.plan.recovery else ", or recover it: `sleb apply --recover --heal`"
    return [f"To keep {most} of the accuracy, remove fewer blocks than were measured{recover}."]


def warnings(findings: Findings) -> list[str]:
    """Return what should make a reader doubt the pruned model."""
    found = collapse(findings.plan.sample_generation)
    last = findings.plan.steps[-1].held_out
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

"""What was found, in a few plain sentences."""

from __future__ import annotations

from sleb_cli.exporters.findings import Data, Estimate, Findings, estimate, of_size, perplexity_change
from sleb_cli.units import format_change, format_count, format_perplexity, format_share, plural

# As in `SampleGeneration.is_repetitive` and `HeldOutRecord.overfits` of plans.
_MAX_ADDED_REPETITION = 0.2

_DOES = {"generation": "generates text", "prompt": "processes prompts"}


def sentences(findings: Findings) -> list[str]:
    """Return what was removed, what that gains, and what it costs, as far as it was measured."""
    return [removed(findings), *gains(findings), *costs(findings)]


def removed(findings: Findings) -> str:
    """Return how much of the model was removed."""
    count, blocks = len(findings.removals), findings.blocks
    recovered = findings.plan.get("recovery") is not None
    how = "and the others were given new weights" if recovered else "without training"
    were = "was" if count == 1 else "were"
    text = f"{count} of {blocks} transformer blocks {were} removed ({format_share(count / blocks)}), {how}"
    dense, pruned = findings.size(()), findings.size(findings.removals)
    if dense and pruned:
        before, after = (format_count(size["parameters"]) for size in (dense, pruned))
        text += f": {after} parameters remain of {before}"
    return f"{text}."


def gains(findings: Findings) -> list[str]:
    """Return how much faster the model is, by kind of workload."""
    benchmark = findings.pruning.benchmark
    if benchmark is None:
        return []
    where = f"on {benchmark['processor']}" if benchmark["device"] == "cpu" else f"on {benchmark['device']}"
    lines = [
        f"It {_DOES[result['workload']['name']]} {faster(speedup(entry))}{_runs(entry)}, {_work(result['workload'])}"
        for result in findings.main_workloads
        if (entry := of_size(result, findings.removals))
    ]
    return [f"{line}, {where if number == 0 else 'there'}." for number, line in enumerate(lines)]


def _runs(entry: Data) -> str:
    """Say how few runs a speed-up is from, if they are too few for an interval."""
    count = len(entry["e2els"])
    return "" if entry["interval"] else f" in {plural(count, 'run')}, too few for an interval"


def _work(workload: Data) -> str:
    """Say what was run: with 4 prompts of 64 tokens and 32 new tokens each."""
    new = f" and {plural(workload['new_tokens'], 'new token')} each" if workload["new_tokens"] else ""
    engine = "" if workload["engine"] == "transformers" else f" in {workload['engine']}"
    prompts = plural(workload["batch_size"], "prompt")
    return f"with {prompts} of {plural(workload['prompt_length'], 'token')}{new}{engine}"


def speedup(entry: Data) -> Estimate:
    """Return the measured speed-up with its interval."""
    return estimate(entry["speedup"], entry["interval"])


def between(measured: Estimate) -> str:
    """Return the interval, 1.19 to 1.23, or nothing if it has none."""
    return "" if measured.low is None else f"{measured.low:.2f} to {measured.high:.2f}"


def faster(measured: Estimate) -> str:
    """Say how much faster a model is: 1.21 times as fast (95 % interval 1.19 to 1.23)."""
    interval = f" (95 % interval {between(measured)})" if between(measured) else ""
    if measured.low is not None and measured.high is not None and measured.low <= 1 <= measured.high:
        return f"no measurably faster or slower: {measured.value:.2f} times as fast{interval}"
    return f"{measured.value:.2f} times as fast{interval}"


def costs(findings: Findings) -> list[str]:
    """Return what happened to the perplexity of each text, and to the accuracy on tasks."""
    lines = []
    for text in findings.texts:
        if entry := of_size(text, findings.removals):
            lines.append(f"Its perplexity on {findings.text_name(text)} {_changes(text['dense'], entry)}.")
    if kept := findings.retention(findings.removals):
        lines.append(_accuracy(findings, kept))
    return lines


def _changes(dense: Data, pruned: Data) -> str:
    change = perplexity_change(pruned)
    before, after = format_perplexity(dense["perplexity"]), format_perplexity(pruned["perplexity"])
    if change.low is not None and change.high is not None and change.low <= 0 <= change.high:
        return f"does not change measurably: {before} and {after}"
    verb = "rises" if change.value > 0 else "falls"
    interval = ""
    if change.low is not None and change.high is not None:
        low, high = sorted((change.low, change.high), key=abs)
        interval = f" (95 % interval {_amount(low)} to {_amount(high)})"
    by = "" if change.value >= 2 else "by "
    return f"{verb} from {before} to {after}, {by}{_amount(change.value)}{interval}"


def _amount(change: float) -> str:
    return format_change(change).lstrip("+-")


def _accuracy(findings: Findings, kept: Estimate) -> str:
    tasks = findings.accuracy_tasks
    entries = [entry for task in tasks if (entry := of_size(task, findings.removals))]
    names = f"on {tasks[0]['task']}" if len(tasks) == 1 else f"on average over {len(tasks)} tasks"
    text = f"It keeps {format_share(kept.value)} of the dense model's accuracy {names}"
    if kept.low is not None and kept.high is not None:
        text += f" (95 % interval {format_share(kept.low)} to {format_share(kept.high)})"
    if all(entry["lost"] is not None for entry in entries):
        lost, gained = (sum(entry[name] for entry in entries) for name in ("lost", "gained"))
        items = plural(sum(len(task["doc_ids"]) for task in tasks), "item")
        text += f"; of {items}, {lost:,} went from right to wrong and {gained:,} from wrong to right"
    return f"{text}."


def warnings(findings: Findings) -> list[str]:
    """Return what should make a reader doubt the pruned model."""
    found = []
    sample = findings.plan["sample_generation"]
    if sample and sample["pruned_repetition"] > sample["dense_repetition"] + _MAX_ADDED_REPETITION:
        found.append(
            f"The pruned model repeats itself: {sample['pruned_repetition']:.0%} of its text, against "
            f"{sample['dense_repetition']:.0%} of the dense model's. It may have collapsed, whatever its perplexity."
        )
    last = findings.plan["steps"][-1]["held_out"]
    if last and last["overfits"]:
        found.append(
            "The search fits its calibration text: on text held out of it, the loss grew by "
            f"{last['generalization_gap']:.3f} nats per token more. Other or more calibration text may help."
        )
    unstable = [result for result in findings.workloads if result["warmup"]["stable"] is False]
    if unstable:
        found.append(
            f"{plural(len(unstable), 'workload')} never ran evenly enough before the timing: something else may have "
            "used the machine."
        )
    return found

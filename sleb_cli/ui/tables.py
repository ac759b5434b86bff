"""Results as tables on stdout."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sleb_cli.plan import Plan, RecoveryRecord, SampleGeneration, TargetRecord
from sleb_cli.records import Proof
from sleb_cli.results import (
    ApplyResult,
    BenchResult,
    CompareResult,
    EvalResult,
    ExportResult,
    GgufResult,
    ResultRecord,
    TaskRecord,
)
from sleb_cli.ui.console import print_json, save, stdout
from sleb_cli.units import count, size

# Of what a canary says, so much is shown; the plan has all of it.
SAMPLE_CHARACTERS = 160


def new_table(*columns: str) -> Table:
    """Give a table whose first column is text and whose other columns are numbers."""
    table = Table(header_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def print_title(console: Console, title: str) -> None:
    """Print a line above a table; Rich's own titles are broken to the table's width."""
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)


def show_plan(plan: Plan, output: Path, *, as_json: bool) -> None:
    """Write the plan; show the steps of its search, which blocks are gone, and where it is."""
    save(plan, output)
    if as_json:
        print_json(plan.to_data())
        return
    how = plan.search
    console = stdout()
    print_title(console, f"{plan.model.id}: {how.remove} of {plan.model.blocks} blocks removed")
    console.print(_steps(plan))
    console.print(block_strip(plan.model.blocks, plan.removals))
    for swap in plan.steps[-1].swaps:
        console.print(
            f"exchanged: {spans(swap.restored)} stays, {spans(swap.removed)} goes; "
            f"{how.metric} {swap.before:.4f} -> {swap.after:.4f}",
            soft_wrap=True,
            markup=False,
        )
    held_out = f" ({how.held_out} of them held out)" if how.held_out else ""
    console.print(
        f"calibrated on {plan.calibration}{held_out}, {how.dtype} on {how.device}, {plan.environment.seconds:.0f} s",
        soft_wrap=True,
        markup=False,
    )
    if how.fast:
        console.print(race_summary(plan), soft_wrap=True, markup=False)
    if how.target is not None:
        console.print(target_summary(how.target, plan), soft_wrap=True, markup=False)
    if how.engine_reason:
        console.print(f"engine {how.engine}: {how.engine_reason}", soft_wrap=True, markup=False)
    if plan.sample_generation:
        _print_sample(console, plan.sample_generation)
    console.print(f"wrote {output}; next: sleb apply {output}", soft_wrap=True, markup=False)


def _steps(plan: Plan) -> Table:
    """Show the steps of a search below the dense model, and beside it what they cost where nobody searched."""
    how, dense = plan.search, plan.dense
    kinds = plan.nested and any(step.kind for step in plan.steps)
    first = ["step", "block" if plan.nested else "blocks", *(["kind"] if kinds else []), escape(how.metric)]
    table = new_table(*first, "perplexity", "change", *(["held out", "change"] if dense.held_out else []))
    loss = f"{dense.loss:.4f}" if how.metric == "nll" else ""
    table.add_row(
        "dense", *([""] * (1 + kinds)), loss, f"{dense.perplexity:.2f}", "",
        *([f"{dense.held_out.perplexity:.2f}", ""] if dense.held_out else []),
    )  # fmt: skip
    for number, (removals, step) in enumerate(zip(plan.by_size, plan.steps, strict=True), start=1):
        blocks = str(step.block) if plan.nested else spans(removals)
        kind = [escape(step.kind)] if kinds else []
        elsewhere = []
        if dense.held_out and (there := step.held_out):
            change = relative_change(dense.held_out.perplexity, there.perplexity)
            elsewhere = [f"{there.perplexity:.2f}", f"[yellow]{change}[/]" if there.overfits else change]
        table.add_row(
            str(number), blocks, *kind, f"{step.score:.4f}",
            f"{step.perplexity:.2f}", relative_change(dense.perplexity, step.perplexity), *elsewhere,
        )  # fmt: skip
    return table


def spans(blocks: Collection[int]) -> str:
    """Give blocks in their order in the model, runs of three or more shortened: 3, 10-14."""
    parts: list[str] = []
    run: list[int] = []
    for block in [*sorted(blocks), None]:
        if run and block != run[-1] + 1:
            parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            run = []
        run += [] if block is None else [block]
    return ", ".join(parts)


def _print_sample(console: Console, sample: SampleGeneration) -> None:
    """Show what both models say, one below the other, and warn where the pruned one runs in circles."""
    console.print(f'both go on after "{sample.prompt}"', soft_wrap=True, markup=False)
    said = {
        "dense": (sample.dense, sample.dense_repetition),
        "pruned": (sample.pruned, sample.pruned_repetition),
    }
    for name, (text, share) in said.items():
        line = shorten(" ".join(text.split()), SAMPLE_CHARACTERS, placeholder=" …")
        console.print(f"  {name:6} ({share:.0%} repeated): {line}", soft_wrap=True, markup=False)
    if sample.is_repetitive:
        console.print(
            f"[yellow]The pruned model repeats itself: {sample.pruned_repetition:.0%} of what it says, and the dense "
            f"one {sample.dense_repetition:.0%}. Its perplexity may hide that it collapses.[/]",
            soft_wrap=True,
        )


def block_strip(blocks: int, removed: Collection[int]) -> Text:
    """Draw every block in order: a bar where it stays, a dot where it is gone, with a ruler below."""
    strip, ruler = Text("  "), "  "
    for block in range(blocks):
        gone = block in removed
        strip.append("·" if gone else "█", style="red" if gone else "green")
        if block % 10 == 0:
            ruler += str(block).ljust(10)
    return Text("\n").join([strip, Text(ruler.rstrip(), style="dim")])


def race_summary(plan: Plan) -> str:
    """Say what racing spared, and which step was the closest."""
    raced = [(number, step) for number, step in enumerate(plan.steps, start=1) if step.race is not None]
    sequences = plan.calibration.sequences - plan.search.held_out
    done = whole = 0
    leads: list[tuple[float, int]] = []
    for number, step in raced:
        dropped = step.race.dropped.values() if step.race else []
        done += len(step.scores) * sequences + sum(drop.sequences for drop in dropped)
        whole += (len(step.scores) + len(dropped)) * sequences
        behind = [score - step.score for block, score in step.scores.items() if block != step.block]
        leads.append((min([*behind, *(drop.behind for drop in dropped)], default=math.inf), number))
    lead, number = min(leads)
    return f"raced: {done / whole:.0%} of the evaluations; the closest lead was {lead:.4f}, in step {number}"


def show_comparison(result: CompareResult, plan: Plan, output: Path, *, as_json: bool) -> None:
    """Write the best plan; show what every search found, and which was the best."""
    save(plan, output)
    if as_json:
        print_json(result.to_data())
        return
    console, calibration = stdout(), plan.calibration
    print_title(console, f"{plan.model.id}: {len(plan.removals)} of {plan.model.blocks} blocks removed")
    held_out = result.dense_held_out_perplexity is not None
    beside = ["held out"] if held_out else []
    table = new_table("metric", "strategy", "blocks", "perplexity", "change", *beside, "seconds")
    table.columns[1].justify = table.columns[2].justify = "left"

    def there(perplexity: float | None) -> list[str]:
        return [] if perplexity is None else [f"{perplexity:.2f}"]

    dense, dense_there = result.dense_perplexity, there(result.dense_held_out_perplexity)
    table.add_row("dense", "", "", f"{dense:.2f}", "", *dense_there, "")
    for each in result.compared:
        best = f"{each.metric}@{each.strategy}" == result.best
        table.add_row(
            escape(each.metric), each.strategy, spans(each.removals), f"{each.perplexity:.2f}",
            relative_change(dense, each.perplexity), *there(each.held_out_perplexity), f"{each.seconds:.0f}",
            style="bold green" if best else None,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"on {calibration.source}: {calibration.sequences} x {calibration.sequence_length} tokens, {result.dtype} on "
        f"{result.device}",
        soft_wrap=True,
        markup=False,
    )
    where = "on the held-out sequences" if held_out else "on the calibration text, on which all were searched"
    console.print(f"wrote {output}: the plan of {result.best}, best {where}", soft_wrap=True, markup=False)


def target_summary(target: TargetRecord, plan: Plan) -> str:
    """Say what was to be reached, what was, and what it cost."""
    cost = f"it cost {math.log(plan.steps[-1].perplexity / plan.dense.perplexity):.4f} nats per token"
    match target.name:
        case "target_params":
            return f"target: {target.asked} parameters; {count(target.reached)} of {count(target.dense)} remain; {cost}"
        case "target_memory":
            how = target.serving
            cache = f"a KV cache in {how.dtype} for {how.batch} x {how.length} tokens" if how else "KV cache"
            needs = f"weights and {cache} take {size(target.reached)}, not {size(target.dense)}"
            return f"target: {target.asked}; {needs}; {cost}"
        case "target_speedup":
            short = "" if target.reached >= target.limit else ", short of it: remove more with --extend"
            measured = f"{target.reached:.2f}x measured ({target.predicted:.2f}x predicted){short}"
            return f"target: {target.limit:g}x at {target.workload}; {measured}; {cost}"
    unit = "x the dense perplexity" if target.name == "max_perplexity_ratio" else " nats per token lost"
    more = f"one removal more: {target.next:.4f}" if target.next is not None else "no block more may go"
    gone = f"{target.reached:.4f} with {len(plan.removals)} of {plan.model.blocks} blocks removed"
    return f"target: at most {target.limit:g}{unit}; {gone}; {more}"


def relative_change(before: float, after: float) -> str:
    """Say a relative change as people read it."""
    return f"{after / before - 1:+.1%}" if before else ""


def show_applied(result: ApplyResult, *, as_json: bool) -> None:
    """Say what was written, and what was proven about it."""
    if as_json:
        print_json(result.to_data())
        return
    _say_size(result.folder, result.blocks, result.weights_bytes)
    if result.recovery:
        _say_recovery(result.recovery)
    if result.pushed:
        stdout().print(f"pushed to {result.pushed}", soft_wrap=True, markup=False)
    if result.proof is None:
        stdout().print("not verified (--no-verify)")
        return
    _say_proof(result.proof, "stock transformers loads it")


def show_pruned_gguf(result: GgufResult, *, as_json: bool) -> None:
    """Say what was written, and how much of it was proven."""
    if as_json:
        print_json(result.to_data())
        return
    _say_size(result.file, result.blocks, result.file_bytes)
    same = "every tensor is byte for byte that of the source"
    if not result.verified:
        stdout().print("not verified (--no-verify)")
    elif result.proof is None:
        stdout().print(
            f"[yellow]partially verified[/]: {same}; not run, since {escape(result.unproven or '')}", soft_wrap=True
        )
    else:
        _say_proof(result.proof, f"{same}; transformers reads it")


def show_exported(exported: ExportResult, *, as_json: bool) -> None:
    """Say what was written, how much of it was proven, and what the exporter has to say besides."""
    if as_json:
        print_json(exported.to_data())
        return
    for result in exported.written:
        if isinstance(result, GgufResult):
            show_pruned_gguf(result, as_json=False)
        else:
            show_applied(result, as_json=False)
    for line in exported.lines:
        stdout().print(line, soft_wrap=True, markup=False)


def _say_size(what: str, blocks: int, count: int) -> None:
    stdout().print(f"wrote {what}: {blocks} blocks, {size(count)}", soft_wrap=True, markup=False)


def _say_recovery(recovery: RecoveryRecord) -> None:
    stages = {"dense": recovery.dense, "pruned": recovery.pruned, "recovered": recovery.closed_form_losses}
    stages |= {"healed": recovery.heal.losses if recovery.heal else None}
    perplexities = [f"{what} {math.exp(losses.loss):.2f}" for what, losses in stages.items() if losses]
    text = recovery.text
    stdout().print(
        f"perplexity on {recovery.held_out} held-out sequences of {text.title}: {', '.join(perplexities)}; "
        f"{recovery.share:.0%} of the lost nats came back",
        soft_wrap=True,
        markup=False,
    )


def _say_proof(proof: Proof, loaded: str) -> None:
    if proof.logits_difference is None:
        stdout().print(
            f"[yellow]partly proven[/]: {proof.partial}; transformers finds every weight in the files, and their bytes "
            "are those of the dense model; no logits were compared",
            soft_wrap=True,
        )
        return
    how = "bitwise equal to" if proof.logits_difference == 0 else f"within {proof.logits_difference:.1g} of"
    allowed = f" (allowed: {proof.logits_tolerance:.1g} of the largest)" if proof.logits_tolerance else ""
    saves = (
        f"[yellow]not proven[/] is that it can be saved again: {proof.partial}" if proof.partial else "it saves again"
    )
    reference = {"dense": "the dense model with these blocks skipped", "recovered": "the recovered model in memory"}[
        proof.reference
    ]
    stdout().print(
        f"[green]proven[/] in {proof.dtype} on {proof.device}: {loaded}; its logits on {proof.prompt_tokens} "
        f"prompt tokens are {how} those of {reference}{allowed}; it generates with the KV cache; {saves}",
        soft_wrap=True,
    )


def show_evaluation(result: EvalResult, output: Path | None, *, as_json: bool) -> None:
    """Show quality, dense beside pruned; write the result where a file was named."""
    if output is not None:
        save(result, output)
    if as_json:
        print_json(result.to_data())
        return
    console, dense, pruned = stdout(), result.dense, result.pruned
    print_title(console, _title(result))
    table = new_table("", "dense", *(["pruned", "change"] if pruned else []))
    table.add_row("blocks", str(dense.blocks), *([str(pruned.blocks), ""] if pruned else []))
    for number, text in enumerate(dense.perplexities):
        after = pruned.perplexities[number].perplexity if pruned else None
        cells = [] if after is None else [f"{after:.2f}", relative_change(text.perplexity, after)]
        table.add_row(escape(f"perplexity, {_short(text.text)}"), f"{text.perplexity:.2f}", *cells)
    for number, task in enumerate(dense.tasks):
        other = pruned.tasks[number] if pruned else None
        cells = [] if other is None else [_with_error(other), f"{other.value - task.value:+.3f}"]
        table.add_row(escape(f"{task.task}, {task.metric}"), _with_error(task), *cells)
    console.print(table)
    console.print(_setting(result), soft_wrap=True, markup=False)
    for text in dense.perplexities:
        bos = ", each after BOS" if text.bos else ""
        line = f"{text.text}: {text.windows} windows of {text.sequence_length} tokens{bos}"
        console.print(line, soft_wrap=True, markup=False)
    _say_written(output)


def show_benchmark(result: BenchResult, output: Path | None, *, as_json: bool) -> None:
    """Show speed and size, dense beside pruned; write the result where a file was named."""
    if output is not None:
        save(result, output)
    if as_json:
        print_json(result.to_data())
        return
    console = stdout()
    print_title(console, _title(result))
    table = new_table("", "dense", *(["pruned", "dense / pruned"] if result.pruned else []))

    def row(label: str, values: Sequence[float], shape: Callable[[float], str]) -> None:
        table.add_row(label, *map(shape, values), *([f"{values[0] / values[1]:.2f}x"] if values[1:] else []))

    sizes = [measured for measured in (result.dense, result.pruned) if measured]
    row("blocks", [model.blocks for model in sizes], str)
    row("parameters", [model.parameters for model in sizes], lambda count: f"{count / 1e6:,.1f} M")
    row("weights", [model.weights_bytes for model in sizes], size)
    for measured in result.workloads:
        timings = [timing for timing in (measured.dense, measured.pruned) if timing]
        faster = [_speedup(measured.speedup)] if measured.speedup else []
        table.add_section()
        table.add_row(f"{measured.workload.name}, median", *(duration(t.median_seconds) for t in timings), *faster)
        table.add_row("  fastest to slowest", *(_spread(t.seconds) for t in timings))
        table.add_row("  tokens/s", *(f"{t.tokens_per_second:,.1f}" for t in timings))
        peaks = [t.peak_memory_bytes for t in timings if t.peak_memory_bytes]
        if peaks:
            row("  peak memory", peaks, size)
    console.print(table)
    console.print(f"{_setting(result)}, {result.processor}", soft_wrap=True, markup=False)
    for measured in result.workloads:
        console.print(f"{measured.workload.name}: {measured.workload}", soft_wrap=True, markup=False)
    _say_written(output)


def duration(seconds: float) -> str:
    """Say a time as people read it."""
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1000:.2f} ms"


def _title(result: ResultRecord) -> str:
    if not result.removals:
        return result.model.id
    return f"{result.model.id} without blocks {', '.join(map(str, result.removals))}"


def _setting(result: ResultRecord) -> str:
    return f"{result.dtype} on {result.device}"


def _short(text: str) -> str:
    return Path(text).name if "/" in text and ":" not in text else text


def _with_error(task: TaskRecord) -> str:
    return f"{task.value:.3f}" + (f" ± {task.stderr:.3f}" if task.stderr is not None else "")


def _speedup(ratio: float) -> str:
    return f"[bold green]{ratio:.2f}x faster[/]" if ratio >= 1 else f"[bold red]{ratio:.2f}x, slower[/]"


def _spread(seconds: Sequence[float]) -> str:
    return f"{duration(min(seconds))} to {duration(max(seconds))}"


def _say_written(output: Path | None) -> None:
    if output is not None:
        stdout().print(f"wrote {output}", soft_wrap=True, markup=False)

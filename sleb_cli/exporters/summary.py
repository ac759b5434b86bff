"""Export all that is known about a plan as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from textwrap import wrap
from typing import Any

from sleb_cli.exporters import tables
from sleb_cli.exporters.findings import Findings
from sleb_cli.exporters.headline import sentences, warnings
from sleb_cli.exporters.reproduce import commands, on_lines
from sleb_cli.exporters.tables import Table
from sleb_plugins.exporter import Exporter, Pruning

_WIDTH = 80


class Summary(Exporter):
    """What was removed, what that costs and gains, how it was found, and what to do next, in 80 columns."""

    name = "summary"
    description = "all that is known about a plan, as plain text"
    needs_model = False

    def document(self, pruning: Pruning) -> dict[str, Any]:
        """Return the same as data, with the plan and the results behind it."""
        findings = Findings(pruning, public=False)
        return {
            "model": findings.model,
            "blocks": findings.blocks,
            "removals": list(findings.removals),
            "sentences": sentences(findings),
            "warnings": warnings(findings),
            "missing": [{"part": gap.part, "command": gap.command} for gap in findings.missing],
            "commands": commands(findings),
            "plan": pruning.plan,
            "evaluation": pruning.evaluation,
            "benchmark": pruning.benchmark,
        }

    def render(self, pruning: Pruning) -> str:
        """Return the text."""
        findings = Findings(pruning, public=False)
        parts = [_head(findings), *_parts(findings), _next(findings)]
        return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _head(findings: Findings) -> list[str]:
    title = f"{findings.model} without {len(findings.removals)} of {findings.blocks} blocks"
    first, *others = sentences(findings)
    lines = [title, "=" * min(len(title), _WIDTH), *_strip(findings), "", *_wrapped(first)]
    for mark, said in (("-", others), ("!", warnings(findings))):
        for sentence in said:
            lines += _wrapped(sentence, f"{mark} ", "  ")
    return lines


def _strip(findings: Findings) -> Iterator[str]:
    """Draw the blocks in order, a dot for each removed one, above a ruler; in rows of 70."""
    for start in range(0, findings.blocks, 70):
        row = range(start, min(findings.blocks, start + 70))
        yield "  " + "".join("·" if block in findings.removals else "█" for block in row)
        yield "  " + "".join(f"{block:<10}" for block in row[::10]).rstrip()


def _parts(findings: Findings) -> Iterator[list[str]]:
    yield _titled("How the blocks were found", _table(tables.steps(findings)), _settings(findings))
    if findings.texts:
        texts = tables.texts(findings).only("text", "removed", "perplexity", "change", "95 % interval", "bits per byte")
        yield _titled("Perplexity", _table(texts))
        divergence = tables.divergence(findings).only(
            "text", "removed", "mean KL", "median", "99 %", "same first choice"
        )
        yield _titled("Divergence from the dense model, nats per token", _table(divergence))
    if findings.main_tasks:
        tasks = tables.tasks(findings).only(
            "task", "metric", "dense", "pruned", "difference", "95 % interval", "lost", "gained"
        )
        yield _titled("Tasks, in percent and points", _table(tasks))
    if findings.workloads:
        speeds = tables.speeds(findings).only("workload", "removed", "end to end", "speed-up", "95 % interval", "bound")
        yield _titled("Speed (batch x prompt tokens + new tokens)", _table(speeds))
        if memory := tables.memory(findings):
            yield _titled(
                "Peak memory", _table(memory.only("workload", "removed", "peak memory", "weights", "KV cache"))
            )
    if recovery := tables.recovery(findings):
        yield _titled("Recovery, on text that decided nothing", _table(recovery))
    if sample := findings.plan["sample_generation"]:
        lines = [f"prompt: {_one_line(sample['prompt'])}"]
        lines += [
            f"{who} ({sample[f'{who}_repetition']:.0%} repeated): {_one_line(sample[who])}"
            for who in ("dense", "pruned")
        ]
        yield _titled("What both models say", *(_wrapped(line, others="  ") for line in lines))


def _settings(findings: Findings) -> list[str]:
    plan = findings.plan
    search, text = plan["search"], plan["calibration"]
    raced = ", candidates raced" if search["fast"] else ""
    held_out = f" ({search['held_out']} held out)" if search["held_out"] else ""
    return _wrapped(
        f"{search['strategy']} by {search['metric']}{raced}, on {text['source']}: {text['sequences']} x "
        f"{text['sequence_length']} tokens{held_out}, {search['dtype']} on {search['device']}"
    )


def _next(findings: Findings) -> list[str]:
    name = findings.plan_argument
    missing = [(f"{gap.part} not measured", gap.command) for gap in findings.missing]
    again, apply = commands(findings)
    # The plan may hold more removals than this size.
    apply += f" --remove {len(findings.removals)}"
    steps = [*missing, ("the pruned model", apply), ("a page with pictures", f"sleb export {name} --to report")]
    lines = [line for what, command in steps for line in (f"{what}:", f"    {on_lines(command)}")]
    return _titled("Next", lines, ["the same search again:", f"    {on_lines(again)}"])


def _titled(title: str, *parts: Iterable[str]) -> list[str]:
    return [title, "-" * len(title), *(line for part in parts for line in part)]


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    """Break a text into lines, but no number from its per cent."""
    kept = text.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = wrap(kept, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(table: Table) -> Iterator[str]:
    """Yield aligned lines; where they are too long, the first column is shortened."""
    rows = [list(table.columns), *(list(row) for row in table.rows)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(table.columns))]
    widths[0] = max(8, min(widths[0], _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    for row in rows:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
        cells = [first.ljust(widths[0])]
        for number, cell in enumerate(row[1:], start=1):
            cells.append(cell.ljust(widths[number]) if number in table.words else cell.rjust(widths[number]))
        yield "  ".join(cells).rstrip()

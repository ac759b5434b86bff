"""Export all that is known about a plan as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from sleb_cli.exporters.findings import Findings, read_findings
from sleb_cli.exporters.headline import sentences, warnings
from sleb_cli.exporters.reproduce import commands, on_lines
from sleb_cli.tables import quality, search, speed
from sleb_cli.tables.table import Table, to_text
from sleb_plugins.exporter import Exporter, Pruning

_WIDTH = 80


class Summary(Exporter):
    """What was removed, what that costs and gains, how it was found, and what to do next, in 80 columns."""

    name = "summary"
    description = "everything known about a plan, as plain text"
    needs_model = False

    def document(self, pruning: Pruning) -> dict[str, Any]:
        """Return the same as data, with the plan and the results behind it."""
        findings = read_findings(pruning, public=False)
        return {
            "model": findings.plan.model.id,
            "blocks": findings.plan.model.blocks,
            "removals": list(findings.plan.removals),
            "sentences": sentences(findings),
            "warnings": warnings(findings),
            "missing": [{"part": part, "command": command} for part, command in findings.missing],
            "commands": commands(findings),
            "plan": pruning.plan,
            "evaluation": pruning.evaluation,
            "benchmark": pruning.benchmark,
        }

    def render(self, pruning: Pruning) -> str:
        """Return the text."""
        findings = read_findings(pruning, public=False)
        parts = [_head(findings), *map(_drawn, _tables(findings)), _said(findings), _next(findings)]
        return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _head(findings: Findings) -> list[str]:
    model = findings.plan.model
    title = f"{model.id} without {len(findings.plan.removals)} of {model.blocks} blocks"
    strip = search.block_strip(model.blocks, search.removed_kinds(findings.plan), _WIDTH)
    first, *others = sentences(findings)
    lines = [title, "=" * min(len(title), _WIDTH), *strip, "", *_wrapped(first)]
    for mark, said in (("-", others), ("!", warnings(findings))):
        for sentence in said:
            lines += _wrapped(sentence, f"{mark} ", "  ")
    return lines


def _tables(findings: Findings) -> Iterator[Table]:
    plan = findings.plan
    yield search.steps(plan)
    yield quality.perplexities(findings.scored_texts)
    yield quality.divergences(findings.scored_texts)
    yield quality.tasks(findings.scored_tasks)
    yield speed.speeds(findings.timed, plan.model.blocks)
    yield speed.memory(findings.timed)
    if plan.recovery:
        yield search.recovery(plan.recovery)


def _drawn(table: Table) -> list[str]:
    if not table.rows:
        return []
    notes = [line for note in table.notes for line in _wrapped(note)]
    return [table.title, "-" * len(table.title), *to_text(table, _WIDTH), *notes]


def _said(findings: Findings) -> list[str]:
    sample = findings.plan.sample_generation
    if sample is None:
        return []
    said = [f"{who} ({repeated}): {text}" for who, repeated, text in search.said(sample)]
    title = "What both models say"
    lines = [
        line for text in (f"prompt: {sample.prompt}", *said) for line in _wrapped(" ".join(text.split()), "", "  ")
    ]
    return [title, "-" * len(title), *lines]


def _next(findings: Findings) -> list[str]:
    again, apply = commands(findings)
    steps = [
        *((f"{part} not measured", command) for part, command in findings.missing),
        # The plan may hold more removals than this size.
        ("the pruned model", f"{apply} --remove {len(findings.plan.removals)}"),
        ("a page with pictures", f"sleb export {findings.plan_argument} --to report"),
        ("the same search again", again),
    ]
    return ["Next", "----", *(line for what, command in steps for line in (f"{what}:", f"    {on_lines(command)}"))]


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return wrap(text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

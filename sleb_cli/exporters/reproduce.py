"""The two commands that make the same pruned model again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from sleb_cli.exporters.findings import Findings


def commands(findings: Findings) -> list[str]:
    """Return a `sleb search` and a `sleb apply` for a shell."""
    return [_search(findings), _apply(findings)]


def _search(findings: Findings) -> str:
    return f"sleb search --config {findings.plan_argument}"


def _apply(findings: Findings) -> str:
    values: dict[str, Any] = {}
    if recovery := findings.plan.recovery:
        text, heal = recovery.train_text, recovery.heal
        values = {"recover": True if recovery.closed_form else None}
        if heal:
            minutes = None if heal.minutes is None else f"{heal.minutes:g}"
            values |= {"heal": True, "heal_tokens": heal.token_budget, "heal_minutes": minutes}
        drawn = sum(part.sequences for part in (text, recovery.validation_text, recovery.test_text))
        values |= {
            "calibration": text.source,
            "samples": None if text.source.endswith("-sleb") else drawn,
            "sequence_length": text.sequence_length,
            "seed": text.seed or None,
            "chat": text.chat,
        }
    return " ".join(["sleb apply", findings.plan_argument, *map(shlex.quote, _options(values))])


def _options(values: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            words += [f"--{option}", ",".join(map(str, value))]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def on_lines(command: str, width: int = 76) -> str:
    """Break a command of a shell between its options, where it is too long for a line."""
    options: list[str] = []
    for word in shlex.split(command):  # a quoted word may hold what looks like options
        quoted = word if word == "…" else shlex.quote(word)
        if options and not re.match(r"--?[a-z]", word):
            options[-1] += f" {quoted}"
        else:
            options.append(quoted)
    lines = [options[0]]
    for option in options[1:]:
        if len(lines[-1]) + len(option) > width:
            lines.append("   ")
        lines[-1] += f" {option}"
    return " \\\n".join(lines)

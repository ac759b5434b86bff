"""The two commands that make the same pruned model again."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from sleb_cli.exporters.findings import Findings
from sleb_cli.plan import SearchRecord


def commands(findings: Findings) -> list[str]:
    """Return a `sleb search` and a `sleb apply` for a shell."""
    return [_search(findings), _apply(findings)]


def _search(findings: Findings) -> str:
    plan = findings.plan
    model, search, text, sample = plan.model, plan.search, plan.calibration, plan.sample_generation
    is_demo = model.id == "demo"
    presets = text.source.endswith("-sleb")  # their samples count rows of text, not the sequences recorded
    values: dict[str, Any] = {
        **_target(search, model.blocks),
        "metric": search.metric,
        "strategy": search.strategy,
        "beam_width": search.beam_width,
        "calibration": text.source,
        "samples": None if presets else text.drawn,
        "sequence_length": None if presets else text.sequence_length,
        "seed": text.seed,
        "chat": text.chat,
        "holdout": search.holdout or None,
        "sample_tokens": sample.new_tokens if sample else None,
        "protect_first": search.protect_first,
        "protect_last": search.protect_last,
        "protect": ",".join(map(str, search.protect)) or None,
        # The machine decides these, and they decide the last digits.
        "dtype": search.dtype,
        "device": search.device,
        "load_in": search.load_in,
        "batch_size": search.batch_size,
        "revision": None if is_demo else model.revision,
        "fast": search.fast,
        "skip_bad_sequences": True if text.skipped else None,
    }
    output = "" if findings.plan_argument == "plan.json" else f" -o {findings.plan_argument}"
    return shlex.join(["sleb", "search", model.id, *_options(values)]) + output


def _target(search: SearchRecord, blocks: int) -> dict[str, Any]:
    target = search.target
    if target is None:
        # A plan that was cut to fewer removals still names the ratio of the whole.
        exact = search.ratio and math.ceil(float(search.ratio) * blocks) == search.remove
        return {"ratio": search.ratio} if exact else {"remove": search.remove}
    values: dict[str, Any] = {target.name: target.asked, "target_workload": target.workload}
    if serving := target.serving:
        values |= {f"serve_{name}": value for name, value in serving.to_data().items()}
    return values


def _apply(findings: Findings) -> str:
    values: dict[str, Any] = {}
    if recovery := findings.plan.recovery:
        text, heal = recovery.text, recovery.heal
        values = {"recover": True if recovery.closed_form else None}
        if heal:
            minutes = None if heal.minutes is None else f"{heal.minutes:g}"
            values |= {"heal": True, "heal_tokens": heal.token_budget, "heal_minutes": minutes}
        values |= {"calibration": text.source, "sequence_length": text.sequence_length, "seed": text.seed or None}
    return " ".join(["sleb apply", findings.plan_argument, *map(shlex.quote, _options(values))])


def _options(values: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def on_lines(command: str, width: int = 76) -> str:
    """Break a command of a shell between its options, where it is too long for a line."""
    options: list[str] = []
    for word in shlex.split(command):  # a quoted word may hold what looks like options
        quoted = shlex.quote(word)
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

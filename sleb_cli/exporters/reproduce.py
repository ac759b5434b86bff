"""The two commands that make the same pruned model again."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

from sleb_cli.exporters.findings import Data, Findings

# What `sleb search` does unless it is told otherwise; a test holds these against `sleb_cli.requests`.
DEFAULTS: dict[str, Any] = {
    "metric": "nll",
    "strategy": "greedy",
    "protect_first": 1,
    "protect_last": 1,
    "seed": 0,
    "samples": 16,
    "sequence_length": 2048,
    "sample_tokens": 48,
    "calibration": "wikitext2",
    "fast": False,
}
DEMO_DEFAULTS = DEFAULTS | {"samples": 24, "sequence_length": 64, "calibration": "self", "fast": True}


def commands(findings: Findings) -> list[str]:
    """Return a `sleb search` and a `sleb apply` for a shell."""
    return [_search(findings), _apply(findings)]


def _search(findings: Findings) -> str:
    plan = findings.plan
    model, search, text = plan["model"], plan["search"], plan["calibration"]
    default = DEMO_DEFAULTS if model["id"] == "demo" else DEFAULTS
    presets = text["source"].endswith("-sleb")  # their samples count rows of text, not the sequences recorded
    sample = plan["sample_generation"]
    values = {
        **_target(search, model["blocks"]),
        "metric": search["metric"],
        "strategy": search["strategy"],
        "beam_width": search["beam_width"],
        "calibration": text["source"],
        "samples": None if presets else text["sequences"] + len(text.get("skipped") or ()),
        "sequence_length": None if presets else text["sequence_length"],
        "seed": text["seed"],
        "chat": text["chat"],
        "holdout": search["holdout"] or None,
        "sample_tokens": sample["new_tokens"] if sample else None,
        "protect_first": search["protect_first"],
        "protect_last": search["protect_last"],
        "protect": ",".join(map(str, search["protect"])) or None,
        # The machine decides these, and they decide the last digits.
        "dtype": search["dtype"],
        "device": search["device"],
        "load_in": search.get("load_in"),
        "batch_size": search["batch_size"],
        "revision": None if model["id"] == "demo" else model["revision"],
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if _says(name, value, default)]
    flags = [] if search["fast"] == default["fast"] else ["--fast" if search["fast"] else "--no-fast"]
    flags += ["--skip-bad-sequences"] if text.get("skipped") else []
    output = "" if findings.plan_argument == "plan.json" else f" -o {findings.plan_argument}"
    words = ["sleb", "search", model["id"], *(word for option in options for word in option.split("=", 1)), *flags]
    return shlex.join(words) + output


def _target(search: Data, blocks: int) -> dict[str, Any]:
    target = search["target"]
    if target is None:
        # A plan that was cut to fewer removals still names the ratio of the whole.
        exact = search["ratio"] and math.ceil(float(search["ratio"]) * blocks) == search["remove"]
        return {"ratio": search["ratio"]} if exact else {"remove": search["remove"]}
    values = {target["name"]: target["asked"], "target_workload": target["workload"]}
    if serving := target["serving"]:
        values |= {f"serve_{name}": serving[name] for name in ("dtype", "length", "batch")}
    return values


def _says(name: str, value: Any, default: Data) -> bool:
    return value is not None and (name not in default or default[name] != value)


def _apply(findings: Findings) -> str:
    words: list[str] = []
    recovery = findings.plan.get("recovery")
    if recovery:
        words += ["--recover"] if recovery["closed_form"] else []
        text = recovery["text"]
        if heal := recovery["heal"]:
            words += ["--heal"]
            words += ["--heal-tokens", str(heal["token_budget"])] if heal["token_budget"] else []
            words += ["--heal-minutes", f"{heal['minutes']:g}"] if heal["minutes"] else []
        words += ["--calibration", text["source"], "--sequence-length", str(text["sequence_length"])]
        words += ["--seed", str(text["seed"])] if text["seed"] else []
    return " ".join(["sleb apply", findings.plan_argument, *map(shlex.quote, words)])


def on_lines(command: str, width: int = 76) -> str:
    """Break a command of a shell between its options, where it is too long for a line."""
    options: list[str] = []
    for word in shlex.split(command):  # a quoted word may hold what looks like options
        quoted = shlex.quote(word)
        if options and not re.match(r"--?[a-z]", word):
            options[-1] += f" {quoted}"
        else:
            options.append(quoted)
    lines, line = [], ""
    for option in options:
        if line and len(line) + len(option) > width:
            lines.append(line)
            line = "   "
        line = f"{line} {option}" if line else option
    return " \\\n".join([*lines, line])

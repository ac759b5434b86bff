"""Texts and conversations for tests, and settings to calibrate on them."""

import json
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from sleb_cli.checks.mixture import parse_mixture
from sleb_cli.engine.text.settings import CalibrationSettings


def text_settings(source, samples=4, length=48, **changes):
    """Return settings for so many sequences of a text, as the user gives them."""
    shares = parse_mixture(str(source))
    own = CalibrationSettings(
        str(source), shares, samples, length, 0, None, samples_given=True, length_given=True
    )
    return replace(own, **changes)


def talk(*contents, first="user"):
    """Return a conversation in which the user and the assistant say these in turn."""
    roles = cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    return [{"role": role, "content": words} for role, words in zip(roles, contents, strict=False)]


def write_lines(name, **columns):
    """Write a .jsonl file with these columns."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    Path(name).write_text("\n".join(map(json.dumps, rows)))

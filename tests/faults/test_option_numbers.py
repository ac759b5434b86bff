"""Every number that a command takes: one out of reason ends in a sentence, never in a traceback, a hang or nonsense.

The options are read from the requests, so a new one is tried without a word here.
"""

import math
import re
import sys
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import pytest

from conftest import calibration
from sleb_cli import requests
from sleb_plugins import UsageError

NEVER = ("nan", "inf", "-inf", "-1", "9" * (sys.int_info.default_max_str_digits + 1))
PERHAPS = ("0", "1e30", str(10**30))

REQUESTS = {
    "search": requests.SearchRequest,
    "apply": requests.ApplyRequest,
    "eval": requests.EvalRequest,
    "bench": requests.BenchRequest,
    "export": requests.ExportRequest,
}
NEEDED = {
    "beam_width": ("--strategy", "beam"),
    "serve_length": ("--target-memory", "100kB"),
    "serve_batch": ("--target-memory", "100kB"),
    "heal_minutes": ("--heal",),
    "heal_tokens": ("--heal",),
    "limit": ("--tasks", "sleb_repetition"),
    "num_fewshot": ("--tasks", "sleb_repetition"),
    "show_flips": ("--tasks", "sleb_repetition"),
    "device_flops": ("--estimate", "--device-bandwidth", "1e9"),
    "device_bandwidth": ("--estimate", "--device-flops", "1e9"),
}
"""What an option does nothing without."""


def numbers(request):
    """Yield the fields that hold numbers, or text that may be one, and their options."""
    hints = get_type_hints(request, include_extras=True)
    for field in fields(request):
        kind, doc = get_args(hints[field.name])
        kinds = {part for each in (kind, *get_args(kind)) for part in (each, *get_args(each))}
        if kinds & {int, float} and field.default is not MISSING:
            yield field.name, doc.flag or f"--{field.name.replace('_', '-')}"


OPTIONS = [
    *((verb, name, flag, "{}") for verb, request in REQUESTS.items() for name, flag in numbers(request)),
    *(("bench", name, "--sweep", f"{name}={{}}") for name in ("batch", "prompt", "new")),
    ("search", "metric", "--metric", "nll+{}*kl"),
]


@pytest.fixture
def command(tiny_llama, llama_plan, text_file):
    """Return the words of a command that takes no time but for this option."""

    def words(verb, name, *given):
        text = calibration(text_file, 8, 16)
        subject = tiny_llama if name == "blocks" else llama_plan
        if verb == "search":
            target = () if name in requests.TARGET_NAMES or name.startswith("serve_") else ("--remove", 1)
            words = (tiny_llama, *target, *text, "-o", "new.json", "--force", "--sample-tokens", 0)
        elif verb == "apply":
            recover = ("--recover", *text) if name in ("samples", "sequence_length", "seed") else ()
            words = (subject, "-o", "out", "--force", "--no-verify", *recover)
        elif verb == "eval":
            texts = () if "--tasks" in NEEDED.get(name, ()) else ("--perplexity", text_file)
            words = (subject, "--sequence-length", 16, "--max-windows", 2, *texts)
        elif verb == "bench":
            shape = () if given[0] == "--sweep" else ("--batch-size", 1, "--prompt-length", 4, "--new-tokens", 2)
            words = (subject, *shape, "--iterations", 1, "--warmup", 0)
        else:
            words = (subject, "--to", "indices")
        return (verb, *words, *NEEDED.get(name, ()), *given)

    return words


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize(("verb", "name", "flag", "shape"), OPTIONS, ids=lambda part: part.replace("{}", ""))
def test_a_number_out_of_reason_works_or_is_refused_in_a_sentence(run_sleb, command, verb, name, flag, shape):
    for value in (*NEVER, *PERHAPS):
        result = run_sleb(*command(verb, name, flag, shape.format(value)))
        refused = result.exit_code == 2
        assert refused or (value in PERHAPS and result.exit_code == 0), (value[:40], result.stderr)
        assert not refused or re.search(r"error: \S.*[.?]|Invalid value", result.stderr), (value[:40], result.stderr)


def test_python_is_refused_the_same_numbers():
    for given in ({"cooldown": math.nan}, {"cooldown": math.inf}, {"threads": 0}, {"iterations": 10**30}):
        with pytest.raises(UsageError, match=f"--{next(iter(given))} .* is (too|not a number)"):
            requests.BenchRequest(**given)

"""Every number that a command takes: one out of reason ends in a sentence, never in a traceback, a hang or nonsense.

The options are read from the requests, so a new one is tried without a word here.
"""

import re
import sys
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import pytest

from conftest import calibration
from faults.conftest import often
from sleb_cli import requests

NEVER = ("nan", "inf", "-inf", "-1", "9" * (sys.int_info.default_max_str_digits + 1))
PERHAPS = ("0", str(10**30))
NEEDED = {
    "serve_length": "--target-memory 100kB",
    "heal_minutes": "--heal", "heal_tokens": "--heal", "limit": "--tasks sleb_sums",
    "num_fewshot": "--tasks sleb_sums", "show_flips": "--tasks sleb_sums",
}  # fmt: skip
"""What an option does nothing without."""


def numbers(verb):
    """Yield the options of a command that take a number, or a text that may be one."""
    request = getattr(requests, f"{verb.capitalize()}Request")
    hints = get_type_hints(request)
    for field in fields(request):
        kind = hints[field.name]
        kinds = {part for each in (kind, *get_args(kind)) for part in (each, *get_args(each))}
        if kinds & {int, float} and field.default is not MISSING:
            yield verb, field.name, f"--{field.name.replace('_', '-')}", "{}"


OPTIONS = [
    *(option for verb in ("search", "apply", "eval", "bench", "export") for option in numbers(verb)),
    *(("bench", name, "--sweep", f"{name}={{}}") for name in ("batch", "prompt", "new")),
]


def words_of(verb, name, flag, model, plan, text):
    """Return the words of a command that takes no time but for this option."""
    few = calibration(text, 8, 16)
    match verb:
        case "search":
            target = () if name in requests.TARGET_NAMES or name.startswith("serve_") else ("--remove", 1)
            return (model, *target, *few, "-o", "new.json", "--force", "--sample-tokens", 0)
        case "apply":
            recover = ("--recover", *few) if name in ("samples", "sequence_length", "seed") else ()
            return (model if name == "blocks" else plan, "-o", "out", "--force", "--no-verify", *recover)
        case "eval":
            texts = ("--sequence-length", 16, "--max-windows", 2, "--perplexity", text)
            return (plan, *(() if "--tasks" in NEEDED.get(name, "") else texts))
        case "bench":
            shape = () if flag == "--sweep" else ("--batch-size", 1, "--prompt-length", 4, "--new-tokens", 2)
            return (plan, *shape, *(() if name.startswith("device_") else ("--iterations", 1, "--warmup", 0)))
    return (plan, "--to", "indices")


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize("values", often([NEVER, PERHAPS], [NEVER]), ids=["never", "perhaps"])
@pytest.mark.parametrize(("verb", "name", "flag", "shape"), OPTIONS, ids=lambda part: part.replace("{}", ""))
def test_a_number_out_of_reason_works_or_is_refused_in_a_sentence(
    run_sleb, tiny_llama, llama_plan, text_file, verb, name, flag, shape, values
):
    words = (verb, *words_of(verb, name, flag, tiny_llama, llama_plan, text_file), *NEEDED.get(name, "").split(), flag)
    for value in values:
        result = run_sleb(*words, shape.format(value))
        refused = result.exit_code == 2
        works = (0, 5) if "--tasks" in words else (0,)  # 5: the tiny model is too short for the task
        assert refused or (value in PERHAPS and result.exit_code in works), (value[:40], result.stderr)
        assert not refused or re.search(r"error: \S.*[.?]", result.stderr), (value[:40], result.stderr)

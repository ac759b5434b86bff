"""One line before long work: what, how much, in which data type, and about how long."""

import re

import pytest

import sleb_cli as sleb
from sleb_cli.engine.forward import forecast
from sleb_cli.events import BlockRemoved


@pytest.fixture
def everything_is_long(monkeypatch):
    monkeypatch.setattr(forecast, "LONG", 0.0)


def lines(result):
    assert result.exit_code == 0, result.stderr
    return [line for line in result.stderr.splitlines() if re.search(": (about|at most) ", line)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "Search: 2 of 6 blocks, 28 evaluations of 32 tokens in float32"),
        (("--fast",), "Search: 2 of 6 blocks, at most 28 evaluations"),
        (("--strategy", "refine"), "Search: 2 of 6 blocks, at most"),
        (("--metric", "kl", "--holdout", "0.25"), "Search: 2 of 6 blocks, 21 evaluations"),
    ],
)
def test_a_search_says_what_it_will_do(search, everything_is_long, options, words):
    (line,) = lines(search("--remove", "2", *options))
    assert line.startswith(words)
    assert re.search(r": about \d+ s on this CPU\.$", line)


def test_a_resumed_search_counts_what_is_left(search, everything_is_long, tiny_llama, text_file):
    def stop(event):
        if isinstance(event, BlockRemoved):
            raise KeyboardInterrupt

    text = {"calibration": str(text_file), "samples": 4, "sequence_length": 32}
    with pytest.raises(KeyboardInterrupt):
        sleb.search(sleb.SearchRequest(str(tiny_llama), remove=2, **text), stop)
    (line,) = lines(search("--remove", "2", "--resume"))
    assert line.startswith("Search: 2 of 6 blocks, 12 evaluations")


def test_nothing_is_said_of_short_work_nor_with_quiet(search, monkeypatch):
    assert lines(search("--remove", "2")) == []
    monkeypatch.setattr(forecast, "LONG", 0.0)
    assert search("--remove", "2", "-q", "--force").stderr == ""


def test_recovery_says_it(run_sleb, everything_is_long, llama_plan, text_file):
    options = "--recover", "--heal", "--heal-tokens", "64", "--samples", "8", "--sequence-length", "32"
    found = lines(run_sleb("apply", llama_plan, *options, "--calibration", text_file))
    assert any(re.match(r"Recovery: up to \d blocks? fitted to \d+ tokens in float32: at most", line) for line in found)
    assert any(re.match(r"Healing: 64 tokens in float32: about \d+ s", line) for line in found)

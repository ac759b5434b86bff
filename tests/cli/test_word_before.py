"""One line before long work: what, how much, in which data type, and about how long."""

import re

import pytest

from sleb_cli.engine.forward import forecast


@pytest.fixture
def everything_is_long(monkeypatch):
    monkeypatch.setattr(forecast, "LONG", 0.0)


def lines(result):
    assert result.exit_code == 0, result.stderr
    return [line for line in result.stderr.splitlines() if re.search(": (about|at most) ", line)]


def test_a_search_says_what_it_will_do(search, everything_is_long):
    (line,) = lines(search("--remove", "2"))
    assert re.fullmatch(
        r"Search: 2 of 6 blocks, 28 evaluations of 32 tokens in float32: about \d+ s on this CPU\.", line
    )


def test_short_work_is_not_announced(search):
    assert lines(search("--remove", "2")) == []


def test_recovery_and_healing_say_what_they_will_do(run_sleb, everything_is_long, llama_plan, text_file):
    options = "--recover", "--heal", "--heal-tokens", "64", "--samples", "8", "--sequence-length", "32"
    found = lines(run_sleb("apply", llama_plan, *options, "--calibration", text_file))
    assert any(re.match(r"Recovery: up to \d blocks? fitted to \d+ tokens in float32: at most", line) for line in found)
    assert any(re.match(r"Healing: 64 tokens in float32: about \d+ s", line) for line in found)

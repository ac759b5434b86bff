"""The verbs from Python: the same requests, the same files and the same results as the commands."""

import json
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import sleb_cli as sleb
from conftest import calibration
from sleb_cli.events import TaskStarted
from sleb_cli.plan import read_plan
from sleb_plugins import OutputError, UsageError

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example.py"


@pytest.fixture
def request_for(tiny_llama, text_file):
    """A request that is the same as the command line that `calibration` completes."""

    def make(**options):
        text = {"calibration": str(text_file), "samples": 4, "sequence_length": 32, "sample_tokens": 0}
        return sleb.SearchRequest(str(tiny_llama), **(text | options))

    return make


def without_environment(plan):
    return {key: value for key, value in plan.to_data().items() if key != "environment"}


def test_a_search_is_the_command_s(run_sleb, request_for, tiny_llama, text_file):
    options = (*calibration(text_file), "--sample-tokens", 0, "-o", "typed.json")
    assert run_sleb("search", tiny_llama, "--ratio", 0.3, *options).exit_code == 0
    events = []
    plan = sleb.search(request_for(ratio=0.3, output=Path("called.json")), events.append)
    assert without_environment(plan) == without_environment(read_plan(Path("typed.json")))
    assert without_environment(plan) == without_environment(read_plan(Path("called.json")))
    assert any(isinstance(event, TaskStarted) for event in events)
    assert not Path("called.json.journal").exists()


def test_a_request_says_what_is_wrong_with_it(request_for):
    for request, words in (
        (request_for(), "No target given"),
        (request_for(ratio=0.2, remove=1), "different targets"),
        (request_for(ratio=0.2, compare=("nll", "kl")), "does not compare"),
    ):
        with pytest.raises(UsageError, match=words):
            sleb.search(request)


def test_a_comparison(request_for):
    result = sleb.compare(request_for(remove=1, compare=("nll", "cosine")))
    assert [each.metric for each in result.compared] == ["nll", "cosine"]
    assert read_plan(Path("plan.json")).removals == min(result.compared, key=lambda each: each.perplexity).removals


def test_a_result_that_cannot_be_saved_comes_with_the_error(request_for, monkeypatch):
    def full(record, path):
        raise OutputError("Cannot write.", hint="Free some space.")

    monkeypatch.setattr("sleb_cli.plan.Plan.write", full)
    with pytest.raises(OutputError) as caught:
        sleb.search(request_for(remove=1))
    assert len(caught.value.unsaved["removals"]) == 1


@pytest.mark.slow
def test_the_example_runs(tiny_llama, text_file, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["example.py", str(tiny_llama), str(text_file), "out"])
    runpy.run_path(str(EXAMPLE))
    said = capsys.readouterr().out
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert f"without block {plan.removals[0]:2}: perplexity" in said
    assert f"{6 - len(plan.removals)} blocks, checked: complete, same bytes, loads, same logits" in said
    assert "merge_method: passthrough" in said
    assert json.loads((tmp_path / "out" / "pruned" / "config.json").read_text())["num_hidden_layers"] == 4


@pytest.mark.parametrize("name", ["SearchRequest", "ApplyRequest", "EvalRequest", "BenchRequest", "ExportRequest"])
def test_every_field_of_a_request_is_an_option_with_help(run_sleb, name):
    command = name.removesuffix("Request").lower()
    shown = run_sleb(command, "--help").stdout
    for field in fields(getattr(sleb, name)):
        doc = field.metadata["doc"]
        spelled = doc.metavar if doc.argument else doc.flag or "--" + field.name.replace("_", "-")
        assert all(word in shown for word in spelled.split("/"))
        assert doc.help.endswith((".", ")"))

"""`sleb rerun`: the search of a plan once more, from what it recorded."""

import json

import pytest

from conftest import llama_config, prose, save_model
from sleb_cli.atomic import to_json
from sleb_cli.plan import read_plan


@pytest.mark.parametrize(
    "options",
    [
        ("--remove", 2),
        ("--ratio", "2/5", "--fast", "--seed", 3),
        ("--remove", 2, "--strategy", "refine", "--metric", "nll+0.5*kl", "--protect", "2,4"),
        ("--remove", 2, "--strategy", "refine", "--holdout", 0.25, "--protect-first", 0),
        ("--max-perplexity-ratio", 1.3, "--batch-size", 2),
        ("--target-memory", "200KiB", "--serve-length", 16),
    ],
)
def test_a_search_is_repeated_to_the_last_digit(search, sleb, tmp_path, options):
    search(*options)
    plan = read_plan(tmp_path / "plan.json")
    found = json.loads(sleb("rerun", "--json").stdout)
    again = read_plan(tmp_path / "plan.rerun.json")
    alike = {"environment": again.environment}
    assert to_json(plan.model_copy(update=alike).to_data()) == to_json(again.to_data())
    assert (found["same_tokens"], found["first_other_step"], found["largest_change"]) == (True, None, 0.0)
    assert (found["environment"], found["output"]) == ("", "plan.rerun.json")


def test_what_differs_is_said(search, sleb, tmp_path, tiny_llama):
    text, other = tmp_path / "own.txt", save_model(tmp_path / "other", llama_config(), seed=1)
    text.write_text(prose(200))
    search("--remove", 3, text=text)
    plan = read_plan(tmp_path / "plan.json")
    environment = plan.environment.model_copy(update={"torch": "1.0"})
    plan.model_copy(update={"environment": environment}).write(tmp_path / "older.json")
    assert "also different: torch: " in sleb("rerun", "older.json").stdout
    text.write_text(prose(200, seed=9))
    said = sleb("rerun", "plan.json", "-o", "new.json", "--model", other).stdout
    assert "the calibration tokens differ: " in said
    assert "scores differ by at most " in said
    assert "wrote new.json" in said
    assert json.loads((tmp_path / "new.json").read_text())["model"]["id"] == str(other)


@pytest.mark.parametrize(
    ("change", "options", "code", "message"),
    [
        ({}, ("-o", "plan.json"), 8, "already exists"),
        ({"search": {"metric": "task.yaml"}}, (), 3, "a task file may run code"),
        ({"model": {"id": "moved"}}, (), 3, "does not say where that is"),
        (None, (), 3, "nowhere.json"),
    ],
)
def test_what_cannot_be_repeated_is_refused(search, run_sleb, tmp_path, change, options, code, message):
    search("--remove", 1)
    data = json.loads((tmp_path / "plan.json").read_text())
    for part, values in (change or {}).items():
        data[part] |= values
    (tmp_path / "plan.json").write_text(json.dumps(data))
    result = run_sleb("rerun", "plan.json" if change is not None else "nowhere.json", *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "plan.rerun.json").exists()

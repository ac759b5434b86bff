"""`sleb search --compare`, through `main()`."""

import json
import os

import pytest

from conftest import calibration
from sleb_cli.engine.search import compare as compare_module
from sleb_cli.plan import read_plan


def compare(run_sleb, model, text_file, compared, *options):
    return run_sleb("search", model, *calibration(text_file), "--remove", 2, "--compare", compared, *options)


def test_each_is_what_a_search_of_its_own_finds_and_the_best_is_written(run_sleb, tiny_llama, text_file, tmp_path):
    alone = {}
    for metric, strategy in (("nll", "greedy"), ("cosine", "oneshot"), ("nll", "last")):
        settings = ["--metric", metric, "--strategy", strategy, "--remove", 2, "-o", "alone.json", "--force", "--json"]
        plan = json.loads(run_sleb("search", tiny_llama, *calibration(text_file), *settings).stdout)
        alone[f"{metric}@{strategy}"] = plan
    (tmp_path / "alone.json").unlink()
    result = compare(run_sleb, tiny_llama, text_file, "nll,cosine@oneshot,nll@last", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [f"{each['metric']}@{each['strategy']}" for each in data["compared"]] == list(alone)
    for each, plan in zip(data["compared"], alone.values(), strict=True):
        assert each["removals"] == plan["removals"]
        assert each["perplexity"] == plan["steps"][-1]["perplexity"]
    best = min(alone, key=lambda name: alone[name]["steps"][-1]["perplexity"])
    assert data["best"] == best
    written = read_plan(tmp_path / "plan.json").to_data()
    for plan in (written, alone[best]):
        del plan["environment"]
    assert written == alone[best]
    assert os.listdir(tmp_path) == ["plan.json"]


def test_the_table_says_who_is_best_and_the_model_is_loaded_once(run_sleb, tiny_llama, text_file):
    result = compare(run_sleb, tiny_llama, text_file, "nll,cosine@contiguous")
    assert result.stderr.count("Loading") == 1
    assert "2 of 2: cosine@contiguous" in result.stderr
    assert "wrote plan.json: the plan of " in result.stdout
    assert "contiguous" in result.stdout


def test_only_those_race_that_can(run_sleb, tiny_llama, text_file, tmp_path):
    result = compare(run_sleb, tiny_llama, text_file, "nll,cosine,nll@last", "--fast", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["best"] == "nll@greedy"
    assert read_plan(tmp_path / "plan.json").search.fast
    result = compare(run_sleb, tiny_llama, text_file, "cosine,nll@last", "--fast", "-o", "other.json")
    assert result.exit_code == 0, result.stderr
    assert not read_plan(tmp_path / "other.json").search.fast


def test_an_interrupted_comparison_goes_on(run_sleb, tiny_llama, text_file, tmp_path, monkeypatch):
    whole = json.loads(compare(run_sleb, tiny_llama, text_file, "nll,cosine", "--json").stdout)
    run_search, done = compare_module.run_search, []

    def second_fails(resolved, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(resolved)
        return run_search(resolved, *rest)

    monkeypatch.setattr(compare_module, "run_search", second_fails)
    assert compare(run_sleb, tiny_llama, text_file, "nll,cosine", "-o", "again.json").exit_code == 130
    assert "again.json.nll@greedy.journal" in os.listdir(tmp_path)
    monkeypatch.undo()
    os.chdir(tmp_path)
    refused = compare(run_sleb, tiny_llama, text_file, "nll,cosine", "-o", "again.json")
    assert refused.exit_code == 8
    assert "holds an unfinished search" in refused.stderr
    again = compare(run_sleb, tiny_llama, text_file, "nll,cosine", "-o", "again.json", "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    data = json.loads(again.stdout)
    for result in (whole, data):
        for each in result["compared"]:
            del each["seconds"]
    assert data == whole
    assert sorted(os.listdir(tmp_path)) == ["again.json", "plan.json"]


@pytest.mark.parametrize(
    ("compared", "options", "message"),
    [
        ("nll", (), "needs at least two entries"),
        ("nll,nll@greedy", (), "names an entry twice"),
        ("nll,cosine@best", (), "There is no strategy 'best'"),
        ("nll,nl", (), "nl"),
        ("nll,cosine@refine", (), "cosine scores single blocks"),
        ("nll,cosine", ("--metric", "nll"), "so --metric does not apply"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_work(
    run_sleb, tiny_llama, text_file, tmp_path, compared, options, message
):
    result = compare(run_sleb, tiny_llama, text_file, compared, *options)
    assert message in result.stderr
    assert result.exit_code == 2
    assert "Loading" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_loss_sets_no_size_to_compare_at(run_sleb, tiny_llama, text_file):
    options = [*calibration(text_file), "--compare", "nll,cosine", "--max-loss-increase", 1]
    assert "at the same size" in run_sleb("search", tiny_llama, *options).stderr


def test_where_sequences_are_held_out_they_decide(run_sleb, tiny_llama, text_file):
    options = ["--holdout", 0.5, "-o"]
    shown = compare(run_sleb, tiny_llama, text_file, "nll,nll@last", *options, "shown.json")
    assert "held out" in shown.stdout
    assert "best on the held-out sequences" in shown.stdout
    data = json.loads(compare(run_sleb, tiny_llama, text_file, "nll,nll@last", *options, "plan.json", "--json").stdout)
    best = min(data["compared"], key=lambda each: each["held_out_perplexity"])
    assert data["best"] == f"{best['metric']}@{best['strategy']}"


def test_what_is_held_out_is_what_each_search_of_its_own_holds_out(run_sleb, tiny_llama, text_file):
    held_out = ["--holdout", 0.5, "-o"]
    compared = compare(run_sleb, tiny_llama, text_file, "nll,cosine@oneshot", *held_out, "best.json", "--json")
    for each in json.loads(compared.stdout)["compared"]:
        chosen = ["--metric", each["metric"], "--strategy", each["strategy"], "--remove", 2, "--force", "--json"]
        alone = run_sleb("search", tiny_llama, *calibration(text_file), *chosen, *held_out, "alone.json")
        last = json.loads(alone.stdout)["steps"][-1]
        assert each["perplexity"] == last["perplexity"]
        assert each["held_out_perplexity"] == last["held_out"]["perplexity"]

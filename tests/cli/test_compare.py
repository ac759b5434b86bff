"""`sleb search --compare`, through `main()`."""

import json
import os

import pytest

from sleb_cli.engine.search import compare as compare_module
from sleb_cli.plan import read_plan


@pytest.fixture
def compare(search):
    return lambda compared, *options, code=0: search(
        "--remove", 2, "--compare", compared, *options, code=code
    )


@pytest.mark.parametrize("options", [(), ("--holdout", 0.5)])
def test_each_is_a_search_of_its_own_and_keeps_its_plan(compare, found, tmp_path, options):
    alone = {}
    for metric, strategy in (("nll", "greedy"), ("cosine", "contiguous")):
        alone[f"{metric}@{strategy}"] = found(
            "--remove", 2, "--metric", metric, "--strategy", strategy, *options
        )
    result = compare("nll,cosine@contiguous", *options, "--force", "--json")
    data = json.loads(result.stdout)
    assert result.stderr.count("Loading") == 1
    assert "2 of 2: cosine@contiguous" in result.stderr
    assert [f"{each['metric']}@{each['strategy']}" for each in data["compared"]] == list(alone)
    deciding = {}
    for each, (name, plan) in zip(data["compared"], alone.items(), strict=True):
        last = plan.steps[-1]
        assert (tuple(each["removals"]), each["perplexity"]) == (plan.removals, last.perplexity)
        assert each["held_out_perplexity"] == (last.held_out.perplexity if options else None)
        deciding[name] = each["held_out_perplexity"] or each["perplexity"]
    assert data["best"] == min(deciding, key=deciding.__getitem__)
    for each, (name, plan) in zip(data["compared"], alone.items(), strict=True):
        assert each["file"] == ("plan.json" if name == data["best"] else f"plan.{name}.json")
        assert (
            read_plan(tmp_path / each["file"]).model_copy(update={"environment": plan.environment})
            == plan
        )
    assert sorted(os.listdir(tmp_path)) == sorted(each["file"] for each in data["compared"])


def test_only_force_replaces_a_plan_and_removes_the_plans_of_an_earlier_comparison(
    compare, tmp_path
):
    (tmp_path / "plan.cosine@greedy.json").write_text("mine")
    assert "plan.cosine@greedy.json already exists" in compare("nll,cosine", code=8).stderr
    best = json.loads(compare("nll,cosine", "--force", "--json").stdout)["best"]
    (tmp_path / f"plan.{best}.json").write_text("of an earlier one")
    compare("nll,cosine", "--force")
    assert not (tmp_path / f"plan.{best}.json").exists()
    assert len(os.listdir(tmp_path)) == 2


def test_only_those_race_that_can(compare, tmp_path):
    shown = compare("cosine,nll@oneshot", "--fast", "--holdout", 0.5).stdout
    assert read_plan(tmp_path / "plan.json").search.fast is False
    assert "wrote plan.json: the plan of " in shown
    assert "best on the held-out sequences" in shown
    assert "fitted to it" not in shown
    shown = compare("nll,nll@oneshot", "--fast", "--force").stdout
    assert "a metric that is fitted to it" in shown
    assert shown.count("\nwrote plan.") == 2
    assert read_plan(tmp_path / "plan.json").search.fast is True


def test_an_interrupted_comparison_goes_on(compare, tmp_path, monkeypatch):
    whole = json.loads(compare("nll,cosine", "--json").stdout)
    run_search, done = compare_module.run_search, []

    def second_fails(resolved, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(resolved)
        return run_search(resolved, *rest)

    again = ["nll,cosine", "-o", "again.json"]
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "run_search", second_fails)
        compare(*again, code=130)
    assert "again.nll@greedy.json.journal" in os.listdir(tmp_path)
    assert "holds an unfinished search" in compare(*again, code=8).stderr
    data = json.loads(compare(*again, "--resume", "--json").stdout)
    for result in (whole, data):
        for each in result["compared"]:
            del each["seconds"]
            each["file"] = each["file"].replace("again", "plan")
    assert data == whole
    assert len(os.listdir(tmp_path)) == 4

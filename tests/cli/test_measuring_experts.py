"""`sleb eval`, `bench`, `apply` and `export` where experts of a mixture go, or tokens use fewer of
them.
"""

import csv
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import calibration, prose, save_model, shortage_at, slow, write_task
from families import experts_config, tiny_config
from sleb_cli.engine.quality import models
from sleb_cli.saved_results import results_folder

EIGHT = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
CAVEAT = "What the text of the search does not use may be gone"
FAST = ["--iterations 2 --warmup 1 --batch-size 1 --prompt-length 8"]


@pytest.fixture
def mixture(tmp_path):
    """A random Mixtral with eight experts in each block, of which a token uses two."""
    return save_model(tmp_path / "model", tiny_config("mixtral", **EIGHT))


@pytest.fixture
def plan_of(sleb, text_file, tmp_path):
    """Search for experts that a model can do without, and return the plan."""

    def run(model, *, fewer=4, metric="energy"):
        how = ["--unit experts --remove", fewer, "--metric", metric, "--holdout 0.25"]
        sleb("search", model, *how, *calibration(text_file), "-o plan.json --force -q")
        return tmp_path / "plan.json"

    return run


@pytest.fixture
def evaluate(sleb, tmp_path):
    """Run `sleb eval` on a text and a task; return the values of each model, what it prints, and
    what it says.
    """
    (tmp_path / "text.txt").write_text(prose(60))
    rows = [
        {"q": prose(1, seed=number), "choices": [" the road", " a ship"], "gold": number % 2}
        for number in range(8)
    ]
    write_task(tmp_path / "tasks", "mine", rows)
    text = ["--perplexity", tmp_path / "text.txt", "--sequence-length 32 --max-windows 4"]
    task = ["--tasks mine --include-path", tmp_path / "tasks"]

    def run(*words, tasks=True):
        result = sleb("eval", *words, *text, *(task if tasks else []), "--json")
        data = result.data
        found = [
            (scored["dense"], *scored["pruned"]) for scored in (*data["texts"], *data["tasks"])
        ]
        keys = ["perplexity", "items"]
        return (
            [[each[key] for each in of] for key, of in zip(keys, found, strict=False)],
            data,
            result.stderr,
        )

    return run


@pytest.mark.parametrize("model_type", ["mixtral", slow("qwen3_moe"), slow("gpt_oss")])
def test_a_plan_measures_what_its_checkpoint_does(
    evaluate, apply, sleb, plan_of, tmp_path, monkeypatch, model_type
):
    model = save_model(tmp_path / "model", tiny_config(model_type, **EIGHT))
    plan = plan_of(model)
    (texts, items), data, _ = evaluate(plan, "--every 2")
    assert data["sizes"] == [[0, 1], [0, 1, 2, 3]]
    assert len(set(texts)) == 3
    for count, size in enumerate(data["sizes"], start=1):
        out = tmp_path / f"out-{len(size)}"
        told = sleb("apply", plan, "--remove", len(size), "-o", out).stdout
        assert f"experts: 8 to {8 - len(size)} in each block" in told
        assert evaluate(out)[0] == [[texts[count]], [items[count]]]
    streamed = evaluate(plan, "--every 2 --stream --force", tasks=False)[0]
    assert streamed[0] == pytest.approx(texts, rel=1e-6)
    monkeypatch.setattr(models, "memory_shortage", shortage_at(1000))
    assert evaluate(plan, "--every 2 --force")[0] == [streamed[0], items]
    title = "model without 4 of the 8 experts of each block"
    assert (
        sleb(
            "eval", plan, "--perplexity", tmp_path / "text.txt", "--max-windows 1"
        ).stdout.splitlines()[0]
        == title
    )


def test_tasks_alone_load_a_model_whose_experts_are_stacked(sleb, mixture, evaluate, tmp_path):
    task = ["--tasks mine --include-path", tmp_path / "tasks"]
    result = sleb("eval", mixture, "--blocks 2", *task, "--json")
    assert result.data["tasks"][0]["pruned"][0]["removals"] == [2]


def test_groups_lose_as_many(evaluate, sleb, plan_of, tmp_path):
    model = save_model(tmp_path / "model", tiny_config("deepseek_v3", **EIGHT | {"n_group": 2}))
    plan = plan_of(model)
    assert evaluate(plan, "--every 2", tasks=False)[1]["sizes"] == [[0, 1], [0, 1, 2, 3]]
    for words in (["--every 3"], ["--remove 2,3"]):
        assert "has 2 groups of experts" in sleb("eval", plan, *words, code=2).stderr


def test_results_of_another_order_are_others(evaluate, plan_of, mixture, tmp_path):
    found, again = {}, "Measured before"
    for metric in ("energy", "random"):
        found[metric], _, told = evaluate(plan_of(mixture, metric=metric), "--remove 2")
        assert again not in told
    assert found["energy"][0][1] != found["random"][0][1]
    assert len([*(tmp_path / "plan.results").iterdir()]) == 4  # a text and a task of each
    # However many go, the order is the same.
    assert again in evaluate(plan_of(mixture, fewer=2), "--remove 2")[2]
    both = evaluate(plan_of(mixture), "--remove 2,4")[0]
    assert [values[:2] for values in both] == found["energy"]


def test_fewer_experts_per_token(evaluate, apply, sleb, plan_of, mixture, tmp_path, without_memory):
    one = ["--experts-per-token 1"]
    (texts, items), data, _ = evaluate(mixture, *one)
    sizes = {"unit": "experts per token", "count": 2, "ranking": None}
    assert (data["parts"], data["sizes"]) == (sizes, [[0]])
    assert texts[0] != texts[1]
    assert evaluate(mixture, *one, "--stream", tasks=False)[0] == [texts]
    told = apply(mixture, *one).stdout
    assert "experts per token: 2 to 1" in told
    assert "matches the original with as few experts for each token" in told
    assert evaluate(tmp_path / "out")[0] == [[texts[1]], [items[1]]]
    shown = sleb("bench", mixture, *one, *FAST, "--prompt").stdout
    assert "without 1: with 1 expert per token" in shown
    with_plan = sleb("apply", plan_of(mixture), *one, "-o both").stdout
    assert all(
        words in with_plan
        for words in ("experts: 8 to 4 in each block", "experts per token: 2 to 1")
    )


@pytest.mark.parametrize(
    "model_type", ["gemma4_text", slow("dbrx"), slow("kimi_linear"), slow("ernie4_5_moe")]
)
def test_families_read_the_setting_in_their_own_ways(apply, tmp_path, model_type):
    model = save_model(tmp_path / "model", experts_config(model_type))
    told = apply(model, "--experts-per-token 1 --json").data
    assert (told["experts_per_token"]["experts"], told["proof"]["logits_difference"]) == ([2, 1], 0)
    ids, loaded = torch.arange(2, 34)[None], AutoModelForCausalLM.from_pretrained
    assert not torch.equal(*(loaded(folder)(ids).logits for folder in (model, tmp_path / "out")))


def test_weights_that_depend_on_the_setting_are_refused(sleb, tmp_path):
    model = save_model(tmp_path / "model", experts_config("deepseek_v4"))
    assert (
        "has weights whose shapes follow"
        in sleb("eval", model, "--experts-per-token 1", code=4).stderr
    )


def test_what_is_told_of_experts(
    evaluate, plan_of, apply, sleb, mixture, tmp_path, without_memory, steady
):
    plan, title = plan_of(mixture), "without 4 of the 8 experts of each block"
    (texts, _), *_ = evaluate(plan, "--every 2")
    shown = sleb("bench", plan, "--every 2", *FAST, "--prompt").stdout
    assert f"without 4: {title.removeprefix('without ')}" in shown
    assert "blocks" not in shown
    timed = sleb("bench", plan, "--every 2", *FAST, "--engine steady --json").data
    stored = [size["weights_bytes"] for size in (timed["dense"], *timed["pruned"])]
    assert stored == sorted({*stored}, reverse=True)
    apply(plan)
    card = (tmp_path / "out" / "README.md").read_text()
    told = [
        f"# model {title}",
        "chosen by energy on",
        "(held out)",
        f"{texts[2]:.2f}",
        CAVEAT,
        "prompt 1x8, tokens",
    ]
    assert [words for words in told if words not in card] == []
    assert [*results_folder(tmp_path / "out" / "sleb_plan.json").glob("eval-*.json")]
    sleb("export", plan, "--to table -o table.csv")
    rows = [*csv.DictReader((tmp_path / "table.csv").read_text().splitlines())]
    (name,) = [name for name in rows[0] if name.startswith("perplexity") and name.endswith("txt")]
    assert [(row["removed"], float(row[name])) for row in rows] == [*zip("024", texts, strict=True)]
    assert rows[1]["removed from"] == "8 experts of each block"
    sleb("export", plan, "--to report")
    page = (tmp_path / "plan.report.html").read_text()
    assert all(
        words in page
        for words in ("without 4 of the 8 experts of each block", "experts were found", CAVEAT)
    )
    assert not re.search(r"blocks (were )?removed|[Rr]emoved blocks", page)
    plan_of(mixture, metric="random")
    told = sleb("export", plan, "--to table").stderr
    assert "Ignoring 2 results" in told  # what is measured goes in another order

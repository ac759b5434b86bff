"""How far `sleb search` goes, through `main()`."""

import math

import pytest
from transformers import AutoModelForCausalLM

from conftest import llama_config, save_model
from sleb_cli.engine.search.scoring import Scoring
from sleb_cli.plan import read_plan
from sleb_plugins import UnsupportedModelError

BLOCK = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
OUTSIDE = 2 * 320 * 32 + 32


@pytest.fixture
def full(search, tmp_path):
    """All four removals of the tiny Llama."""
    search("--remove 4 -o full.json")
    return read_plan(tmp_path / "full.json")


def increases(plan):
    return [math.log(step.perplexity / plan.dense.perplexity) for step in plan.steps]


def test_parameters_are_those_of_the_checkpoint(search, sleb, tiny_llama, tmp_path, full):
    result = search("--target-params", f"{(OUTSIDE + 4.5 * BLOCK) / 1000}k")
    plan = read_plan(tmp_path / "plan.json")
    assert plan.removals == full.removals[:2]
    assert plan.search.remove == 2
    assert plan.search.target.reached == OUTSIDE + 4 * BLOCK
    assert "57.63k of 76.19k remain; it cost" in result.stdout
    sleb("apply plan.json -o out")
    assert (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("out").parameters())
        == OUTSIDE + 4 * BLOCK
    )
    extend = ["search", tiny_llama, "--extend plan.json --target-params", OUTSIDE + 3 * BLOCK]
    sleb(*extend)
    assert read_plan(tmp_path / "plan.json").removals == full.removals[:3]
    assert "The model is already at 48.3" in sleb(*extend, code=2).stderr


def test_memory_is_weights_and_cache_as_served(search, found):
    a_cache = 2 * 2 * 2 * 8 * 100
    most = 2 * (OUTSIDE + 3 * BLOCK) + 3 * a_cache
    served = ["--dtype bfloat16 --serve-length 100"]
    three, four = (found("--target-memory", bytes_, *served) for bytes_ in (most, most - 1))
    assert (len(three.removals), len(four.removals)) == (3, 4)
    assert three.search.target.reached == most
    assert three.search.target.kv_cache == "a KV cache in bfloat16 for 100 tokens"
    result = search("--target-memory 300kB --force")
    assert (
        "weights in float32 (305 kB) and a KV cache in float32 for 128 tokens (98.3 kB)"
        in result.stderr
    )
    assert "a KV cache in float32 for 128 tokens take" in result.stdout


def test_memory_does_not_depend_on_what_a_processor_computes_in(search, sleb, tmp_path, processor):
    processor()
    search(
        "--target-memory 150kB", model=save_model(tmp_path / "m", llama_config(dtype="bfloat16"))
    )
    plan = read_plan(tmp_path / "plan.json")
    assert (plan.search.dtype, plan.search.target.kv_cache) == (
        "float32",
        "a KV cache in bfloat16 for 128 tokens",
    )
    sleb("search --config plan.json -o again.json")
    assert read_plan(tmp_path / "again.json").removals == plan.removals


@pytest.mark.parametrize("strategy", ["refine", "contiguous"])
def test_a_loss_is_kept_within_by_every_strategy(search, tmp_path, strategy):
    settings = ["--strategy", strategy, "--protect-first 0"]
    search("--remove 4", *settings, "-o all.json")
    found = increases(read_plan(tmp_path / "all.json"))
    most = max(0, found[0]) + 1e-6
    within = next(count for count, increase in enumerate(found) if increase > most)
    search("--max-perplexity-ratio", math.exp(most), *settings)
    plan = read_plan(tmp_path / "plan.json")
    assert len(plan.removals) == within
    assert increases(plan)[-1] <= most
    assert plan.search.target.next > math.exp(most)


def test_a_perplexity_ratio_says_what_one_more_would_cost(search, tmp_path, full):
    ratios = [math.exp(increase) for increase in increases(full)]
    count = next(n for n in range(1, 4) if max(1, *ratios[:n]) < ratios[n])
    limit = (max(1, *ratios[:count]) + ratios[count]) / 2
    result = search("--max-perplexity-ratio", limit)
    plan = read_plan(tmp_path / "plan.json")
    assert plan.removals == full.removals[:count]
    target = plan.search.target
    assert target.next == pytest.approx(ratios[count])
    assert target.reached == pytest.approx(ratios[count - 1])
    assert f"one more removal: {target.next:.4f}" in result.stdout


def test_a_search_for_a_loss_that_was_too_small_goes_on(search, tmp_path):
    own = [
        "--calibration self --sequence-length 64 --samples 16"
    ]  # so that each removal costs something
    search("--remove 4", *own, "-o full.json")
    full = read_plan(tmp_path / "full.json")
    least = increases(full)[0]
    refused = search("--max-perplexity-ratio", math.exp(least / 2), *own, code=2).stderr
    assert f"perplexity to {math.exp(least):.4g} times" in refused
    assert (tmp_path / "plan.json.journal").exists()
    result = search("--max-perplexity-ratio 1e+40", *own, "--resume")
    assert read_plan(tmp_path / "plan.json").removals == full.removals
    assert "no other block can be removed" in result.stdout
    assert "The search removes up to 4 blocks" in result.stderr


def test_a_model_that_fails_ends_no_search_as_done(search, tmp_path, monkeypatch):
    score = Scoring.score

    def failing(self, removed, candidates):
        if removed:
            raise UnsupportedModelError("The device is gone.", hint="")
        return score(self, removed, candidates)

    monkeypatch.setattr(Scoring, "score", failing)
    assert "The device is gone" in search("--max-perplexity-ratio 1e+40", code=4).stderr
    assert not (tmp_path / "plan.json").exists()
    assert (tmp_path / "plan.json.journal").exists()


def test_one_block_stays(search, sleb, tiny_llama):
    search("--remove 5 --protect-first 0 --protect-last 0")
    told = sleb(
        "search", tiny_llama, "--extend plan.json --max-perplexity-ratio 1e+40", code=4
    ).stderr
    assert "No block can be removed" in told

"""`sleb search --strategy`, through `main()`, and what the other commands make of its plans."""

import itertools
import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import calibration, calibration_sequences
from sleb_cli.plan import read_plan
from sleb_plugins import PlanError


@pytest.fixture
def search(run_sleb, tiny_llama, text_file, tmp_path):
    def run(*options, remove=3):
        command = ["search", tiny_llama, *calibration(text_file), "--remove", remove, "--force", *options]
        result = run_sleb(*command)
        assert result.exit_code == 0, result.stderr
        return result, read_plan(tmp_path / "plan.json")

    return run


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def sequences(tiny_llama, text_file):
    return calibration_sequences(tiny_llama, text_file)


@pytest.fixture
def loss(model, sequences):
    """The loss without a set of blocks, in the slow way."""
    layers = list(model.model.layers)

    @torch.no_grad()
    def of(gone):
        model.model.layers = nn.ModuleList(layer for number, layer in enumerate(layers) if number not in gone)
        logits = model(sequences, use_cache=False).logits[:, :-1]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()))

    return of


@pytest.mark.parametrize("strategy", ["greedy", "refine", "beam", "contiguous", "oneshot", "last"])
def test_each_size_has_the_perplexity_of_the_model_without_its_blocks(search, loss, strategy):
    _, plan = search("--strategy", strategy)
    assert plan.search.strategy == strategy
    for removals, step in zip(plan.by_size, plan.steps, strict=True):
        assert step.perplexity == pytest.approx(math.exp(loss(removals)), rel=1e-4)
        assert step.scores[step.block] == step.score
    assert plan.nested == all(before == after[:-1] for before, after in itertools.pairwise([(), *plan.by_size]))
    assert plan.nested or strategy in ("refine", "beam", "contiguous")


def test_a_wide_beam_finds_the_best_set_of_each_size(search, loss):
    _, plan = search("--strategy", "beam", "--beam-width", 20)
    for size, removals in enumerate(plan.by_size, start=1):
        best = min(itertools.combinations(range(1, 5), size), key=loss)
        assert loss(removals) == pytest.approx(loss(best), abs=1e-6)
    assert plan.search.beam_width == 20


def test_contiguous_finds_the_best_span_of_each_size(search, loss):
    result, plan = search("--strategy", "contiguous")
    for size, removals in enumerate(plan.by_size, start=1):
        spans = [tuple(range(start, start + size)) for start in range(1, 6 - size)]
        assert removals == min(spans, key=loss)
    assert "blocks" in result.stdout
    assert f"{plan.removals[0]}-{plan.removals[-1]} " in result.stdout


@torch.no_grad()
def test_with_a_metric_of_hidden_states_spans_score_from_first_to_last_in_the_dense_model(search, model, sequences):
    _, plan = search("--strategy", "contiguous", "--metric", "cosine")
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append((args[0], output)))
    model(sequences, use_cache=False)
    for size, step in enumerate(plan.steps, start=1):
        for end, score in step.scores.items():
            pair = states[end - size + 1][0], states[end][1]
            expected = 1 - nn.functional.cosine_similarity(*pair, dim=-1).mean()
            assert score == pytest.approx(float(expected), abs=1e-5)


def test_swaps_are_recorded_and_shown(search, loss):
    for first in range(4):  # some protected block makes greedy go wrong
        result, plan = search("--strategy", "refine", "--protect-first", 0, "--protect-last", 0, "--protect", first)
        if plan.steps[-1].swaps:
            break
    else:
        pytest.fail("greedy is right on this model, whichever block is protected")
    swap = plan.steps[-1].swaps[-1]
    assert swap.after == plan.steps[-1].score < swap.before
    assert swap.after == pytest.approx(loss(plan.removals), abs=1e-5)
    assert f"nll {swap.before:.4f} -> {swap.after:.4f}" in result.stdout
    assert "swapped: " in result.stderr


def test_racing_ends_with_the_same_sets(search):
    for strategy in (["refine"], ["beam", "--beam-width", 2]):
        settings = ["--strategy", *strategy, "--samples", 32, "--sequence-length", 64, "--batch-size", 1]
        _, exact = search(*settings)
        _, raced = search(*settings, "--fast")
        assert sorted(raced.removals) == sorted(exact.removals)
        assert any(step.race.dropped for step in raced.steps)


def test_remove_takes_the_blocks_of_that_size(search, run_sleb, tmp_path):
    _, plan = search("--strategy", "contiguous")
    sizes = plan.by_size
    assert not plan.nested
    for size in (1, 2, 3):
        result = run_sleb("export", "plan.json", "--to", "indices", "--remove", size, "--json")
        assert result.exit_code == 0, result.stderr
        assert tuple(json.loads(result.stdout)["document"]["removals"]) == sizes[size - 1]
    result = run_sleb("apply", "plan.json", "--remove", 2, "-o", "two")
    assert result.exit_code == 0, result.stderr
    assert read_plan(tmp_path / "two" / "sleb_plan.json").removals == sizes[1]
    assert ", ".join(map(str, sizes[1])) in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize(
    ("step", "removals", "message"),
    [
        (1, [1, 1], "contain a block twice"),
        (1, [1], "the wrong number of them"),
        (1, [1, 99], "names the wrong blocks"),
    ],
)
def test_a_plan_whose_lists_do_not_agree_is_refused(search, tmp_path, step, removals, message):
    search("--strategy", "contiguous")
    data = json.loads((tmp_path / "plan.json").read_text())
    data["steps"][step]["removals"] = removals
    if message == "contain a block twice":
        data["steps"][step]["block"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "gredy"], "Did you mean 'greedy'?"),
        (["--strategy", "oneshot", "--fast"], "--fast does not apply to --strategy oneshot"),
        (["--strategy", "refine", "--metric", "cosine"], "cosine scores single blocks"),
        (["--strategy", "refine", "--beam-width", 3], "--beam-width does not apply to --strategy refine"),
        (["--strategy", "beam", "--beam-width", 0], "--beam-width 0 is too small"),
        (["--strategy", "contiguous", "--protect", "2,3"], "No 2 consecutive blocks can be removed"),
    ],
)
def test_what_does_not_go_together_is_refused(run_sleb, tiny_llama, text_file, tmp_path, options, message):
    result = run_sleb("search", tiny_llama, *calibration(text_file), "--remove", 2, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["refine", "last"])
def test_only_greedy_plans_are_extended(search, run_sleb, tiny_llama, strategy):
    search("--strategy", strategy, remove=2)
    result = run_sleb("search", tiny_llama, "--extend", "plan.json", "--remove", 3)
    assert result.exit_code == 2
    assert f"works with --strategy greedy only, not with {strategy}" in result.stderr

"""`sleb search --strategy`, through `main()`, and what the other commands make of its plans."""

import itertools
import json
import math
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import calibration_sequences
from reference import plain_loss
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.plan import read_plan
from sleb_plugins import PlanError

THREE = ("--remove", 3, "--strategy")


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def sequences(tiny_llama, text_file):
    return calibration_sequences(tiny_llama, text_file)


@pytest.fixture
def loss(model, sequences):
    """The loss without a set of blocks, in the slow way."""
    return lambda gone: plain_loss(model, model.model.layers, sequences, set(gone))


@pytest.mark.parametrize("strategy", ["greedy", "refine", "contiguous", "oneshot"])
def test_each_size_has_the_perplexity_without_its_blocks(search, loss, strategy):
    result, plan = search(*THREE, strategy), read_plan(Path("plan.json"))
    assert plan.search.strategy == strategy
    assert strategy != "contiguous" or f"{plan.removals[0]}-{plan.removals[-1]} " in result.stdout
    for removals, step in zip(plan.size_keys, plan.steps, strict=True):
        assert step.perplexity == pytest.approx(math.exp(loss(removals)), rel=1e-4)
        assert step.scores[step.block] == step.score
    assert plan.nested == all(
        before == after[:-1] for before, after in itertools.pairwise([(), *plan.size_keys])
    )
    assert plan.nested or strategy in ("refine", "contiguous")


@pytest.mark.parametrize("strategy", ["contiguous", "oneshot"])
def test_sizes_share_a_walk_if_no_choice_needs_a_loss(found, strategy, monkeypatch):
    run_block = create_autospec(SkippableModel.run_block, side_effect=SkippableModel.run_block)
    monkeypatch.setattr(SkippableModel, "run_block", run_block)
    options = ("--metric cosine --protect-first 2 --holdout 0.25 --strategy", strategy)
    runs = []
    # The last target needs the loss of one size before it allows the next.
    for target in ("--remove 1", "--remove 3", "--max-perplexity-ratio 1000"):
        run_block.reset_mock()
        plan = found(*options, target)
        blocks = [call.args[1].block for call in run_block.mock_calls]
        runs.append(blocks.count(0))
    assert len(plan.steps) == 3
    assert runs[0] == runs[1] < runs[2]


@torch.no_grad()
def test_spans_score_by_what_enters_first_and_leaves_last(found, model, sequences):
    plan = found(*THREE, "contiguous", "--metric cosine")
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
        ends = ["--protect-first 0 --protect-last 0"]
        result = search(*THREE, "refine", *ends, "--protect", first, "--force")
        plan = read_plan(Path("plan.json"))
        if plan.steps[-1].swaps:
            break
    else:
        pytest.fail("greedy is right on this model, whichever block is protected")
    swap = plan.steps[-1].swaps[-1]
    assert swap.after == plan.steps[-1].score < swap.before
    assert swap.after == pytest.approx(loss(plan.removals), abs=1e-5)
    assert f"nll {swap.before:.4f} -> {swap.after:.4f}" in result.stdout
    assert "swapped: " in result.stderr


def test_remove_takes_the_blocks_of_that_size(found, sleb, tiny_llama, tmp_path):
    plan = found(*THREE, "contiguous")
    sizes = plan.size_keys
    assert not plan.nested
    result = sleb("export plan.json --to indices --remove 2")
    assert tuple(map(int, result.stdout.split(","))) == sizes[1]
    sleb("apply plan.json --remove 2 -o two")
    assert read_plan(tmp_path / "two" / "sleb_plan.json").removals == sizes[1]
    assert ", ".join(map(str, sizes[1])) in (tmp_path / "two" / "README.md").read_text()
    refused = sleb("search", tiny_llama, "--extend plan.json --remove 4", code=2)
    assert "works with --strategy greedy only, not with contiguous" in refused.stderr
    data = json.loads((tmp_path / "plan.json").read_text())
    for wrong, message in (
        ({"block": 1, "removals": [1, 1]}, "contain a block twice"),
        ({"removals": [1]}, "the wrong number of them"),
        ({"removals": [1, 99]}, "names the wrong blocks"),
    ):
        steps = [data["steps"][0], data["steps"][1] | wrong, data["steps"][2]]
        (tmp_path / "plan.json").write_text(json.dumps(data | {"steps": steps}))
        with pytest.raises(PlanError, match=message):
            read_plan(tmp_path / "plan.json")

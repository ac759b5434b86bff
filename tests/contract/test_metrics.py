"""All four kinds of metric, in a real search, against arithmetic of our own."""

import json
import math
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import sleb_plugins as sleb
from conftest import calibration
from sleb_cli import plugin_manager
from sleb_cli.engine.calibration import draw
from sleb_cli.engine.windows import cut_windows


class KlToDense(sleb.LogitMetric):
    """KL divergence from the dense model: a logit metric that asks for the dense logits."""

    name = "kl"
    needs_dense_logits = True

    def score_tokens(self, logits, targets, dense_logits):
        dense = dense_logits.log_softmax(-1)
        return (dense.exp() * (dense - logits.log_softmax(-1))).sum(-1)


class Magnitude(sleb.WeightMetric):
    name = "magnitude"

    def score_block(self, block):
        return sum(parameter.abs().sum().item() for parameter in block.parameters())


class Taylor(sleb.WeightMetric):
    name = "taylor"
    needs_gradients = True

    def score_block(self, block):
        return sum((p * p.grad).abs().sum().item() for p in block.parameters())


class Loss(sleb.ModelMetric):
    name = "loss"

    def score_model(self, model, tokenizer, sequences):
        assert tokenizer("river").input_ids
        logits = model(input_ids=sequences).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).item()


class Nothing(sleb.ModelMetric):
    name = "nothing"

    def score_model(self, model, tokenizer, sequences):
        return None


class NotANumber(sleb.ModelMetric):
    name = "nan"

    def __init__(self):
        self.calls = 0

    def score_model(self, model, tokenizer, sequences):
        self.calls += 1
        return math.nan if self.calls == 3 else 1.0


class OneForAll(sleb.LogitMetric):
    name = "one-for-all"

    def score_tokens(self, logits, targets, dense_logits):
        return logits.mean()


class OneForAllStates(sleb.HiddenStateMetric):
    name = "one-for-all-states"

    def score_tokens(self, entering, leaving):
        return (entering - leaving).abs()


@sleb.hookimpl
def sleb_metrics():
    return [KlToDense(), Magnitude(), Taylor(), Loss(), Nothing(), NotANumber(), OneForAll(), OneForAllStates()]


@pytest.fixture(autouse=True)
def _this_module_is_a_plugin(monkeypatch):
    ours = EntryPoint("tests", __name__, "sleb")
    monkeypatch.setattr(plugin_manager, "entry_points", lambda group: [*entry_points(group=group), ours])


@pytest.fixture
def search(run_sleb, tiny_llama, text_file):
    def run(metric, *options):
        settings = [*calibration(text_file), "--metric", metric, "--remove", 2, "--json", "--force"]
        return run_sleb("search", tiny_llama, *settings, *options)

    return run


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def sequences(tiny_llama, text_file):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    windows = cut_windows(tokenizer, text_file.read_text(), 32, bos=False)
    return windows[draw(len(windows), 4, 0)]


def plan_of(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_model_metric_that_computes_the_loss_finds_what_nll_finds(search):
    slow, fast = plan_of(search("loss")), plan_of(search("nll"))
    assert slow["removals"] == fast["removals"]
    for theirs, ours in zip(slow["steps"], fast["steps"], strict=True):
        assert theirs["scores"] == pytest.approx(ours["scores"], abs=1e-5)
        assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-5)


@torch.no_grad()
def test_a_logit_metric_gets_the_dense_logits(search, model, sequences):
    plan = plan_of(search("kl"))
    dense = model(sequences).logits[:, :-1].log_softmax(-1)
    block = plan["removals"][0]
    handle = model.model.layers[block].register_forward_hook(lambda module, args, output: args[0])
    pruned = model(sequences, use_cache=False).logits[:, :-1].log_softmax(-1)
    handle.remove()
    expected = (dense.exp() * (dense - pruned)).sum(-1).mean()
    assert plan["steps"][0]["score"] == pytest.approx(float(expected), abs=1e-5)
    assert plan["search"]["engine"] == "fork"


def test_a_weight_metric_sees_parameters(search, model):
    plan = plan_of(search("magnitude"))
    expected = {str(n): sum(p.abs().sum().item() for p in model.model.layers[n].parameters()) for n in range(1, 5)}
    assert plan["steps"][0]["scores"] == pytest.approx(expected, rel=1e-5)


def test_a_weight_metric_may_ask_for_gradients(search, model, sequences):
    plan = plan_of(search("taylor", "--batch-size", 3))
    logits = model(sequences).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).backward()
    layers = model.model.layers
    expected = {str(n): sum((p * p.grad).abs().sum().item() for p in layers[n].parameters()) for n in range(1, 5)}
    assert plan["steps"][0]["scores"] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_cosine_is_what_it_says_after_a_removal_too(search, model, sequences):
    plan = plan_of(search("cosine"))
    removed = plan["removals"][0]
    seen = {}
    layers = model.model.layers
    skip = layers[removed].register_forward_hook(lambda module, args, output: args[0])
    for n in range(1, 5):
        if n != removed:
            layers[n].register_forward_hook(lambda module, args, output, n=n: seen.update({n: (args[0], output)}))
    model(sequences, use_cache=False)
    skip.remove()
    expected = {str(n): float(1 - nn.functional.cosine_similarity(*pair, dim=-1).mean()) for n, pair in seen.items()}
    assert plan["steps"][1]["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_metric_that_gives_no_number_is_named(search, tmp_path):
    result = search("nothing")
    assert result.exit_code == 6
    assert "'nothing' gave None" in result.stderr
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("metric", ["one-for-all", "one-for-all-states"])
def test_scores_of_another_shape_are_refused(search, metric):
    result = search(metric)
    assert result.exit_code == 6
    assert f"'{metric}' gave scores of shape" in result.stderr


def test_a_score_that_is_nan_names_the_block_and_picks_none(search, tmp_path):
    result = search("nan")
    assert result.exit_code == 4
    assert "Without block 3, the score is nan" in result.stderr
    assert not (tmp_path / "plan.json").exists()

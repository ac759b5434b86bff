"""All four kinds of metric, in a real search, against arithmetic of our own."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import sleb_plugins as sleb
from conftest import calibration_sequences, save_model
from families import tiny_config
from sleb_plugins import UsageError, metrics
from sleb_plugins.metrics.magnitude import Magnitude


class Loss(sleb.ModelMetric):
    name = "loss"

    def score_model(self, model, tokenizer, sequences):
        assert tokenizer("river").input_ids
        return loss_of(model(input_ids=sequences).logits, sequences).item()


class Nothing(sleb.ModelMetric):
    name = "nothing"

    def score_model(self, model, tokenizer, sequences):
        return None


class OneForAll(sleb.LogitMetric):
    name = "one-for-all"

    def score_tokens(self, logits, targets, dense_logits):
        return logits.mean()


class Buggy(sleb.HiddenStateMetric):
    name = "buggy"

    def score_tokens(self, entering, leaving):
        raise IndexError("a bug of the plugin")


@sleb.hookimpl
def sleb_metrics():
    return [Loss(), Nothing(), OneForAll(), Buggy()]


@pytest.fixture(autouse=True)
def _this_module_is_a_plugin(as_plugins):
    as_plugins(__name__)


@pytest.fixture
def found(found):
    """Search with a metric for two blocks."""
    return lambda metric, **how: found("--metric", metric, "--remove", 2, **how)


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def sequences(tiny_llama, text_file):
    return calibration_sequences(tiny_llama, text_file)


def skip(model, block):
    return model.model.layers[block].register_forward_hook(lambda module, args, output: args[0])


def loss_of(logits, sequences):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), sequences[:, 1:].flatten())


def test_a_model_metric_of_the_loss_finds_what_nll_finds(found):
    slow = found("loss")
    fast = found("nll")
    assert slow.removals == fast.removals
    for theirs, ours in zip(slow.steps, fast.steps, strict=True):
        assert theirs.scores == pytest.approx(ours.scores, abs=1e-5)
        assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-5)


@torch.no_grad()
def test_kl_is_the_divergence_from_the_dense_model(found, model, sequences):
    plan = found("kl")
    dense = model(sequences).logits[:, :-1].log_softmax(-1)
    skip(model, plan.removals[0])
    pruned = model(sequences, use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = (dense.exp() * (dense - pruned)).sum(-1).mean()
    assert plan.steps[0].score == pytest.approx(float(expected), abs=1e-5)
    assert plan.search.engine == "fork"


@torch.no_grad()
def test_magnitude_is_the_sum_of_absolute_weights(found, model):
    expected = {}
    for n in range(1, 5):
        weights = model.model.layers[n].parameters()
        expected[n] = sum(weight.abs().sum().item() for weight in weights)
    assert found("magnitude").steps[0].scores == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("metric", "of_cosine"),
    [("cosine", lambda cosine: 1 - cosine), ("angular", lambda cosine: cosine.arccos() / math.pi)],
)
def test_metrics_of_states_are_what_they_say_at_each_step(
    found, model, sequences, metric, of_cosine
):
    left = {1, 2, 3, 4}
    for step in found(metric).steps:
        states = model(sequences, use_cache=False, output_hidden_states=True).hidden_states
        expected = {}
        for n in left:
            entering = states[n].double()
            leaving = states[n + 1].double()
            cosine = nn.functional.cosine_similarity(entering, leaving, dim=-1)
            expected[n] = float(of_cosine(cosine).mean())
        assert step.scores == pytest.approx(expected, abs=1e-5)
        skip(model, step.block)
        left.remove(step.block)


def test_angular_sees_small_angles_and_opposite_directions():
    angular = metrics.AngularDistance()
    x = torch.tensor([[[1.0, 0.0]]])
    for angle in (0.0, 1e-5, 0.3, math.pi / 2, 3.0):
        turned = torch.tensor([[[math.cos(angle), math.sin(angle)]]]) * 7
        assert angular.score_tokens(x, turned).item() == pytest.approx(angle / math.pi, rel=1e-4)
    assert angular.score_tokens(x, -x).item() == pytest.approx(1.0)


def test_kl_of_equal_logits_is_zero_with_masked_tokens():
    kl = metrics.KlDivergence()
    targets = torch.zeros(5, dtype=torch.long)
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = -math.inf
    assert kl.score_tokens(logits, targets, logits.clone()).abs().max() < 1e-6
    assert (kl.score_tokens(logits.roll(1, 0), targets, logits) > 0).all()


@pytest.mark.parametrize(("metric", "seed"), [("random", 0), ("random:7", 7)])
def test_random_depends_on_the_seed_and_the_number_alone(found, metric, seed):
    plan = found(metric)
    assert plan.search.metric == metric
    for number, score in plan.steps[0].scores.items():
        assert 0 <= score == metrics.RandomScore(seed).score_block(None, number) < 1


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("nll:3", 2, "'nll' takes no argument, but '3' was given"),
        ("random:x", 2, "The seed of random:x is not a whole number"),
        ("nothing", 6, "'nothing' of unknown package ? returned None"),
        ("one-for-all", 6, "'one-for-all' of unknown package ? returned a float32 Tensor"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_in_time(search, tmp_path, text, code, message):
    said = search("--metric", text, "--remove", 2, code=code).stderr
    assert message in said
    # Only what a metric returns takes a model.
    assert ("tiny-llama …" in said) == (code == 6)
    assert not (tmp_path / "plan.json").exists()


def test_a_bug_of_a_metric_is_not_blamed_on_the_model(search, tmp_path):
    """XLNet's blocks cannot be run alone, so the metric is called in a pass of the whole model."""
    model = save_model(tmp_path / "xlnet", tiny_config("xlnet"))
    said = search("--metric", "buggy", "--remove", 1, model=model, code=6).stderr
    assert "The metric 'buggy' of" in said
    assert "raised IndexError: a bug of the plugin" in said


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_packed_weights_are_not_scored(dtype):
    block = nn.Sequential(nn.LayerNorm(4))
    block.register_buffer("qweight", torch.zeros(4, 4).to(dtype))
    with pytest.raises(UsageError, match="magnitude reads the weights, but qweight is packed"):
        Magnitude().score_block(block, 0)

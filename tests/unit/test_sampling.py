"""Tokens are drawn with the probabilities that the model gives them."""

import pytest
import torch

from conftest import llama_config, random_model, train_tokenizer
from sleb_cli.engine.model.sampling import Sampler, sample
from sleb_cli.engine.text.calibration import CalibrationSettings
from sleb_cli.engine.text.mixture import parse_mixture
from sleb_cli.engine.text.own_text import generate_own_text
from sleb_plugins import UnsupportedModelError


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 100, 640])
def test_each_token_is_drawn_as_often_as_its_probability_says(vocabulary):
    torch.manual_seed(0)
    draws, probabilities = 40_000, torch.randn(vocabulary).mul(2).softmax(-1)
    found = torch.bincount(sample(probabilities.expand(draws, -1)), minlength=vocabulary) / draws
    error = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((found - probabilities).abs() <= 5 * error + 1e-4).all()


def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    torch.manual_seed(0)
    probabilities = torch.full((262_144,), 1e-6)
    probabilities[7] = 1 - probabilities[8:].sum() - 7e-6
    drawn = torch.cat([sample(probabilities.expand(50, -1)) for _ in range(20)])
    rare = int((drawn != 7).sum())
    assert 200 < rare < 325  # 26 % of 1,000
    assert len(set(drawn.tolist())) > rare * 0.95


def test_rows_are_independent_and_forbidden_tokens_never_drawn():
    torch.manual_seed(0)
    first, second = sample(torch.full((2, 10_000), 1e-4)).tolist()
    assert first != second
    scores = torch.zeros(2_000, 3)
    scores[:, 1] = 30.0
    left = Sampler({1, 3})(torch.zeros(2_000, 1), scores)
    assert sorted(set(left.argmax(-1).tolist())) == [0, 2]
    assert (left.isfinite().sum(-1) == 1).all()


def test_a_model_without_finite_logits_writes_no_text():
    model = random_model(llama_config(2))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    settings = CalibrationSettings("self", parse_mixture("self"), 3, 24, 0, None, samples_given=True)
    with pytest.raises(UnsupportedModelError, match="cannot generate text: a row of probabilities sums to nan"):
        generate_own_text(model, train_tokenizer(bos=True), settings, notify=lambda event: None)

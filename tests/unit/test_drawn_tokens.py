"""Tokens are drawn with the probabilities that the model gives them."""

import math

import torch

from sleb_cli.engine.text.writing import draw_tokens


def drawn(scores, forbidden=()):
    return draw_tokens(scores, scores, forbidden=forbidden).argmax(-1)


def test_each_token_is_drawn_as_often_as_its_probability_says():
    torch.manual_seed(0)
    draws = 40_000
    scores = torch.randn(100).mul(2)
    probabilities = scores.softmax(-1)
    found = torch.bincount(drawn(scores.repeat(draws, 1)), minlength=100) / draws
    error = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((found - probabilities).abs() <= 5 * error + 1e-4).all()


def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    torch.manual_seed(0)
    scores = torch.zeros(60, 262_144)
    scores[:, 7] = math.log(262_143)
    tokens = torch.cat([drawn(part) for part in scores.split(30)]).tolist()
    assert 18 < tokens.count(7) < 42  # half of 60
    assert len(set(tokens)) > 0.95 * (60 - tokens.count(7))


def test_rows_are_independent_and_forbidden_tokens_never_drawn():
    torch.manual_seed(0)
    first, second = drawn(torch.zeros(2, 10_000)).tolist()
    assert first != second
    scores = torch.zeros(2_000, 3)
    scores[:, 1] = 30.0
    assert set(drawn(scores, {1, 3}).tolist()) == {0, 2}

"""Changes of low rank, against plain LoRA by automatic differentiation."""

import math

import pytest
import torch
from torch import nn

from sleb_cli.engine.recovery import weights as module
from sleb_cli.engine.recovery.weights import BETAS, CLIP, LowRank, WholeWeights, rank_of

SHAPES = [(24, 16), (3, 10, 12)]
"""A matrix, and a stack of experts."""


def plain_pairs(values):
    """Return A and B of each weight, of rank 4, from the flat values, each as a leaf."""
    pairs = []
    start = 0
    for *stack, rows, columns in SHAPES:
        pair = []
        for shape in ((*stack, 4, columns), (*stack, rows, 4)):
            part = values[start : start + math.prod(shape)]
            start += len(part)
            pair.append(part.view(shape).clone().requires_grad_())
        pairs.append(pair)
    return pairs


def backward(weights, inputs, scale):
    """Add the gradient of a loss that several weights have."""
    for x, weight in zip(inputs, weights, strict=True):
        (scale * (x @ weight.mT).square().sum()).backward()


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((576, 1536), 64),
        ((3, 10, 12), 5),
        ((100, 4), 2),
        ((7, 1, 4), 0),
        ((64,), 0),
        ((), 0),
    ],
)
def test_the_rank_is_at_most_half_of_the_weights_own(shape, rank):
    assert rank_of(shape) == rank


def test_steps_are_those_of_lora_under_adamw(monkeypatch):
    monkeypatch.setattr(module, "RANK", 4)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    weights = [nn.Parameter(value.clone()) for value in start]
    trained = LowRank(weights, start, torch.float32)
    assert all(
        torch.equal(weight, value)
        for weight, value in zip(
            weights,
            start,
            strict=True,
        )
    )
    pairs = plain_pairs(trained.values.detach())
    sizes = [value.square().mean().sqrt() / module.REFERENCE_SIZE for value in start]
    scales = [
        size * 24 / value.shape[-1] ** 0.5
        for size, value in zip(
            sizes,
            start,
            strict=True,
        )
    ]
    leaves = [leaf for pair in pairs for leaf in pair]
    optimizer = torch.optim.AdamW(
        leaves,
        lr=0.01,
        betas=BETAS,
        weight_decay=0.0,
    )
    for step in range(4):
        inputs = [torch.randn(*shape[:-2], 5, shape[-1]) for shape in SHAPES]
        scale = 10**step / 100
        for _ in range(2):  # gradients of several passes add up
            backward(weights, inputs, scale)
        assert all(weight.grad is None for weight in weights)
        changed = []
        for c, value, (down, up) in zip(scales, start, pairs, strict=True):
            changed.append(c * up @ down + value)
        backward(changed, inputs, 2 * scale)
        plain = torch.cat([leaf.grad.flatten() for leaf in leaves])
        torch.testing.assert_close(trained.gradient, plain, rtol=1e-4, atol=1e-4)
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        assert trained.step(0.01)
        plain = torch.cat([leaf.flatten() for leaf in leaves])
        torch.testing.assert_close(
            trained.values.data,
            plain,
            rtol=1e-3,
            atol=1e-4,
        )
    for c, weight, value, (down, up) in zip(
        scales,
        weights,
        start,
        pairs,
        strict=True,
    ):
        torch.testing.assert_close(
            weight,
            value + c * up @ down,
            rtol=1e-3,
            atol=1e-3,
        )
        assert not torch.allclose(weight, value, atol=0.01)
    assert not trained.gradient.any()


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(fault):
    weight = nn.Parameter(torch.ones(4, 4))
    trained = WholeWeights([weight])
    weight.grad[1, 2] = fault
    assert not trained.step(0.1)
    assert not weight.grad.any()
    weight.grad[0] = 3.0
    assert trained.step(0.1)
    assert torch.equal(weight[1:], torch.ones(3, 4))
    assert (weight[0] < 1).all()


def test_steps_too_small_for_bfloat16_add_up():
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    trained = LowRank([weight], [weight.detach().clone()], torch.bfloat16)
    down = trained.values.data[:32].view(4, 8)
    down.fill_(
        0.25 * module.REFERENCE_SIZE * module.INITIAL * math.sqrt(8)
    )  # times the scale: 0.25
    for _ in range(100):
        trained.gradient[32:] = 1.0
        trained.step(1e-4)
    # B goes down by 100 steps of 1e-4, and with four times 0.25 so does the weight.
    torch.testing.assert_close(
        weight.float(),
        torch.full((8, 8), 0.99),
        atol=2e-3,
        rtol=0,
    )

"""Gradients in float16 are those of float32, however many tokens the loss is a mean over."""

import copy

import pytest
import torch

from conftest import llama_config, random_model
from sleb_cli.engine.forward.gradients import blocks_with_gradients
from sleb_cli.engine.forward.loss_scale import LOWEST, without_overflow
from sleb_cli.engine.forward.memory_budget import MemoryBudget
from sleb_cli.engine.forward.passes import Passes
from sleb_cli.engine.forward.skipping import SkippableModel


def gradients(model, sequences, forks):
    """Return all gradients of each block, and what a metric sees beside them."""
    found, dtypes = {}, set()
    with SkippableModel(model, model.model.layers) as skippable:
        budget = MemoryBudget(sequences=8, positions=256, branches=1, kept=0)
        passes = Passes(skippable, torch.split(sequences, 8), budget, lambda event: None, forks)
        for block in blocks_with_gradients(passes, (2,), [1, 3, 4]):
            parameters = list(model.model.layers[block].parameters())
            dtypes |= {p.dtype for p in parameters} | {p.grad.dtype for p in parameters}
            found[block] = torch.cat([p.grad.flatten() for p in parameters])
    return found, dtypes


@pytest.mark.parametrize(("forks", "dtype"), [(True, torch.float16), (False, torch.float16), (True, torch.bfloat16)])
def test_a_mean_over_many_tokens_has_the_gradient_of_float32(forks, dtype):
    model = random_model(llama_config(6)).to(dtype)
    exact = copy.deepcopy(model).float()
    sequences = torch.randint(2, 300, (64, 96), generator=torch.Generator().manual_seed(0))
    found, dtypes = gradients(model, sequences, forks)
    expected, _ = gradients(exact, sequences, forks)
    assert dtypes == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}
    for block, gradient in found.items():
        assert torch.cosine_similarity(gradient, expected[block], dim=0) > 0.998, block
        assert float(gradient.norm() / expected[block].norm()) == pytest.approx(1, abs=0.03)


def test_numbers_that_no_scale_makes_finite_are_left_as_they_are():
    leaf = torch.zeros(1, dtype=torch.float16, requires_grad=True)

    def backward(scale):
        leaf.grad = torch.full((1,), torch.nan, dtype=torch.float16)

    assert without_overflow(backward, [leaf], 1.0) <= LOWEST
    assert leaf.grad.isnan().all()

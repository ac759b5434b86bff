"""The gradient and the steps of healing, against direct computations."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from conftest import llama_config, random_model
from sleb_cli.engine.forward import logits
from sleb_cli.engine.forward.memory_budget import settings_for
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery import variant
from sleb_cli.engine.recovery.distillation import Distillation
from sleb_cli.engine.recovery.heal import can_share
from sleb_cli.engine.recovery.variant import DenseComparison, Variant
from sleb_cli.engine.text.calibration import Calibration

IDS = torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


def dense_and_changed(blocks, changed):
    """Return a model, and another that differs from it in one block."""
    dense, other = (random_model(llama_config(blocks)).requires_grad_(False) for _ in range(2))
    other.model.layers[changed].mlp.down_proj.weight *= 0.5
    return dense, other


@pytest.mark.parametrize(
    "counted", [None, torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4]
)
@pytest.mark.parametrize("positions", [1, 9, 1000])
def test_gradients_in_slices_are_those_of_all_logits_at_once(positions, counted, monkeypatch):
    monkeypatch.setattr(variant, "POSITIONS", positions)
    three = replace(
        settings_for(torch.device("cpu")), widened_bytes=4 * 320 * 3
    )  # positions in float32 at a time
    monkeypatch.setattr(logits, "settings_for", lambda device: three)
    dense, pruned = dense_and_changed(3, 1)
    pruned.model.layers.requires_grad_(True)
    ours, theirs = (
        pruned(IDS).logits[:, :-1].log_softmax(-1),
        dense(IDS).logits[:, :-1].log_softmax(-1),
    )
    every = functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    plain = (every if counted is None else every[counted[:, 1:]]).mean()
    parameters = list(pruned.model.layers.parameters())
    expected = torch.autograd.grad(plain, parameters)
    with (
        SkippableModel(dense, dense.model.layers) as teacher,
        SkippableModel(pruned, pruned.model.layers) as student,
    ):
        mask = torch.ones_like(IDS, dtype=torch.bool) if counted is None else counted
        distillation = Distillation(Variant(teacher), Variant(student), 0)
        found = distillation.add_gradient(distillation.batch(IDS, mask))
        text = Calibration(IDS, None, counted, ())
        loss, divergence = DenseComparison(Variant(teacher), text).losses(Variant(student))
    of_tokens = -ours.gather(-1, IDS[:, 1:, None])[..., 0]
    assert loss == pytest.approx(
        of_tokens[slice(None) if counted is None else counted[:, 1:]].mean().item(), rel=1e-5
    )
    assert found == pytest.approx(plain.item(), rel=1e-5)
    assert divergence == pytest.approx(plain.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert all(
        parameter.grad is None
        for name, parameter in pruned.named_parameters()
        if ".layers." not in name
    )


def test_a_pass_that_starts_at_a_block_gives_the_same_gradients():
    dense, pruned = dense_and_changed(4, 2)
    parameters = list(pruned.model.layers[2:].parameters())
    pruned.model.layers[2:].requires_grad_(True)
    found = []
    with (
        SkippableModel(dense, dense.model.layers) as teacher,
        SkippableModel(pruned, pruned.model.layers) as student,
    ):
        assert can_share(Variant(teacher), Variant(student), 2, IDS)
        assert not can_share(Variant(teacher), Variant(student), 3, IDS)
        for first in (0, 2):
            distillation = Distillation(Variant(teacher), Variant(student), first)
            distillation.add_gradient(distillation.batch(IDS, IDS >= 0))
            found.append([parameter.grad.clone() for parameter in parameters])
            pruned.zero_grad()
    for whole, shared in zip(*found, strict=True):
        torch.testing.assert_close(whole, shared)

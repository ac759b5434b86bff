"""The gradient and the steps of healing, against direct computations."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from conftest import llama_config, random_model
from sleb_cli.engine.forward import logits
from sleb_cli.engine.forward.memory_budget import settings_for
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.recovery import variant
from sleb_cli.engine.recovery.heal import can_share
from sleb_cli.engine.recovery.language import Distillation
from sleb_cli.engine.recovery.variant import DenseComparison, Variant
from sleb_cli.engine.text.calibration import Calibration

IDS = torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


@contextmanager
def dense_and_changed(blocks, changed):
    """Yield a model, and another that differs from it in one block from which on it is trained."""
    dense = random_model(llama_config(blocks)).requires_grad_(False)
    other = random_model(llama_config(blocks)).requires_grad_(False)
    other.model.layers[changed].mlp.down_proj.weight *= 0.5
    other.model.layers[changed:].requires_grad_(True)
    with (
        SkippableModel(dense, dense.model.layers) as teacher,
        SkippableModel(other, other.model.layers) as student,
    ):
        yield Variant(teacher), Variant(student), list(other.model.layers[changed:].parameters())


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("positions", [1, 9, 1000])
def test_gradients_in_slices_are_those_of_all_logits_at_once(positions, share, monkeypatch):
    monkeypatch.setattr(variant, "POSITIONS", positions)
    settings = replace(settings_for(torch.device("cpu")), widened_bytes=4 * 320 * 3)
    monkeypatch.setattr(logits, "settings_for", lambda device: settings)  # three in float32
    mask = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < share
    counted = mask[:, 1:]
    with dense_and_changed(3, 0) as (teacher, student, parameters):
        theirs = teacher.skippable.model(IDS).logits[:, :-1].log_softmax(-1)
        ours = student.skippable.model(IDS).logits[:, :-1].log_softmax(-1)
        every = functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        plain = every[counted].mean()
        expected = torch.autograd.grad(plain, parameters)
        distillation = Distillation(teacher, student, 0)
        found = distillation.add_gradient(distillation.batch(IDS, mask))
        comparison = DenseComparison(teacher, Calibration(IDS, None, mask, ()))
        losses = comparison.losses(student)
    loss = -ours.gather(-1, IDS[:, 1:, None])[..., 0][counted].mean().item()
    assert losses == pytest.approx((loss, plain.item()), rel=1e-5)
    assert found == pytest.approx(plain.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert student.skippable.model.lm_head.weight.grad is None


def test_a_pass_that_starts_at_a_block_gives_the_same_gradients():
    found = []
    with dense_and_changed(4, 2) as (teacher, student, parameters):
        assert can_share(teacher, student, 2, IDS)
        assert not can_share(teacher, student, 3, IDS)
        for first in (0, 2):
            distillation = Distillation(teacher, student, first)
            distillation.add_gradient(distillation.batch(IDS, IDS >= 0))
            found.append([parameter.grad.clone() for parameter in parameters])
            student.skippable.model.zero_grad()
    torch.testing.assert_close(*found)

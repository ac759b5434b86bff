"""Numbers that no loss scale makes finite."""

import torch

from sleb_cli.engine.forward.loss_scale import LOWEST, without_overflow


def test_numbers_that_no_scale_makes_finite_are_left_as_they_are():
    leaf = torch.zeros(1, dtype=torch.float16, requires_grad=True)

    def backward(scale):
        leaf.grad = torch.full((1,), torch.nan, dtype=torch.float16)

    assert without_overflow(backward, [leaf], 1.0) <= LOWEST
    assert leaf.grad.isnan().all()

"""The simulated device itself refuses what a GPU refuses; that it computes what the CPU does, the other files show."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(params=[nullcontext, torch.no_grad, torch.inference_mode])
def mode(request):
    with request.param():
        yield


def ones(device="sim"):
    return torch.ones(2, 4, device=device)


REFUSED = {
    "two devices": lambda: ones("sim:0") + ones("sim:1"),
    "a number of the device": lambda: ones("cpu") * ones().sum(),
    "a list": lambda: torch.cat([ones(), ones("cpu")]),
    "indices of the device": lambda: ones("cpu")[torch.tensor([0], device="sim")],
    "attention": lambda: scaled_dot_product_attention(ones()[None], ones()[None], ones("cpu")[None]),
    "a generator": lambda: torch.randn(2, device="sim", generator=torch.Generator()),
    "float64 moved": lambda: torch.zeros(2, dtype=torch.float64).to("sim"),
    "float64 summed": lambda: ones().sum(dtype=torch.float64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_do_not_mix_and_may_have_no_float64(simulate, mode, name):
    simulate(float64=False)
    text = r"Expected (all tensors to be on the same device|a 'sim' device type)|doesn't support float64"
    with pytest.raises((RuntimeError, TypeError), match=text):
        REFUSED[name]()
    if "float64" in name:
        simulate(float64=True)
        assert REFUSED[name]().dtype is torch.float64

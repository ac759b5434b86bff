"""The simulated device itself: it computes what the CPU computes, and refuses what a GPU refuses."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from conftest import random_model
from families import tiny_config
from simulated_device import BLOCK

IDS = torch.arange(2, 34).reshape(2, 16)


@pytest.fixture(params=[nullcontext, torch.no_grad, torch.inference_mode])
def mode(request):
    with request.param():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "mixtral"])
def test_logits_and_gradients_are_the_cpus(simulate, family, dtype):
    simulate()
    model = random_model(tiny_config(family)).to(dtype)

    def measure(device):
        model.zero_grad()
        ids = IDS.to(device)
        with torch.inference_mode():
            written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        output = model.to(device)(ids, labels=ids)
        output.loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return [tensor.clone() for tensor in (written, output.logits, *gradients)]

    expected = measure("cpu")
    model.to("sim:1")
    found = measure("sim:1")
    assert {str(tensor.device) for tensor in found} == {"sim:1"}
    assert len(found) == len(expected) > 20
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def ones(device="sim"):
    return torch.ones(2, 4, device=device)


REFUSED = {
    "two devices": lambda: ones("sim:0") + ones("sim:1"),
    "a number of the device": lambda: ones("cpu") * ones().sum(),
    "a list": lambda: torch.cat([ones(), ones("cpu")]),
    "a linear layer": lambda: nn.Linear(4, 4).to("sim")(ones("cpu")),
    "indices of the device": lambda: ones("cpu")[torch.tensor([0], device="sim")],
    "attention": lambda: nn.functional.scaled_dot_product_attention(ones()[None], ones()[None], ones("cpu")[None]),
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


def test_memory_is_counted_by_storages_and_refused_beyond_its_size(simulate, mode):
    sim = simulate(memory=2**20)
    assert torch.get_device_module("sim") is sim
    kept = torch.zeros(BLOCK, device="sim:1")
    views = [kept.view(2, -1), kept.detach(), kept[3:]]
    torch.zeros(4 * BLOCK, device="sim:1")
    gc.collect()
    assert (sim.memory_allocated(0), sim.memory_allocated("sim:1")) == (0, 4 * BLOCK)
    assert (sim.max_memory_allocated(1), sim.memory_reserved(1)) == (20 * BLOCK, 20 * BLOCK)
    assert sim.mem_get_info(torch.device("sim:1")) == (2**20 - 20 * BLOCK, 2**20)
    sim.empty_cache()
    sim.reset_peak_memory_stats(1)
    assert (sim.max_memory_allocated(1), sim.mem_get_info(1)[0]) == (4 * BLOCK, 2**20 - 4 * BLOCK)
    del kept, views
    assert sim.memory_allocated(1) == 0
    kept = torch.zeros(2**17, device="sim")
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError, match="SIM out of memory"):
            kept.clone() + kept.clone()
        gc.collect()
        assert sim.memory_allocated() == 2**19
    del kept
    assert torch.zeros(2**18 - BLOCK, device="sim").sum() == 0

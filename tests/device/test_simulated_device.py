"""The simulated device itself: it computes what the CPU computes, and refuses what a GPU refuses."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from conftest import llama_config, opt_config, random_model
from families import tiny_config
from simulated_device import BLOCK

MODES = {"with gradients": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(params=MODES)
def mode(request):
    with MODES[request.param]():
        yield


@pytest.fixture
def sim(simulate):
    return simulate(memory=2**20)


CONFIGS = {
    "llama": llama_config,
    "opt": opt_config,
    "gemma3": lambda: tiny_config("gemma3_text"),
    "mixtral": lambda: tiny_config("mixtral"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param]())


IDS = torch.arange(2, 34).reshape(2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_the_cpus(simulate, model, dtype):
    simulate()
    model.to(dtype)

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


MIXED = {
    "two devices": lambda: ones("sim:0") + ones("sim:1"),
    "a number of the device": lambda: ones("cpu") * ones().sum(),
    "a list": lambda: torch.cat([ones(), ones("cpu")]),
    "a linear layer": lambda: nn.Linear(4, 4).to("sim")(ones("cpu")),
    "indices of the device": lambda: ones("cpu")[torch.tensor([0], device="sim")],
    "attention": lambda: nn.functional.scaled_dot_product_attention(ones()[None], ones()[None], ones("cpu")[None]),
    "a generator": lambda: torch.randn(2, device="sim", generator=torch.Generator()),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_devices_do_not_mix(sim, mode, operation):
    with pytest.raises(RuntimeError, match=r"Expected (all tensors to be on the same device|a 'sim' device type)"):
        operation()


FLOAT64 = {
    "moved": lambda: torch.zeros(2, dtype=torch.float64).to("sim"),
    "summed": lambda: ones().sum(dtype=torch.float64),
}


@pytest.mark.parametrize("operation", FLOAT64.values(), ids=FLOAT64)
def test_it_may_have_no_float64(simulate, mode, operation):
    simulate(float64=True)
    assert operation().dtype is torch.float64
    simulate(float64=False)
    with pytest.raises(TypeError, match="doesn't support float64"):
        operation()


def test_memory_is_counted_by_storages_of_each_device(sim):
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
    assert torch.ones(1, device="sim").numel() * BLOCK == sim.max_memory_allocated(0)


def test_beyond_its_memory_it_raises_torchs_error(sim, mode):
    kept = torch.zeros(2**17, device="sim")
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError, match="SIM out of memory"):
            kept.clone() + kept.clone()
        gc.collect()
        assert sim.memory_allocated() == 2**19
    del kept
    assert torch.zeros(2**18 - BLOCK, device="sim").sum() == 0

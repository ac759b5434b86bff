"""A streamed model has the weights and computes the numbers of the model in memory, in every family."""

import pytest
import torch

from conftest import save_model
from families import FAMILIES, tiny_config
from sleb_cli.engine.forward.placement import Placement, open_dense
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.source import locate_model
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import SlebError

CPU = torch.device("cpu")
IN_CI = ["llama", "mixtral", "gemma3_text", "gpt2", "opt", "mamba", "falcon_h1", "qwen3_moe", "bloom", "phi3", "jamba"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in IN_CI]


def open_model(folder, *, stream, dtype=torch.float32):
    source = locate_model(str(folder), lambda event: None)
    architecture = read_architecture(source, load_plugins(), lambda event: None)
    return open_dense(architecture, Placement(CPU, dtype, stream=stream), lambda event: None)


def require_equal(streamed, resident):
    expected = dict(resident.model.state_dict()) | dict(resident.model.named_buffers())
    found = {}
    for block in streamed.weights.visit(range(len(streamed.switches))):
        module = streamed.switches[block].block
        assert not [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        found |= {
            name: tensor.clone()
            for name, tensor in [*streamed.model.state_dict().items(), *streamed.model.named_buffers()]
            if not tensor.is_meta
        }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_it_is_the_model_in_memory(tmp_path, model_type, dtype):
    try:
        folder = save_model(tmp_path / "model", tiny_config(model_type))
        resident = open_model(folder, stream=False, dtype=dtype)
    except (SlebError, ValueError) as error:
        pytest.skip(f"{model_type} is refused anyway: {error}")
    ids = torch.randint(2, 300, (2, 12))
    with resident:
        try:
            expected = resident.logits(ids, ())
        except SlebError as error:
            pytest.skip(f"{model_type} does not run in {dtype}: {error}")
    streamed = open_model(folder, stream=True, dtype=dtype)
    with streamed:
        assert torch.equal(streamed.logits(ids, ()), expected)
    require_equal(streamed, resident)

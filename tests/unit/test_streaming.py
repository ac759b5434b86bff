"""A streamed model computes the numbers of the model in memory, in every family."""

import pytest
import torch

from conftest import architecture_of, save_model, slow
from families import FAMILIES, tiny_config
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.surgery.loading import Placement
from sleb_cli.events import ignore
from sleb_plugins import SlebError

IN_CI = [
    "llama",
    "mixtral",
    "gemma3_text",
    "gpt2",
    "opt",
    "mamba",
    "falcon_h1",
    "qwen3_moe",
    "bloom",
    "phi3",
    "jamba",
]
OTHERS = [slow(name) for name in FAMILIES if name not in IN_CI]


def opened(folder, *, stream, dtype):
    placement = Placement(torch.device("cpu"), dtype, stream=stream)
    return open_model(architecture_of(folder), placement, ignore)


@pytest.mark.parametrize("model_type", [*IN_CI, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_it_is_the_model_in_memory(tmp_path, model_type, dtype):
    ids = torch.randint(2, 300, (2, 12))
    try:
        folder = save_model(tmp_path / "model", tiny_config(model_type))
        with opened(folder, stream=False, dtype=dtype) as resident:
            expected = resident.logits(ids, ())
    except (SlebError, ValueError) as error:
        pytest.skip(f"{model_type} is refused or does not run in {dtype}: {error}")
    with opened(folder, stream=True, dtype=dtype) as streamed:
        assert torch.equal(streamed.logits(ids, ()), expected)

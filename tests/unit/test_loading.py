"""What is loaded: one set of weights for two models, the same settings for both, straight to the
device.
"""

import json
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import architecture_of, llama_config, save_model
from families import tiny_config
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore

PLACEMENT = Placement(torch.device("cpu"), torch.float32)


def load_both(folder):
    surgery = plan_surgery(architecture_of(folder), (1, 3))
    dense = open_model(surgery.architecture, PLACEMENT, ignore).model
    return dense, load_pruned(surgery, PLACEMENT, ignore, dense=dense)


# transformers converts the tensors of the files of a mixture of experts.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon_h1", "mixtral", "qwen3_moe"])
def test_the_pruned_model_shares_all_weights(tmp_path, model_type):
    folder = save_model(tmp_path / "model", tiny_config(model_type))
    dense, pruned = load_both(folder)
    places = {tensor.data_ptr() for tensor in dense.state_dict().values()}
    from_files = load_pruned(plan_surgery(architecture_of(folder), (1, 3)), PLACEMENT, ignore)
    expected = from_files.state_dict()
    assert pruned.state_dict().keys() == expected.keys()
    for name, tensor in pruned.state_dict().items():
        assert tensor.data_ptr() in places
        assert torch.equal(tensor, expected[name])


def test_all_three_models_generate_by_the_same_settings(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(5))
    own = {"eos_token_id": [1, 9], "repetition_penalty": 1.3, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert run_sleb("apply", folder, "--blocks", "1,3", "-o", "out").exit_code == 0
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for model in (*load_both(folder), written):
        assert {key: getattr(model.generation_config, key) for key in own} == own
    (folder / "generation_config.json").unlink()
    _, pruned = load_both(folder)
    assert pruned.generation_config.eos_token_id == pruned.config.eos_token_id


def test_memory_that_ends_while_loading_is_no_verdict(run_sleb, tiny_llama, text_file, monkeypatch):
    too_large = Mock(
        side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    result = run_sleb("eval", tiny_llama, "--perplexity", text_file)
    assert result.exit_code == 7
    assert f"{tiny_llama} does not fit in the memory of cpu in float32" in result.stderr
    assert "--dtype" in result.stderr

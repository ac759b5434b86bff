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
from sleb_cli.engine.surgery import loading
from sleb_cli.engine.surgery.loading import Placement, load_dense, load_pruned
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import ignore

CPU = torch.device("cpu")


def load_both(folder):
    surgery = plan_surgery(architecture_of(folder), (1, 3))
    dense = load_dense(surgery.architecture, Placement(CPU, torch.float32), ignore)
    return dense, load_pruned(surgery, Placement(CPU, torch.float32), ignore, dense=dense)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "falcon_h1"])
def test_the_pruned_model_shares_all_weights(tmp_path, model_type):
    dense, pruned = load_both(save_model(tmp_path / "model", tiny_config(model_type)))
    places = {tensor.data_ptr() for tensor in dense.state_dict().values()}
    assert all(tensor.data_ptr() in places for tensor in pruned.state_dict().values())


def test_tensors_that_transformers_changes_come_from_the_files(tmp_path, monkeypatch):
    read, factors = loading._with_tensors, [1, 2]  # those of the dense model come first

    def changing(surgery, tensors, *rest):
        model = read(surgery, {name: tensor.clone() for name, tensor in tensors.items()}, *rest)
        model.model.norm.weight.data *= factors.pop()
        return model

    monkeypatch.setattr(loading, "_with_tensors", changing)
    dense, pruned = load_both(save_model(tmp_path / "model", llama_config(5)))
    assert factors == []
    assert torch.equal(pruned.model.norm.weight, dense.model.norm.weight)


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

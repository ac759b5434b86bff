"""Names and settings of the pruned model."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import llama_config, save_model
from sleb_cli.engine.architecture import read_architecture
from sleb_cli.engine.source import ModelSource, locate_model
from sleb_cli.engine.surgery import Surgery, plan_surgery
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import FamilyAdapter, UnsupportedModelError, UsageError


def surgery(removals, blocks=4, path="model.layers", raw=None, config=None, **adapter):
    source = ModelSource("x", Path())
    vars(source)["raw_config"] = raw or {"num_hidden_layers": blocks}
    architecture = SimpleNamespace(
        block_count=blocks,
        adapter=FamilyAdapter("x", frozenset({"x"}), path, **adapter),
        config=SimpleNamespace(**(config or {})),
        source=source,
    )
    return Surgery(architecture, tuple(removals))


def test_tensors_are_dropped_and_renumbered():
    names = ["embed.weight", "model.layers.0.a", "model.layers.1.a", "model.layers.2.b.c", "model.layers.3.a", "norm"]
    pruned = surgery([1]).prune_tensors((name, name) for name in names)
    assert dict(pruned) == {
        "embed.weight": "embed.weight",
        "model.layers.0.a": "model.layers.0.a",
        "model.layers.1.b.c": "model.layers.2.b.c",
        "model.layers.2.a": "model.layers.3.a",
        "norm": "norm",
    }


def test_a_checkpoint_of_the_base_model_leaves_out_the_first_part_of_the_path():
    pruned = surgery([0], path="model.decoder.layers").prune_tensors([("decoder.layers.3.fc1.weight", 0)])
    assert dict(pruned) == {"decoder.layers.2.fc1.weight": 0}


def test_other_numbers_in_names_are_left_alone():
    names = ["vision.layers.1.w", "model.layers_norm.1.w", "model.layers.x.w"]
    assert [name for name, _ in surgery([1]).prune_tensors((name, 0) for name in names)] == names


def test_two_digit_blocks():
    pruned = surgery([2, 9], blocks=12).prune_tensors((f"model.layers.{n}.w", n) for n in range(12))
    assert [name for name, _ in pruned] == [f"model.layers.{n}.w" for n in range(10)]


def test_the_config_loses_the_count_and_the_blocks_own_values():
    raw = {"n_layer": 4, "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4]}
    config = {"layer_types": raw["layer_types"], "attention_layers": [0, 1, 0, 1]}
    keys = ("layer_types", "attention_layers", "absent_layers")
    pruned = surgery([1, 3], raw=raw, config=config, count_key="n_layer", per_block_keys=keys).prune_config()
    assert pruned == {"n_layer": 2, "layer_types": ["a", "c"], "eos_token_id": [1, 2, 3, 4], "attention_layers": [0, 0]}
    assert raw["n_layer"] == 4


@pytest.fixture
def architecture(tiny_llama):
    return read_architecture(locate_model(str(tiny_llama), print), load_plugins(), print)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([1, 1], "Block 1 is named twice"), ([6], "no block 6"), ([-1], "no block -1"), (range(6), "All 6 blocks")],
)
def test_blocks_that_cannot_go(architecture, blocks, message):
    with pytest.raises(UsageError, match=message):
        plan_surgery(architecture, blocks)


def test_weight_files_that_do_not_name_every_block_are_refused(tmp_path, tiny_llama):
    folder = save_model(tmp_path / "model", llama_config(3))
    from safetensors.torch import load_file, save_file

    tensors = {f"odd.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    found = read_architecture(locate_model(str(folder), print), load_plugins(), print)
    with pytest.raises(UnsupportedModelError, match="do not keep 3 blocks under"):
        plan_surgery(found, [1])

"""Names and settings of the pruned model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import llama_config, save_model
from sleb_cli.engine.files.slices import Cut
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.block_names import BlockNames, BlockNumbering, find_block_numbering
from sleb_cli.engine.model.source import ModelSource, locate_model
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import FamilyAdapter, UnsupportedModelError, UsageError
from sleb_plugins.config_keys import Kept


def surgery(
    removals, blocks=4, path="model.layers", raw=None, config=None, prefix=None, extra=0, text_key="", **adapter
):
    source = ModelSource("x", Path())
    vars(source)["raw_config"] = raw or {"num_hidden_layers": blocks}
    numbering = BlockNumbering(prefix or f"{path}.", extra)
    architecture = SimpleNamespace(
        block_count=blocks,
        adapter=FamilyAdapter("x", frozenset({"x"}), path, **adapter),
        numbering=numbering,
        block_names=lambda kept: BlockNames(path, numbering, kept),
        text_config=SimpleNamespace(attribute_map={}, to_dict=lambda: config or {}, **(config or {})),
        text_key=text_key,
        source=source,
    )
    return Surgery(architecture, tuple(removals))


@pytest.mark.parametrize(
    ("how", "before", "after"),
    [
        ({"removals": [1]}, "embed.weight model.layers.0.a norm", "embed.weight model.layers.0.a norm"),
        ({"removals": [1]}, "model.layers.1.a model.layers.2.b.c layers.3.a", "model.layers.1.b.c layers.2.a"),
        ({"removals": [0], "prefix": "transformer.h."}, "transformer.h.3.fc1", "transformer.h.2.fc1"),
        ({"removals": [2, 9], "blocks": 12}, "layers.1.w layers.9.w layers.11.w", "layers.1.w layers.9.w"),
        ({"removals": [1]}, *["vision.layers.1.w model.layers_norm.1.w model.layers.x.w"] * 2),
    ],
)
def test_tensors_are_dropped_and_renumbered(how, before, after):
    assert [name for name, _ in surgery(**how).names.prune((name, None) for name in before.split())] == after.split()


@pytest.mark.parametrize(
    ("stems", "path", "prefix"),
    [
        (["model.layers"], "model.layers", "model.layers."),
        (["layers"], "model.layers", "layers."),
        (["decoder.layers"], "model.decoder.layers", "decoder.layers."),
        (["transformer.h"], "model.layers", "transformer.h."),
        (["vision.layers", "language_model.layers"], "model.language_model.layers", "language_model.layers."),
        (["visual.blocks", "model.layers"], "model.language_model.layers", "model.layers."),
        (["model.layers.0.experts", "model.layers"], "model.layers", "model.layers."),
        (["model.layers.0.mlp.experts", "backbone.layers"], "model.layers", "backbone.layers."),
        (["something.else"], "model.layers", "something.else."),
    ],
)
def test_the_files_say_how_blocks_are_named(stems, path, prefix):
    names = [f"{stem}.{number}.w" for stem in stems for number in range(4)]
    assert find_block_numbering([*names, "norm.weight", "model.rotary.7.w"], path, 4) == BlockNumbering(prefix)


@pytest.mark.parametrize(
    ("numbers", "found"),
    [((0, 2), None), ((0, 1, 2, 7), None), ((0, 1, 2, 3), BlockNumbering("model.layers.", extra=1))],
)
def test_files_that_do_not_name_exactly_each_block(numbers, found):
    assert find_block_numbering([f"model.layers.{number}.w" for number in numbers], "model.layers", 3) == found


def test_blocks_for_multi_token_prediction_go_with_any_other():
    raw = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    names = [f"model.layers.{number}.w" for number in range(4)]
    cut = surgery([1], blocks=3, raw=raw, config=raw, extra=1)
    assert dict(cut.names.prune((name, name) for name in names)) == {
        "model.layers.0.w": "model.layers.0.w",
        "model.layers.1.w": "model.layers.2.w",
    }
    assert cut.prune_config() == {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    # Files without them say nothing of them.
    assert surgery([1], blocks=3, raw=raw, config=raw).prune_config() == raw | {"num_hidden_layers": 2}
    whole = surgery([], blocks=3, raw=raw, config=raw, extra=1)
    assert [name for name, _ in whole.names.prune((name, 0) for name in names)] == names
    assert whole.prune_config() == raw


def test_the_config_loses_the_count_and_the_blocks_own_values():
    raw = {"n_layer": 4, "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4], "novel": [5, 6, 7, 8]}
    config = {**raw, "attention_layers": [0, 1, 0, 1], "mine": "abcd"}
    keys = {"mine": lambda text, kept: "".join(text[block] for block in kept.blocks)}
    pruned = surgery([1, 3], raw=raw, config=config, count_key="n_layer", config_keys=keys).prune_config()
    assert pruned == {
        "n_layer": 2, "layer_types": ["a", "c"], "eos_token_id": [1, 2, 3, 4], "attention_layers": [0, 0],
        "novel": [5, 7], "mine": "ac",
    }  # fmt: skip
    assert raw["n_layer"] == 4


def test_the_language_models_config_inside_of_another():
    raw = {
        "vision_config": {"num_hidden_layers": 4},
        "text_config": {"num_hidden_layers": 4, "layer_types": list("abcd")},
    }
    pruned = surgery([0], raw=raw, config=raw["text_config"], text_key="text_config").prune_config()
    assert pruned["vision_config"] == {"num_hidden_layers": 4}
    assert pruned["text_config"] == {"num_hidden_layers": 3, "layer_types": ["b", "c", "d"]}


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
    tensors = {n.replace("layers.2.", "layer_2."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    found = read_architecture(locate_model(str(folder), print), load_plugins(), print)
    with pytest.raises(UnsupportedModelError, match="do not keep 3 blocks under"):
        plan_surgery(found, [1])


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_removed_blocks_are_cut(axis):
    cut = Cut(axis, Kept((0, 2, 3), 4))
    tensor = torch.arange(8 * 12, dtype=torch.int16).reshape(8, 12)
    expected = tensor[[0, 1, 4, 5, 6, 7]] if axis == 0 else tensor[:, [0, 1, 2, 6, 7, 8, 9, 10, 11]]
    assert torch.equal(cut.of_tensor(tensor), expected)
    assert cut.shape(tensor.shape) == tuple(expected.shape)


def test_which_tensors_are_cut():
    without = surgery([1])
    assert without.cut("model.embed_tokens_per_layer.weight").axis == 1
    assert without.cut("model.embed_tokens.weight") is None
    assert surgery([]).cut("model.embed_tokens_per_layer.weight") is None

"""Names and settings of the pruned model."""

import json
from unittest.mock import Mock

import pytest
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from conftest import architecture_of
from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.files.config_files import CONFIG
from sleb_cli.engine.model.block_names import BlockNumbering
from sleb_plugins import FamilyAdapter


def test_the_config_loses_the_count_and_the_blocks_own_values():
    raw = {
        "n_layer": 4,
        "layer_types": ["a", "b", "c", "d"],
        "eos_token_id": [1, 2, 3, 4],
        "novel": [5, 6, 7, 8],
    }
    config = {**raw, "attention_layers": [0, 1, 0, 1], "mine": "abcd"}
    keys = {"mine": lambda text, kept: "".join(text[block] for block in kept.blocks)}
    architecture = Mock(
        block_count=4,
        text_key_in=lambda values: "",
        source=Mock(raw_config=raw),
        numbering=BlockNumbering("h."),
        adapter=FamilyAdapter("x", frozenset({"x"}), "h", count_key="n_layer", config_keys=keys),
        text_config=type("Text", (), {"attribute_map": {}, "to_dict": lambda text: config})(),
    )
    assert BlockCut(architecture, (1, 3)).settings(CONFIG, raw) == {
        "n_layer": 2,
        "layer_types": ["a", "c"],
        "eos_token_id": [1, 2, 3, 4],
        "attention_layers": [0, 0],
        "novel": [5, 7],
        "mine": "ac",
    }


IMAGES = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_window_layers": 6,
    "rope_theta": 12345.0,
}
FLAT = TEXT | {
    "vision_config": IMAGES,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
NESTED = {
    "text_config": TEXT | {"model_type": "qwen3_vl_text", "head_dim": 8},
    "vision_config": IMAGES | {"deepstack_visual_indexes": [1, 2]},
}


@pytest.mark.parametrize(
    ("model_type", "config", "removed", "obstacle"),
    [
        ("qwen2_5_vl", FLAT, 1, None),
        ("qwen3_vl", NESTED, 2, None),
        ("qwen3_vl", NESTED, 1, "features of images enter the first 2 blocks"),
    ],
)
def test_a_vision_model_is_pruned_wherever_its_text_config_is(
    tmp_path, model_type, config, removed, obstacle
):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "architectures": ["X"]} | config)
    )
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    cut = BlockCut(architecture_of(tmp_path), (removed,))
    found = cut.obstacle()
    assert found is None if obstacle is None else found.startswith(obstacle)
    pruned = cut.settings(CONFIG, cut.architecture.source.raw_config)
    parsed = cut.architecture.read_config(pruned).get_text_config()
    assert (parsed.num_hidden_layers, parsed.hidden_size) == (5, 32)
    assert parsed.rope_parameters["rope_theta"] == 12345.0

"""Names of modules in the settings of quantized checkpoints."""

import re

import pytest

from conftest import architecture_of, llama_config, save_model
from sleb_cli.engine.surgery.quantization import prune_module_names, prune_quantization
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_plugins import UnsupportedModelError


@pytest.fixture(scope="module")
def surgery(tmp_path_factory):
    """A Llama of 24 blocks without 3, 7 and 12."""
    config = llama_config(24, hidden_size=8, intermediate_size=8)
    return Surgery(architecture_of(save_model(tmp_path_factory.mktemp("models") / "tall", config)), (7, 3, 12))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # names, as tensors are called
        ("lm_head", "lm_head"),
        ("self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.3.mlp.gate_proj", None),
        ("model.layers.4", "model.layers.3"),
        ("language_model.model.layers.13.mlp", "language_model.model.layers.10.mlp"),
        ("vision_tower.layers.13.mlp", "vision_tower.layers.13.mlp"),
        ("model.layers.99.mlp", None),
        # compressed-tensors
        ("re:.*lm_head", "re:.*lm_head"),
        (r"re:model\.layers\.4\..*", r"re:model\.layers\.3\..*"),
        (r"re:model\.layers\.12\.mlp\..*", None),
        (r"re:^model[.]layers[.]13[.]mlp", r"re:^model[.]layers[.]10[.]mlp"),
        (r"re:.*layers\.(1[0-9])\..*", r"re:.*layers\.(?:8|9|10|11|12|13|14|15|16)\..*"),
        (r"re:.*layers\.[0-9]+\.mlp.*", r"re:.*layers\.[0-9]+\.mlp.*"),
        (r"re:.*layers\..*3\.mlp.*", r"re:.*layers\.(?:10|20)\.mlp.*"),
        (r"re:(model\.layers\.3|model\.layers\.4)\.mlp.*", r"re:(model\.layers\.(?!)|model\.layers\.3)\.mlp.*"),
        (r"re:lm_head|model\.layers\.3\..*", r"re:lm_head|model\.layers\.(?!)\..*"),
        (r"re:.*vision.*layers\.13\..*", r"re:.*vision.*layers\.13\..*"),
        (r"re:language_model\.model\.layers\.13\..*", r"re:language_model\.model\.layers\.10\..*"),
        # GPTQ
        (r"-:.*\.18\..*gate.*", r"-:.*\.15\..*gate.*"),
        (r"+:.*\.12\..*gate.*", None),
        # globs
        ("*.lm_head", "*.lm_head"),
        ("model.layers.0*", "model.layers.0*"),
        ("model.layers.4.self_attn*", "model.layers.3.self_attn*"),
        ("*layers.*.mlp", "*layers.*.mlp"),
    ],
)
def test_each_way_to_name_modules(surgery, before, after):
    assert prune_module_names([before], surgery.architecture, surgery.names) == ([] if after is None else [after])
    assert prune_module_names({before: {"bits": 4}}, surgery.architecture, surgery.names) == (
        {} if after is None else {after: {"bits": 4}}
    )


@pytest.mark.parametrize("pattern", ["model.layers.1*", r"re:.*layers\..\.mlp.*", r"-:.*[45]\..*gate.*", "*5.mlp*"])
def test_a_pattern_that_cannot_be_renumbered_is_refused(surgery, pattern):
    with pytest.raises(UnsupportedModelError, match="cannot be renumbered exactly") as caught:
        prune_module_names({"ignore": [pattern]}, surgery.architecture, surgery.names)
    assert repr(pattern) in caught.value.message


def test_a_renumbered_pattern_matches_the_same_modules(surgery):
    """The promise itself, for a pattern that is read off nowhere."""
    pattern = r".*layers\.(?:[02468]|1\d|2[0-2])\.(mlp|self_attn)\..*_proj"
    (new,) = prune_module_names([f"re:{pattern}"], surgery.architecture, surgery.names)
    modules = [name for name, _ in surgery.architecture.skeleton.named_modules()]
    before = {name for name in modules if re.match(pattern, name)}
    expected = {name for name, _ in surgery.names.prune((name, None) for name in before)}
    kept = {name for name, _ in surgery.names.prune((name, None) for name in modules)}
    assert {name for name in kept if re.match(new.removeprefix("re:"), name)} == expected
    assert 100 < len(expected) < len(before)


def test_every_place_of_a_config(surgery):
    def config(ignored, groups, extra, skipped):
        targets = {"group_0": {"targets": ["Linear"], "input_activations": None}}
        targets |= {name: {"targets": [target], "weights": {"num_bits": 8}} for name, target in groups.items()}
        settings = {
            "quant_method": "compressed-tensors", "bits": 4, "modules_to_not_convert": None,
            "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]],
            "shapes": [1, 2.5, True, None], "ignore": ["lm_head", *ignored], "config_groups": targets,
            "extra_config": {name: {"bits": 16} for name in extra},
        }  # fmt: skip
        inner = {"quantization_config": {"llm_int8_skip_modules": skipped}}
        others = {"num_hidden_layers": 24, "architectures": ["model.layers.3"]}
        return others | {"quantization_config": settings, "text_config": inner}

    dense = config(
        ["model.layers.3.mlp", "model.layers.4.mlp"],
        {"group_1": r"re:.*layers\.12\..*", "group_2": r"re:.*layers\.(12|13)\..*"},
        ["model.layers.7.mlp", "model.layers.23.mlp"],
        ["model.layers.13.mlp.gate_proj"],
    )
    assert prune_quantization(dense, surgery.architecture, surgery.names) == config(
        ["model.layers.3.mlp"],
        {"group_2": r"re:.*layers\.10\..*"},
        ["model.layers.20.mlp"],
        ["model.layers.10.mlp.gate_proj"],
    )

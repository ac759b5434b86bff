"""Names of modules in the settings of quantized checkpoints."""

import pytest

from conftest import architecture_of, llama_config, save_model
from families import experts_config
from sleb_cli.engine.cut.blocks.block_cut import BlockCut
from sleb_cli.engine.cut.experts.expert_cut import plan_experts
from sleb_cli.engine.cut.quantization import ModuleNames
from sleb_cli.engine.model.experts import find_experts
from sleb_plugins import UnsupportedModelError


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A Llama of 24 blocks without 3, 7 and 12."""
    config = llama_config(24, hidden_size=8, intermediate_size=8)
    cut = BlockCut(
        architecture_of(save_model(tmp_path_factory.mktemp("models") / "tall", config)), (7, 3, 12)
    )
    return ModuleNames(cut.architecture, cut.names.renamed)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # names, as tensors are called
        ("lm_head", "lm_head"),
        ("model.layers.3.mlp.gate_proj", None),
        ("model.layers.4", "model.layers.3"),
        ("language_model.model.layers.13.mlp", "language_model.model.layers.10.mlp"),
        ("vision_tower.layers.13.mlp", "vision_tower.layers.13.mlp"),
        ("model.layers.99.mlp", None),
        # patterns without the number of a block
        ("re:.*lm_head", "re:.*lm_head"),
        (r"re:.*layers\.[0-9]+\.mlp.*", r"re:.*layers\.[0-9]+\.mlp.*"),
        (r"re:.*\.fc1\.\d{1,3}$", r"re:.*\.fc1\.\d{1,3}$"),
        ("*layers.*.mlp", "*layers.*.mlp"),
        # neither
        ("gptqmodel:2.2.0", "gptqmodel:2.2.0"),
        ("0.10.2.dev3+g12ab", "0.10.2.dev3+g12ab"),
    ],
)
def test_each_way_to_name_modules(names, before, after):
    assert names.in_settings([before]) == ([] if after is None else [after])
    assert names.in_settings({before: {"bits": 4}}) == (
        {} if after is None else {after: {"bits": 4}}
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.0*",
        "model.layers.1*",
        "*layers.?.mlp",
        "model.layers.4.self_attn*",
        "*5.mlp*",
        r"re:model\.layers\.4\..*",
        r"re:model\.layers\.12\.mlp\..*",
        r"re:^model[.]layers[.]13[.]mlp",
        r"re:.*layers\.(1[0-9])\..*",
        r"re:.*layers\..\.mlp.*",
        r"re:.*layers\.4\.self_attn\.qkv_proj",
        r"-:.*\.18\..*gate.*",
        r"+:.*\.12\..*gate.*",
        r"-:.*\.(18|19)\..*gate_up_proj.*",
    ],
)
def test_a_pattern_with_the_number_of_a_block_is_refused(names, pattern):
    with pytest.raises(UnsupportedModelError, match="would match other modules") as caught:
        names.in_settings({"ignore": [pattern]})
    assert repr(pattern) in caught.value.message
    assert caught.value.hint == "Prune the original model first, then quantize it."


def test_names_of_single_experts(tmp_path):
    architecture = architecture_of(save_model(tmp_path / "mixture", experts_config("qwen3_moe")))
    cut = plan_experts(architecture, dict.fromkeys(find_experts(architecture).blocks, (0, 4)))
    block = f"model.layers.{find_experts(architecture).blocks[1]}.mlp"
    stay = ["lm_head", f"{block}.gate", "re:.*mlp.gate$"]
    before = [
        f"{block}.experts.0.up_proj",
        f"{block}.experts.4",
        f"{block}.experts.5.up_proj",
        f"vl.{block}.experts.7",
    ]
    after = [f"{block}.experts.3.up_proj", f"vl.{block}.experts.5"]
    config = {"num_experts": 8, "quantization_config": {"ignore": before + stay}}
    assert cut.settings("config.json", config) == {
        "num_experts": 6,
        "quantization_config": {"ignore": after + stay},
    }
    assert cut.settings("hf_quant_config.json", {"exclude": before + stay}) == {
        "exclude": after + stay
    }
    with pytest.raises(UnsupportedModelError, match="which would match other modules"):
        cut.settings("hf_quant_config.json", {"exclude": ["re:.*experts[.][0-3][.].*"]})


def test_every_place_of_a_config(names):
    """Ignored modules and settings by name: see
    test_a_quantized_checkpoint_keeps_its_packed_tensors.
    """

    def config(groups, skipped):
        targets = {
            name: {"targets": [target], "weights": {"num_bits": 8}}
            for name, target in groups.items()
        }
        kinds = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]]
        settings = {
            "config_groups": targets,
            "modules_in_block_to_quantize": kinds,
            "shapes": [1, 2.5, True, None],
        }
        inner = {"quantization_config": {"llm_int8_skip_modules": skipped}}
        others = {"num_hidden_layers": 24, "architectures": ["model.layers.3"]}
        return others | {"quantization_config": settings, "text_config": inner}

    groups = {"all": "Linear", "gone": "model.layers.12.mlp", "stays": "model.layers.13.mlp"}
    pruned = {"all": "Linear", "stays": "model.layers.10.mlp"}
    dense = config(groups, ["model.layers.13.mlp.gate_proj"])
    assert names.in_config(dense) == config(pruned, ["model.layers.10.mlp.gate_proj"])

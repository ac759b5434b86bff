"""Models whose blocks are of several kinds, stand in a part of the model, or are named otherwise in
files.
"""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    Qwen2VLConfig,
)

from checkpoint_files import change_weights, config_of, write_config
from conftest import (
    calibration,
    evaluation,
    llama_config,
    save_model,
    slow,
    train_tokenizer,
    weight_bytes_of,
    weights_of,
)
from families import ON_THE_HUB, tiny_config
from reference import plain_loss
from sleb_cli.engine.text.windows import cut_windows
from sleb_cli.plan import read_plan


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("mixed") / "model", tiny_config("gemma3_text"))


def test_blocks_are_protected_by_kind_and_by_number(search, mixed, tmp_path):
    options = ["--protect-kind", "full_attention", "--protect", "2", "--remove", 1]
    shown, plan = search(*options, model=mixed).stdout, read_plan(tmp_path / "plan.json")
    assert plan.search.protect == (1, 2, 3, 5)
    assert (list(plan.steps[0].scores), plan.steps[0].kind) == ([4], "sliding_attention")
    assert all(words in shown for words in (" kind ", "sliding_attention"))
    # Blocks of one kind show none.
    assert " kind " not in search("--remove", 1, "--force").stdout
    assert read_plan(tmp_path / "plan.json").steps[0].kind == ""


def test_an_extended_search_protects_the_same(search, mixed, tmp_path):
    search("--protect", "2,3", "--remove", 1, model=mixed)
    first, extend = read_plan(tmp_path / "plan.json"), ["--extend", "plan.json", "--remove"]
    search(*extend, 2, model=mixed)
    longer = read_plan(tmp_path / "plan.json")
    assert longer.search.protect == (2, 3)
    assert longer.removals[0] == first.removals[0]
    assert set(longer.removals) == {1, 4}
    assert (
        "search.protect"
        in search(*extend, 3, "--protect", "3", "-o", "other.json", model=mixed, code=3).stderr
    )


def test_the_last_attention_block_of_a_hybrid_stays(search, apply, tmp_path):
    folder = save_model(tmp_path / "hybrid", tiny_config("qwen3_next"))
    assert (
        "Block 3 stays: without block 3, the KV cache would not work"
        in search("--remove", 2, model=folder).stderr
    )
    assert 3 not in read_plan(tmp_path / "plan.json").steps[0].scores
    spans = ["--strategy", "contiguous", "--max-perplexity-ratio", 1e40, "-o", "spans.json"]
    assert "no other block can be removed" in search(*spans, model=folder).stdout
    assert set(read_plan(tmp_path / "spans.json").removals) < {0, 1, 2, 4, 5}
    assert "Cannot remove block 3 from" in apply(folder, "--blocks", "3", code=4).stderr
    assert not (tmp_path / "out").exists()
    apply()


def test_when_no_more_can_go_the_search_says_how_many_did(search, tmp_path):
    """The user protects one block, and the only attention block must stay: two of four can go."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    folder = save_model(
        tmp_path / "hybrid", tiny_config("qwen3_next", num_hidden_layers=4, layer_types=kinds)
    )
    options = ["--protect-first", 1, "--protect-last", 0, "--remove"]
    told = search(*options, 3, model=folder, code=4).stderr
    assert "can be removed after " in told
    assert "Remove 2 blocks. With --resume, nothing is measured again" in told
    search(*options, 2, "--resume", model=folder)
    assert set(read_plan(tmp_path / "plan.json").removals) == {2, 3}


JAMBA = {"num_hidden_layers": 12, "attn_layer_period": 4}


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("jamba", JAMBA, "by period: attn_layer_period = 4, expert_layer_period = 2"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "each block divides its attention scores by its number",
        ),
    ],
)
def test_what_depends_on_depth_is_refused(search, apply, tmp_path, model_type, settings, said):
    folder = save_model(tmp_path / "model", tiny_config(model_type, **settings))
    told = search("--remove", 2, model=folder, code=4).stderr
    assert (said in told, "Loading" in told) == (True, False)
    assert "a plugin can prune it: `config_keys` in docs/reference/plugins.md" in " ".join(
        told.split()
    )
    if model_type == "jamba":  # of which a whole period can go
        assert "matches the original" in apply(folder, "--blocks", "4,5,6,7").stdout


def test_multi_token_prediction_blocks_are_left_out(apply, tmp_path):
    folder = save_model(tmp_path / "glm", tiny_config("glm4_moe"))
    extra = {}
    for name, tensor in weights_of(folder).items():
        if ".layers.5." in name:
            extra[name.replace("layers.5.", "layers.6.")] = tensor.clone()
    change_weights(folder, lambda tensors: tensors | extra)
    write_config(folder, num_nextn_predict_layers=1)
    apply(folder, "--blocks", "2")
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert not any(".layers.5." in name for name in weights_of(tmp_path / "out"))
    write_config(folder, num_nextn_predict_layers=2)
    assert "do not keep 6 blocks" in apply(folder, "--blocks", "2", code=4, output="other").stderr


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--max-shard-size", "60KB"], []])
def test_embeddings_with_a_slice_for_each_block_are_cut(sleb, apply, text_file, tmp_path, options):
    folder = save_model(tmp_path / "gemma", tiny_config("gemma4_text"))
    dense = weights_of(folder)
    if not options:  # a pickle, and the model in memory is cut by the same rule
        torch.save(dense, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        sleb("eval", folder, "--blocks", "1,2", "--perplexity", text_file)
    apply(folder, "--blocks", "1,2", *options)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        slices = dense[f"model.{name}.weight"].chunk(6, axis)
        tensor = found[f"model.{name}.weight"]
        assert torch.equal(
            tensor, torch.cat([slices[block] for block in (0, 3, 4, 5)], axis).to(tensor.dtype)
        )


TWICE = [
    "gemma3_text",
    slow("laguna"),
    slow("qwen3_moe"),
    "nemotron_h",
    "runs, gpt_neo",
    "numbers, lfm2",
]


@pytest.mark.parametrize("name", TWICE)
def test_pruning_twice_equals_pruning_once(apply, tmp_path, name):
    model_type, settings, changes = ON_THE_HUB.get(name, (name, {}, {}))
    dense = save_model(tmp_path / "dense", tiny_config(model_type, **settings))
    write_config(dense, **changes)
    for folder, blocks, output in (
        (dense, "1", "one"),
        ("one", "3", "two"),
        (dense, "1,4", "both"),
    ):
        apply(folder, "--blocks", blocks, "--no-verify", output=output)
    assert config_of(tmp_path / "two") == config_of(tmp_path / "both")
    two, both = weights_of(tmp_path / "two"), weights_of(tmp_path / "both")
    assert two.keys() == both.keys()
    assert all(torch.equal(two[key], both[key]) for key in both)


EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SEEING = {
    "gemma3": lambda: Gemma3Config(
        text_config=tiny_config("gemma3_text"),
        vision_config=EYES,
        image_token_index=5,
        mm_tokens_per_image=4,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "llava, tied": lambda: LlavaConfig(  # outside of the language model, too
        text_config=llama_config(tie_word_embeddings=True),
        vision_config=CLIPVisionConfig(**EYES),
        image_token_index=5,
        tie_word_embeddings=True,
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config=tiny_config("qwen2_vl_text", rope_parameters=MROPE),
        vision_config={
            "depth": 6,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    ),
}


def seeing_model(folder, config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.15)
    model.to(dtype).save_pretrained(folder)
    train_tokenizer(bos=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_is_pruned_in_its_language_model(search, apply, tmp_path, name):
    folder, out = seeing_model(tmp_path / name, SEEING[name]()), tmp_path / "out"
    search("--remove", 2, model=folder)
    assert json.loads(apply("--json").stdout)["proof"]["logits_difference"] == 0
    before, after = weights_of(folder), weights_of(out)
    seeing = [key for key in before if "vision" in key or "visual" in key]
    assert seeing
    assert all(torch.equal(before[key], after[key]) for key in seeing)
    pruned = config_of(out)
    assert pruned["text_config"]["num_hidden_layers"] == 4
    assert pruned["vision_config"] == config_of(folder)["vision_config"]
    assert len(AutoModelForImageTextToText.from_pretrained(out).model.language_model.layers) == 4


@pytest.mark.parametrize("name", [slow("qwen2_vl"), "llava, tied"])
def test_a_model_that_sees_is_recovered_cast_and_measured(sleb, apply, text_file, tmp_path, name):
    folder = seeing_model(tmp_path / "model", SEEING[name](), torch.bfloat16)
    recover = [
        "--recover --no-heal",
        *calibration(text_file, samples=10),
        "--dtype",
        "float16",
        "--json",
    ]
    for options, output in (([], "out"), (["--stream"], "streamed")):
        applied = json.loads(
            apply(folder, "--blocks", "1,3", *recover, *options, output=output).stdout
        )
        assert any(fit["error_left"] < 1 for fit in applied["recovery"]["closed_form"]["fits"])
        assert (applied["proof"]["reference"], applied["proof"]["logits_difference"]) == (
            "recovered",
            0,
        )
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.float16}
    assert weight_bytes_of(tmp_path / "streamed") == weight_bytes_of(tmp_path / "out")

    result = sleb(
        "eval", folder, "--blocks", "1,3", *evaluation(text_file), "--dtype", "float32", "--json"
    )
    measured = json.loads(result.stdout)["texts"][0]
    windows = cut_windows(
        AutoTokenizer.from_pretrained(folder), text_file.read_text(), 32, bos=False
    )[:4]
    dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for removed, found in ((set(), measured["dense"]), ({1, 3}, measured["pruned"][0])):
        loss = plain_loss(dense, dense.model.language_model.layers, windows, removed)
        assert math.log(found["perplexity"]) == pytest.approx(loss, abs=1e-5)

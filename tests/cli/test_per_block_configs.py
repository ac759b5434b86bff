"""Models whose blocks are of several kinds, stand in a part of the model, or are named otherwise in files."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    Qwen2VLConfig,
)

from conftest import calibration, evaluation, llama_config, save_model, slow, train_tokenizer, weights_of
from families import ON_THE_HUB, tiny_config
from reference import plain_loss
from sleb_cli.engine.text.windows import cut_windows
from sleb_cli.plan import read_plan

MIXED = ["sliding_attention", "full_attention"] * 3


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("mixed") / "model", tiny_config("gemma3_text"))


def search(run_sleb, model, text_file, *options):
    return run_sleb("search", model, *calibration(text_file), *options)


def test_models_of_one_kind_show_none(run_sleb, tiny_llama, text_file, tmp_path):
    assert " kind " not in search(run_sleb, tiny_llama, text_file, "--remove", 1).stdout
    assert read_plan(tmp_path / "plan.json").steps[0].kind == ""
    result = search(run_sleb, tiny_llama, text_file, "--remove", 1, "--protect-kind", "mamba", "--force")
    assert (result.exit_code, "All its blocks are of one kind" in result.stderr) == (2, True)


def test_blocks_are_protected_by_kind_and_by_number(run_sleb, mixed, text_file, tmp_path):
    options = ["--protect-kind", "full_attention", "--protect", "2", "--remove", 1]
    result = search(run_sleb, mixed, text_file, *options)
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "plan.json")
    assert plan.search.protect == (1, 2, 3, 5)
    assert list(plan.steps[0].scores) == [4]
    assert plan.steps[0].kind == MIXED[4]
    assert all(words in result.stdout for words in (" kind ", MIXED[4]))
    result = search(run_sleb, mixed, text_file, *options[:-1], 2, "--force")
    assert (
        result.exit_code,
        "At most 1 block can be removed, which leaves the model at 5 of 6 blocks" in result.stderr,
    ) == (2, True)


def test_an_extended_search_protects_the_same(run_sleb, mixed, text_file, tmp_path):
    assert search(run_sleb, mixed, text_file, "--protect", "2,3", "--remove", 1).exit_code == 0
    first = read_plan(tmp_path / "plan.json")
    result = run_sleb("search", mixed, "--extend", "plan.json", "--remove", 2, "--calibration", text_file)
    assert result.exit_code == 0, result.stderr
    longer = read_plan(tmp_path / "plan.json")
    assert longer.search.protect == (2, 3)
    assert longer.removals[0] == first.removals[0]
    assert set(longer.removals) == {1, 4}
    assert run_sleb("apply", "-o", "one", "--no-verify").exit_code == 0
    result = run_sleb("apply", "plan.json", "--model", "one", "-o", "two")
    assert (result.exit_code, "different model (blocks: 4, not 6; fingerprint: " in result.stderr) == (3, True)
    result = run_sleb("search", mixed, "--extend", "plan.json", "--remove", 3, "--protect", "3", "-o", "other.json")
    assert (result.exit_code, "search.protect" in result.stderr) == (3, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protect-kind", "full_atention"], "Did you mean 'full_attention'?"),
        (["--protect", "6"], "There is no block 6 to protect"),
        (["--protect", "x"], "--protect 'x' is not a list of numbers"),
    ],
)
def test_what_cannot_be_protected(run_sleb, mixed, text_file, options, message):
    result = search(run_sleb, mixed, text_file, "--remove", 1, *options)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_the_last_attention_block_of_a_hybrid_stays(run_sleb, text_file, tmp_path):
    folder = save_model(tmp_path / "hybrid", tiny_config("qwen3_next"))
    result = search(run_sleb, folder, text_file, "--remove", 2)
    assert "Block 3 stays: without block 3, the KV cache would not work" in result.stderr
    assert 3 not in read_plan(tmp_path / "plan.json").steps[0].scores
    assert run_sleb("apply").exit_code == 0
    result = run_sleb("apply", folder, "--blocks", "3", "-o", "out")
    assert (result.exit_code, "Cannot remove block 3 from" in result.stderr) == (4, True)
    assert not (tmp_path / "out").exists()


def test_when_no_more_can_go_the_search_says_how_many_did(run_sleb, text_file, tmp_path):
    """The user protects one block, and the only attention block must stay: two of four can go."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    folder = save_model(tmp_path / "hybrid", tiny_config("qwen3_next", num_hidden_layers=4, layer_types=kinds))
    options = ["--protect-first", 1, "--protect-last", 0]
    result = search(run_sleb, folder, text_file, "--remove", 3, *options)
    assert result.exit_code == 4, result.stderr
    assert "can be removed after " in result.stderr
    assert "Remove 2 blocks. With --resume, nothing is measured again" in result.stderr
    result = search(run_sleb, folder, text_file, "--remove", 2, *options, "--resume")
    assert result.exit_code == 0, result.stderr
    assert set(read_plan(tmp_path / "plan.json").removals) == {2, 3}


JAMBA = {"num_hidden_layers": 12, "attn_layer_period": 4}


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("jamba", JAMBA, "by period: attn_layer_period = 4, expert_layer_period = 2"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "each block divides its attention scores by its number"),
    ],
)
def test_what_depends_on_depth_is_refused(run_sleb, text_file, tmp_path, model_type, settings, said):
    folder = save_model(tmp_path / "model", tiny_config(model_type, **settings))
    result = search(run_sleb, folder, text_file, "--remove", 2)
    assert (result.exit_code, said in result.stderr, "Loading" in result.stderr) == (4, True, False), result.stderr


def test_a_whole_period_of_blocks_can_be_removed(run_sleb, tmp_path):
    folder = save_model(tmp_path / "jamba", tiny_config("jamba", **JAMBA))
    result = run_sleb("apply", folder, "--blocks", "4,5,6,7", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert "bitwise equal" in result.stderr + result.stdout


def test_multi_token_prediction_blocks_are_left_out(run_sleb, text_file, tmp_path):
    folder = save_model(tmp_path / "glm", tiny_config("glm4_moe"))
    tensors = weights_of(folder)
    extra = {name.replace("layers.5.", "layers.6."): t.clone() for name, t in tensors.items() if ".layers.5." in name}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    result = run_sleb("apply", folder, "--blocks", "2", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(".layers.5." in name for name in weights_of(tmp_path / "out"))
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    result = run_sleb("apply", folder, "--blocks", "2", "-o", "other")
    assert (result.exit_code, "do not keep 6 blocks" in result.stderr) == (4, True)


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--max-shard-size", "60KB"], ["pickled"]])
def test_embeddings_with_a_slice_for_each_block_are_cut(run_sleb, text_file, tmp_path, options):
    folder = save_model(tmp_path / "gemma", tiny_config("gemma4_text"))
    dense = weights_of(folder)
    if options == ["pickled"]:
        torch.save(dense, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        options = []
        # The model in memory is cut by the same rule.
        assert run_sleb("eval", folder, "--blocks", "1,2", "--perplexity", text_file).exit_code == 0
    result = run_sleb("apply", folder, "--blocks", "1,2", "-o", "out", *options)
    assert result.exit_code == 0, result.stderr
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        slices = dense[f"model.{name}.weight"].chunk(6, axis)
        expected = torch.cat([slices[block] for block in (0, 3, 4, 5)], axis)
        tensor = found[f"model.{name}.weight"]
        assert torch.equal(tensor, expected.to(tensor.dtype))


TWICE = ["gemma3_text", slow("laguna"), slow("qwen3_moe"), "nemotron_h", "runs, gpt_neo", "numbers, lfm2"]


@pytest.mark.parametrize("name", TWICE)
def test_two_prunings_in_a_row_give_what_one_of_both_blocks_gives(run_sleb, tmp_path, name):
    model_type, settings, changes = ON_THE_HUB.get(name, (name, {}, {}))
    dense = save_model(tmp_path / "dense", tiny_config(model_type, **settings))
    config = json.loads((dense / "config.json").read_text()) | changes
    (dense / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for folder, blocks, output in ((dense, "1", "one"), ("one", "3", "two"), (dense, "1,4", "both")):
        result = run_sleb("apply", folder, "--blocks", blocks, "-o", output, "--no-verify")
        assert result.exit_code == 0, result.stderr
    two, both = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("two", "both"))
    assert two == both
    two, both = (weights_of(tmp_path / name) for name in ("two", "both"))
    assert two.keys() == both.keys()
    assert all(torch.equal(two[key], both[key]) for key in both)


SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 5, "max_position_embeddings": 128,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SEEING = {
    "gemma3": lambda: Gemma3Config(
        text_config={**SHAPE, "head_dim": 8, "layer_types": [*MIXED[:4], "sliding_attention"]}, vision_config=EYES,
        image_token_index=5, mm_tokens_per_image=4, boi_token_index=6, eoi_token_index=7,
    ),
    "llava": lambda: LlavaConfig(
        text_config=llama_config(5), vision_config=CLIPVisionConfig(**EYES), image_token_index=5
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**SHAPE, "rope_parameters": MROPE},
        vision_config={"depth": 5, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
    ),
}  # fmt: skip


def seeing_model(folder, config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.15)
    model.to(dtype).save_pretrained(folder)
    train_tokenizer(bos=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_is_pruned_in_its_language_model(run_sleb, text_file, tmp_path, name):
    folder = seeing_model(tmp_path / name, SEEING[name]())
    assert search(run_sleb, folder, text_file, "--remove", 2).exit_code == 0
    result = run_sleb("apply", "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["proof"]["logits_difference"] == 0
    before, after = (weights_of(path) for path in (folder, tmp_path / "out"))
    seeing = [key for key in before if "vision" in key or "visual" in key]
    assert seeing
    assert all(torch.equal(before[key], after[key]) for key in seeing)
    raw, pruned = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert pruned["text_config"]["num_hidden_layers"] == 3
    assert pruned["vision_config"] == raw["vision_config"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert len(again.model.language_model.layers) == 3


TIED = {
    "qwen2_vl": SEEING["qwen2_vl"],
    "llava, tied outside of the language model": lambda: LlavaConfig(
        text_config=llama_config(5, tie_word_embeddings=True), vision_config=CLIPVisionConfig(**EYES),
        image_token_index=5, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [slow("qwen2_vl"), "llava, tied outside of the language model"])
@torch.inference_mode()
def test_a_model_that_sees_is_recovered_cast_and_measured(run_sleb, text_file, tmp_path, name):
    folder = seeing_model(tmp_path / "model", TIED[name](), torch.bfloat16)
    recover = ["--recover", *calibration(text_file, samples=10), "--dtype", "float16"]
    for options, output in (([], "out"), (["--stream"], "streamed")):
        result = run_sleb("apply", folder, "--blocks", "1,3", *recover, *options, "-o", output, "--json")
        assert result.exit_code == 0, result.stderr
        applied = json.loads(result.stdout)
        assert any(fit["kept"] for fit in applied["recovery"]["closed_form"]["fits"])
        assert (applied["proof"]["reference"], applied["proof"]["logits_difference"]) == ("recovered", 0)
    whole, streamed = (weights_of(tmp_path / output) for output in ("out", "streamed"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}
    assert all(torch.equal(streamed[key], tensor) for key, tensor in whole.items())

    result = run_sleb("eval", folder, "--blocks", "1,3", *evaluation(text_file), "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)["texts"][0]
    windows = cut_windows(AutoTokenizer.from_pretrained(folder), text_file.read_text(), 32, bos=False)[:4]
    dense = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for removed, found in ((set(), measured["dense"]), ({1, 3}, measured["pruned"][0])):
        loss = plain_loss(dense, dense.model.language_model.layers, windows, removed)
        assert math.log(found["perplexity"]) == pytest.approx(loss, abs=1e-5)


def test_an_adapter_is_no_model(run_sleb, text_file, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )
    save_file({"base_model.model.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    result = search(run_sleb, folder, text_file, "--remove", 1)
    assert (result.exit_code, "is a PEFT adapter for org/base, not a whole model" in result.stderr) == (4, True)

"""`sleb apply --recover`, through `main()`, with a fit that only its interface is known of."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from conftest import calibration, llama_config, save_model
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.recovery import run
from sleb_cli.plan import ClosedFormRecord, read_plan

DOWN = "model.layers.0.mlp.down_proj.weight"


def standing_in(monkeypatch, names):
    """Let something stand in for the closed form: a tenth more for the parameters that are named."""
    asked = SimpleNamespace(names=names, calls=[])

    def recover_in_closed_form(skippable, removed, fit, held_out, notify):
        asked.calls.append((sorted(removed), fit, held_out))
        own = dict(skippable.model.named_parameters())
        return {name: (own[name] * 1.1).detach() for name in asked.names}, ClosedFormRecord(fits=())

    monkeypatch.setattr(run, "recover_in_closed_form", recover_in_closed_form)
    return asked


@pytest.fixture
def fit(monkeypatch):
    return standing_in(monkeypatch, [DOWN, "model.layers.5.mlp.down_proj.weight", "model.norm.weight"])


def recovering(text, samples=10):
    return ["--recover", *calibration(text, samples)]


def test_new_values_are_written_proven_and_recorded(run_sleb, llama_plan, tiny_llama, text_file, fit, tmp_path):
    result = run_sleb("apply", llama_plan, *recovering(text_file), "-o", "out")
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "out" / "sleb_plan.json")
    (removed, fitted, held_out), record = fit.calls[0], plan.recovery
    assert removed == sorted(plan.removals)
    assert (fitted.shape, held_out.shape) == ((8, 32), (2, 32))
    assert record
    assert (record.held_out, record.text.sequences, record.dense.divergence) == (2, 10, 0.0)
    assert plan.proof
    assert plan.proof.reference == "recovered"
    assert "bitwise equal to those of the recovered model in memory" in result.stdout
    assert "bitwise equal to those of the recovered model in memory" in result.stderr
    assert (
        f"pruned {math.exp(record.pruned.loss):.2f}, recovered {math.exp(record.recovered.loss):.2f};" in result.stdout
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert text_file.name in card
    assert str(text_file.parent) not in card
    assert "its logits are equal to those of the recovered model in memory" in card
    assert f"| recovered in closed form | {math.exp(record.recovered.loss):.2f} |" in card
    assert "the others given new weights" in card

    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {DOWN, "model.layers.3.mlp.down_proj.weight", "model.norm.weight"}
    assert torch.equal(after[DOWN], before[DOWN] * 1.1)
    old = [block for block in range(6) if block not in plan.removals]
    for name, tensor in after.items():
        parts = name.split(".")
        source = ".".join([*parts[:2], str(old[int(parts[2])]), *parts[3:]]) if parts[1] == "layers" else name
        assert torch.equal(tensor, before[source]) == (name not in changed), name


def test_losses_are_those_of_a_plain_computation(run_sleb, tiny_llama, text_file, fit, tmp_path):
    result = run_sleb("apply", tiny_llama, "--blocks", "2", *recovering(text_file), "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)["recovery"]
    held_out = fit.calls[0][2]
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)(held_out).logits[:, :-1].log_softmax(-1)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(held_out).logits[:, :-1].log_softmax(-1)
    loss = -ours.gather(-1, held_out[:, 1:, None]).mean()
    divergence = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert record["closed_form_losses"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["closed_form_losses"]["divergence"] == pytest.approx(divergence.item(), rel=1e-4)


def test_a_checkpoint_of_merged_experts_takes_new_values(run_sleb, text_file, fit, tmp_path):
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    folder = save_model(tmp_path / "mixtral", config)
    fit.names = ["model.layers.3.mlp.experts.down_proj", "model.layers.3.self_attn.o_proj.weight"]
    result = run_sleb("apply", folder, "--blocks", "1", *recovering(text_file), "-o", "out")
    assert result.exit_code == 0, result.stderr
    stored = {tensor.name for tensor in find_weights(folder).stored}
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    experts = [name for name in stored if name.startswith("model.layers.3.") and (".w2." in name or ".o_proj" in name)]
    assert len(experts) == 5
    for name in experts:
        assert torch.allclose(after[name.replace("layers.3", "layers.2")], before[name] * 1.1)


def test_files_of_a_base_model_alone_take_new_values(run_sleb, tiny_gpt2, text_file, fit, tmp_path):
    folder = shutil.copytree(tiny_gpt2, tmp_path / "base")
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in stored.items()}, folder / "model.safetensors"
    )
    fit.names = ["transformer.h.4.mlp.c_proj.weight", "transformer.ln_f.weight"]
    result = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "out")
    assert result.exit_code == 0, result.stderr
    after = load_file(tmp_path / "out" / "model.safetensors")
    for new, old in (("h.3.mlp.c_proj.weight", fit.names[0]), ("ln_f.weight", fit.names[1])):
        assert torch.equal(after[new], stored[old] * 1.1)


def test_new_values_have_the_checkpoints_data_type(run_sleb, text_file, fit, tmp_path):
    folder = save_model(tmp_path / "half", llama_config(4, dtype=torch.float16))
    fit.names = [DOWN]
    result = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert (
        load_file(tmp_path / "out" / "model.safetensors")[DOWN].dtype
        is load_file(folder / "model.safetensors")[DOWN].dtype
    )
    cast = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "wide", "--dtype", "float32")
    assert cast.exit_code == 0, cast.stderr
    assert "proven in float32" in cast.stdout
    assert load_file(tmp_path / "wide" / "model.safetensors")[DOWN].dtype is torch.float32


def test_a_quantized_model_is_refused(run_sleb, text_file, fit, tmp_path):
    folder = save_model(tmp_path / "quantized", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    result = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "out")
    assert result.exit_code == 4
    assert "is quantized, so its blocks cannot be recovered" in result.stderr
    assert not fit.calls


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--samples", "9"], 2, "--samples requires --recover or --heal"),
        (["--device", "cpu"], 2, "--device requires --recover or --heal"),
        (["--recover", "--source", "x.gguf"], 2, "--recover does not apply to a GGUF file"),
        (["--recover", "--samples", "4", "--calibration", "TEXT", "--sequence-length", "32"], 5, "4 sequences are too"),
        (["--recover", "--device", "cuda:77"], 7, "no usable cuda:77"),
    ],
)
def test_what_cannot_be_is_refused(run_sleb, llama_plan, text_file, fit, options, code, words):
    options = [text_file if option == "TEXT" else option for option in options]
    result = run_sleb("apply", llama_plan, *options, "-o", "out")
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


def test_without_the_memory_for_the_model_it_is_refused(run_sleb, llama_plan, text_file, fit, monkeypatch):

    monkeypatch.setattr(run, "free_bytes", lambda device: 1000)
    result = run_sleb("apply", llama_plan, *recovering(text_file), "-o", "out")
    assert result.exit_code == 7
    assert "Recovery needs the dense model in memory" in result.stderr


def test_of_much_text_no_more_is_held_out_than_decides(run_sleb, llama_plan, text_file, fit, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "HELD_OUT_TOKENS", 96)
    result = run_sleb("apply", llama_plan, *recovering(text_file, 30), "-o", "out", "--no-verify")
    assert result.exit_code == 0, result.stderr
    record = read_plan(tmp_path / "out" / "sleb_plan.json").recovery
    assert record
    ((_, fitted, held_out),) = fit.calls
    assert (record.text.sequences, record.held_out, len(fitted), len(held_out)) == (30, 3, 27, 3)


def test_where_no_text_is_named_it_is_mostly_what_the_plan_was_searched_on(
    run_sleb, llama_plan, text_file, fit, tmp_path
):
    result = run_sleb(
        "apply", llama_plan, "--recover", "--samples", 10, "--sequence-length", 32, "-o", "out", "--no-verify"
    )
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "out" / "sleb_plan.json")
    assert plan.recovery
    assert plan.recovery.text.source == f"{text_file.name}:0.75,self:0.25"


def test_without_a_plan_it_is_the_models_own(run_sleb, tiny_llama, fit, tmp_path):
    result = run_sleb(
        "apply",
        tiny_llama,
        "--blocks",
        "3",
        "--recover",
        "--samples",
        10,
        "--sequence-length",
        32,
        "-o",
        "out",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recovery"]["text"]["source"] == "self"

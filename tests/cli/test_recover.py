"""`sleb apply --recover`, through `main()`, with a fit that only its interface is known of."""

import errno
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from conftest import calibration, llama_config, reported_tokens, save_model, weights_of
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.output import apply
from sleb_cli.engine.recovery import closed_form, run
from sleb_cli.plan import CalibrationRecord, ClosedFormRecord, LossesRecord, RecoveryRecord, read_plan
from sleb_plugins import ProofError

DOWN = "model.layers.0.mlp.down_proj.weight"


def standing_in(monkeypatch, names):
    """Let something stand in for the closed form: a tenth more for the parameters that are named."""
    asked = SimpleNamespace(names=names, calls=[])

    def recover_in_closed_form(skippable, removed, fit, deciding, notify, *, stored, **placed):
        asked.calls.append((sorted(removed), fit, deciding))
        own = dict(skippable.model.named_parameters())
        return {name: (own[name] * 1.1).detach().to(stored) for name in asked.names}, ClosedFormRecord(fits=())

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
    (removed, fitted, deciding), record = fit.calls[0], plan.recovery
    assert removed == sorted(plan.removals)
    assert (fitted.shape, deciding.shape) == ((7, 32), (2, 32))
    assert record
    texts = (record.text, record.deciding_text, record.report_text)
    assert [text.sequences for text in texts] == [7, 2, 1]
    assert len({text.tokens_sha256 for text in texts}) == 3
    assert record.dense.divergence == 0.0
    assert plan.proof
    assert plan.proof.reference == "recovered"
    assert "bitwise equal to those of the recovered model in memory" in result.stdout
    assert "bitwise equal to those of the recovered model in memory" in result.stderr
    for losses in (record.pruned, record.recovered):
        assert f" {losses.loss:.4f} │ {losses.divergence:>19.4f} " in result.stdout
    assert record.summary in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert text_file.name in card
    assert str(text_file.parent) not in card
    assert "its logits are equal to those of the recovered model in memory" in card
    assert f"| recovered in closed form | {math.exp(record.recovered.loss):.2f} |" in card
    assert "the others given new weights" in card

    before, after = weights_of(tiny_llama), weights_of(tmp_path / "out")
    changed = {DOWN, "model.layers.3.mlp.down_proj.weight", "model.norm.weight"}
    assert torch.equal(after[DOWN], before[DOWN] * 1.1)
    old = [block for block in range(6) if block not in plan.removals]
    for name, tensor in after.items():
        parts = name.split(".")
        source = ".".join([*parts[:2], str(old[int(parts[2])]), *parts[3:]]) if parts[1] == "layers" else name
        assert torch.equal(tensor, before[source]) == (name not in changed), name


@pytest.mark.parametrize(
    ("config", "weights", "norms"),
    [
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float32", "float16", "float16"),
        ("float16", "bfloat16", "bfloat16"),
    ],
)
def test_the_config_may_name_another_data_type_than_the_files_or_none(
    run_sleb, tiny_llama, text_file, fit, tmp_path, config, weights, norms
):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    dense = {
        name: tensor.to(getattr(torch, norms if "norm" in name else weights))
        for name, tensor in weights_of(folder).items()
    }
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"dtype": config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value}))
    result = run_sleb("apply", folder, "--blocks", "3", *recovering(text_file), "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    proof = json.loads(result.stdout)["proof"]
    assert proof["logits_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype
    assert proof["dtype"] == {torch.float16: "bfloat16"}.get(loaded, str(loaded).removeprefix("torch."))
    written = weights_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: dense[name].dtype for name in written}
    assert not torch.equal(written[DOWN], dense[DOWN])


@pytest.mark.parametrize("options", [[], ["--dtype", "float16"], ["--max-shard-size", "25KB"]])
def test_a_block_may_lie_in_two_files(run_sleb, tiny_llama, text_file, fit, tmp_path, options):
    sharded = save_model(tmp_path / "sharded", llama_config(), max_shard_size="30KB")
    files = {tensor.path for tensor in find_weights(sharded).stored if tensor.name.startswith("model.layers.0.")}
    assert len(files) == 2
    found = []
    for folder in (sharded, tiny_llama):
        output = tmp_path / f"{folder.name}-out"
        result = run_sleb("apply", folder, "--blocks", "1,3", *recovering(text_file), *options, "-o", output)
        assert result.exit_code == 0, result.stderr
        found.append(dict(find_weights(output).tensors()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_losses_are_those_of_a_plain_computation(run_sleb, tiny_llama, text_file, fit, tmp_path):
    result = run_sleb("apply", tiny_llama, "--blocks", "2", *recovering(text_file), "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)["recovery"]
    reported = reported_tokens(tiny_llama, text_file, record)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)(reported).logits[:, :-1].log_softmax(-1)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(reported).logits[:, :-1].log_softmax(-1)
    loss = -ours.gather(-1, reported[:, 1:, None]).mean()
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
    before = weights_of(folder)
    after = weights_of(tmp_path / "out")
    experts = [name for name in stored if name.startswith("model.layers.3.") and (".w2." in name or ".o_proj" in name)]
    assert len(experts) == 5
    for name in experts:
        assert torch.allclose(after[name.replace("layers.3", "layers.2")], before[name] * 1.1)


def test_files_of_a_base_model_alone_take_new_values(run_sleb, tiny_gpt2, text_file, fit, tmp_path):
    folder = shutil.copytree(tiny_gpt2, tmp_path / "base")
    stored = weights_of(folder)
    save_file(
        {name.removeprefix("transformer."): value for name, value in stored.items()}, folder / "model.safetensors"
    )
    fit.names = ["transformer.h.4.mlp.c_proj.weight", "transformer.ln_f.weight"]
    result = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "out")
    assert result.exit_code == 0, result.stderr
    after = weights_of(tmp_path / "out")
    for new, old in (("h.3.mlp.c_proj.weight", fit.names[0]), ("ln_f.weight", fit.names[1])):
        assert torch.equal(after[new], stored[old] * 1.1)


def test_without_block_0_the_first_that_stays_makes_up_for_it(run_sleb, tiny_llama, text_file):
    result = run_sleb("apply", tiny_llama, "--blocks", "0,1", *recovering(text_file, 100), "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)["recovery"]
    first = record["closed_form"]["fits"][0]
    assert (first["block"], first["gap"], first["kept"]) == (2, 2, True)
    assert record["closed_form_losses"]["divergence"] < 0.95 * record["pruned"]["divergence"]


def test_half_precision_on_a_cpu_keeps_every_digit_that_is_stored(run_sleb, text_file, tmp_path):
    folder = save_model(tmp_path / "half", llama_config(4, dtype=torch.float16))
    result = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file, 100), "-o", "out")
    assert result.exit_code == 0, result.stderr
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    changed = [n for n, tensor in after.items() if ".layers.1." in n and not torch.equal(tensor, before[n])]
    assert changed
    for name in changed:
        assert after[name].dtype is torch.float16
        assert not torch.equal(after[name].bfloat16().half(), after[name])


def failing_proof(patch):
    def fail(*arguments):
        raise ProofError("It failed.", hint="Try again.")

    patch.setattr(apply, "prove", fail)


def full_disk(patch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "full")

    patch.setattr(apply, "write_weights", fail)


def interrupted_fit(patch):
    fit, calls = closed_form._ClosedFormFit._fit_block, []

    def few(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self, *arguments)

    patch.setattr(closed_form._ClosedFormFit, "_fit_block", few)


@pytest.fixture
def fits(monkeypatch):
    """The blocks that are fitted, one after the other."""
    fit, found = closed_form._ClosedFormFit._fit_block, []
    monkeypatch.setattr(
        closed_form._ClosedFormFit,
        "_fit_block",
        lambda self, block, *rest: found.append(block) or fit(self, block, *rest),
    )
    return found


@pytest.mark.parametrize(
    ("fail", "code", "all_fitted"),
    [(failing_proof, 9, True), (full_disk, 8, True), (interrupted_fit, 130, False)],
    ids=["proof", "disk", "Ctrl-C"],
)
@pytest.mark.parametrize("options", [[], ["--stream"], ["--dtype", "bfloat16"]], ids=lambda options: " ".join(options))
def test_no_fit_is_lost(run_sleb, tiny_llama, text_file, tmp_path, monkeypatch, fits, fail, code, all_fitted, options):
    command = ["apply", tiny_llama, "--blocks", "2", *recovering(text_file, 40), *options]
    assert run_sleb(*command, "-o", "whole").exit_code == 0
    whole = fits.copy()
    with monkeypatch.context() as patch:
        fail(patch)
        stopped = run_sleb(*command, "-o", "out")
    assert stopped.exit_code == code, stopped.stderr
    assert "The fits so far are kept in" in stopped.stderr
    before = fits[len(whole) :]
    result = run_sleb(*command, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"Continuing with \d+ fits of an interrupted run.", result.stderr)
    assert fits[len(whole) :] == whole  # each once, in two runs; the fit that Ctrl-C ended was not counted
    assert (before == whole) == all_fitted
    one, two = (weights_of(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(tmp_path.glob(".*"))


def test_fits_to_other_text_are_not_taken_over(run_sleb, tiny_llama, text_file, tmp_path, monkeypatch, fits):
    command = ["apply", tiny_llama, "--blocks", "2", *recovering(text_file, 40), "-o", "out"]
    with monkeypatch.context() as patch:
        failing_proof(patch)
        assert run_sleb(*command).exit_code == 9
    first = fits.copy()
    result = run_sleb(*command, "--seed", 1)
    assert result.exit_code == 0, result.stderr
    assert "Continuing" not in result.stderr
    assert len(fits) >= 2 * len(first) - 1
    assert not list(tmp_path.glob(".*"))


def test_what_nobody_continued_is_cleared_later(run_sleb, tiny_llama, tmp_path):
    kept = {"ours": "block-3.safetensors", "fresh": "block-3.safetensors", "not ours": "notes.txt"}
    for name, file in kept.items():
        folder = tmp_path / f".{name}.recovery" / "fits-0123456789abcdef"
        folder.mkdir(parents=True)
        (folder / file).touch()
        for path in [] if name == "fresh" else [folder / file, folder]:
            os.utime(path, (0, 0))
    assert run_sleb("apply", tiny_llama, "--blocks", "2", "-o", "out").exit_code == 0
    assert {path.name for path in tmp_path.glob(".*")} == {".fresh.recovery", ".not ours.recovery"}


def test_nats_back_are_at_most_all_and_the_divergence_left_says_the_rest():
    text = CalibrationRecord(source="self", seed=0, sequences=1, sequence_length=2, bos=False, tokens_sha256="")
    record = RecoveryRecord(
        text=text, deciding_text=text, report_text=text,
        dense=LossesRecord(loss=2.0, divergence=0.0), pruned=LossesRecord(loss=3.0, divergence=0.8),
    )  # fmt: skip

    def after(loss, divergence):
        return record.model_copy(update={"closed_form_losses": LossesRecord(loss=loss, divergence=divergence)})

    assert after(2.5, 0.6).nats_back == 0.5
    assert after(2.5, 0.6).summary.startswith("50% of the lost nats are back; 75% of the divergence")
    assert after(1.8, 0.4).nats_back == 1
    assert after(1.8, 0.4).summary.startswith("all of the lost nats are back, and more, by adapting to the text; 50%")
    gained = record.model_copy(update={"pruned": LossesRecord(loss=1.9, divergence=0.1)})
    assert gained.nats_back is None
    assert "cost no nats" in gained.summary


def test_new_values_have_the_checkpoints_data_type(run_sleb, text_file, fit, tmp_path):
    folder = save_model(tmp_path / "half", llama_config(4, dtype=torch.float16))
    fit.names = [DOWN]
    result = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert weights_of(tmp_path / "out")[DOWN].dtype is weights_of(folder)[DOWN].dtype
    cast = run_sleb("apply", folder, "--blocks", "2", *recovering(text_file), "-o", "wide", "--dtype", "float32")
    assert cast.exit_code == 0, cast.stderr
    assert "proven in float32" in cast.stdout
    assert weights_of(tmp_path / "wide")[DOWN].dtype is torch.float32


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
        (["--recover", "--source", "x.gguf"], 2, "--source names one of another model"),
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
    assert re.search(
        r"Recovery needs \S+ [kM]B of memory on cpu \(\S+ kB for the model, .* for the sums of a fit\)", result.stderr
    )


def test_of_much_text_no_more_decides_than_is_needed(run_sleb, llama_plan, text_file, fit, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "DECIDING_TOKENS", 96)
    monkeypatch.setattr(run, "REPORTED_TOKENS", 64)
    result = run_sleb("apply", llama_plan, *recovering(text_file, 30), "-o", "out", "--no-verify")
    assert result.exit_code == 0, result.stderr
    record = read_plan(tmp_path / "out" / "sleb_plan.json").recovery
    assert record
    ((_, fitted, deciding),) = fit.calls
    assert (record.text.sequences, record.deciding_text.sequences, record.report_text.sequences) == (25, 3, 2)
    assert (len(fitted), len(deciding)) == (25, 3)


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

"""`sleb apply --recover`, through `main()`, with a fit that only its interface is known of."""

import errno
import json
import math
import os
import re
import shutil
from itertools import cycle
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from test_apply import change_weights, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import (
    calibration,
    evaluation,
    llama_config,
    prose,
    save_model,
    shortage_at,
    weights_of,
)
from families import tiny_config
from sleb_cli.engine.door import recovery as door
from sleb_cli.engine.files.tensors import read_all
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.forward import forecast
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.output import checkpoint as engine
from sleb_cli.engine.recovery import closed_form, depth
from sleb_cli.plan import ClosedFormRecord, read_plan
from sleb_plugins import ProofError

DOWN = "model.layers.0.mlp.down_proj.weight"


def standing_in(monkeypatch, names):
    """Let something stand in for the closed form: a tenth more for the parameters that are named."""
    asked = SimpleNamespace(names=names, calls=[])

    def recover_in_closed_form(job):
        asked.calls.append(
            (sorted(job.settings.surgery.removed), job.train.sequences, job.validation.sequences)
        )
        own, stored = dict(job.dense.model.named_parameters()), job.settings.stored
        return {
            name: (own[name] * 1.1).detach().to(stored) for name in asked.names
        }, ClosedFormRecord(fits=())

    monkeypatch.setattr(closed_form, "recover_in_closed_form", recover_in_closed_form)
    return asked


@pytest.fixture
def fit(monkeypatch):
    return standing_in(
        monkeypatch, [DOWN, "model.layers.5.mlp.down_proj.weight", "model.norm.weight"]
    )


@pytest.fixture
def recover(apply, text_file):
    """Recover a model or plan into `out`, on text, and give the result."""

    return lambda subject, *options, samples=10, **how: apply(
        subject, "--recover", *calibration(text_file, samples), *options, **how
    )


def same_weights(one, two):
    found, expected = (dict(read_all(find_weights(folder))) for folder in (one, two))
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


def test_new_values_are_written_proven_and_recorded(
    recover, llama_plan, tiny_llama, text_file, fit, tmp_path, monkeypatch
):
    loads = Mock(wraps=AutoTokenizer.from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loads)
    result, out = recover(llama_plan), tmp_path / "out"
    assert sorted(call.args[0] == tiny_llama for call in loads.mock_calls) == [
        False,
        True,
    ]  # what was written, too
    plan = read_plan(out / "sleb_plan.json")
    (removed, fitted, validation), record = fit.calls[0], plan.recovery
    assert (removed, fitted.shape, validation.shape) == (sorted(plan.removals), (7, 32), (2, 32))
    texts = (record.train_text, record.validation_text, record.test_text)
    assert [text.sequences for text in texts] == [7, 2, 1]
    assert len({text.tokens_sha256 for text in texts}) == 3
    assert (record.dense.divergence, plan.proof.reference) == (0.0, "recovered")
    proven = "bitwise equal to those of the recovered model in memory"
    assert "matches the recovered model in memory" in result.stdout
    perplexities = [
        f"{math.exp(losses.loss):.2f}" for losses in (record.pruned, record.models[-1][1])
    ]
    assert all(perplexity in result.stdout for perplexity in perplexities)
    assert record.summary in result.stdout
    card = (out / "README.md").read_text()
    assert str(text_file.parent) not in card
    row = f"| recovered in closed form | {perplexities[1]} |"
    assert all(
        words in card for words in (text_file.name, proven, row, "the others given new weights")
    )

    before, after = weights_of(tiny_llama), weights_of(out)
    changed = {DOWN, "model.layers.3.mlp.down_proj.weight", "model.norm.weight"}
    assert torch.equal(after[DOWN], before[DOWN] * 1.1)
    old = [block for block in range(6) if block not in plan.removals]
    for name, tensor in after.items():
        source = re.sub(r"(?<=layers\.)\d", lambda found: str(old[int(found[0])]), name)
        assert torch.equal(tensor, before[source]) == (name not in changed), name


@pytest.mark.parametrize(
    ("config", "weights", "norms"),
    [
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float32", "float16", "float16"),
    ],
)
def test_config_and_files_may_name_different_data_types(
    recover, tiny_llama, fit, tmp_path, config, weights, norms
):
    folder, types = shutil.copytree(tiny_llama, tmp_path / "model"), {True: norms, False: weights}
    change_weights(
        folder, lambda dense: {n: dense[n].to(getattr(torch, types["norm" in n])) for n in dense}
    )
    dense = weights_of(folder)
    write_config(folder, dtype=config)
    proof = json.loads(recover(folder, "--blocks", "3", "--json").stdout)["proof"]
    assert proof["logits_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype
    assert proof["dtype"] == {torch.float16: "float32"}.get(
        loaded, str(loaded).removeprefix("torch.")
    )
    written = weights_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: dense[name].dtype for name in written
    }
    assert not torch.equal(written[DOWN], dense[DOWN])


@pytest.mark.parametrize("options", [[], ["--dtype", "float16", "--max-shard-size", "25KB"]])
def test_a_block_may_lie_in_two_files(recover, tiny_llama, fit, tmp_path, options):
    sharded = save_model(tmp_path / "sharded", llama_config(), max_shard_size="30KB")
    files = {
        tensor.path
        for tensor in find_weights(sharded).stored
        if tensor.name.startswith("model.layers.0.")
    }
    assert len(files) == 2
    for folder, output in ((sharded, "one"), (tiny_llama, "two")):
        recover(folder, "--blocks", "1,3", *options, output=output)
    assert same_weights(tmp_path / "one", tmp_path / "two")


def plain_losses(dense, ours, tokens):
    """Return the loss of a model, and the divergence from the dense one, from whole logits."""
    p, q = (model(tokens).logits[:, :-1].float().log_softmax(-1) for model in (dense, ours))
    return -q.gather(-1, tokens[:, 1:, None]).mean().item(), (p.exp() * (p - q)).sum(
        -1
    ).mean().item()


def test_a_checkpoint_of_merged_experts_takes_new_values(recover, fit, tmp_path):
    folder = save_model(tmp_path / "mixtral", tiny_config("mixtral"))
    fit.names = ["model.layers.3.mlp.experts.down_proj", "model.layers.3.self_attn.o_proj.weight"]
    recover(folder, "--blocks", "1")
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    stored = {
        tensor.name
        for tensor in find_weights(folder).stored
        if tensor.name.startswith("model.layers.3.")
    }
    changed = [name for name in stored if ".w2." in name or ".o_proj" in name]
    assert len(changed) == 5
    for name in changed:
        assert torch.allclose(after[name.replace("layers.3", "layers.2")], before[name] * 1.1)


def test_files_of_a_base_model_alone_take_new_values(recover, tiny_gpt2, fit, tmp_path):
    folder = shutil.copytree(tiny_gpt2, tmp_path / "base")
    stored = weights_of(folder)
    change_weights(
        folder,
        lambda tensors: {name.removeprefix("transformer."): tensors[name] for name in tensors},
    )
    fit.names = ["transformer.h.4.mlp.c_proj.weight", "transformer.ln_f.weight"]
    recover(folder, "--blocks", "2")
    after = weights_of(tmp_path / "out")
    for new, old in zip(("h.3.mlp.c_proj.weight", "ln_f.weight"), fit.names, strict=True):
        assert torch.equal(after[new], stored[old] * 1.1)


def test_half_precision_on_a_cpu_keeps_every_stored_digit(recover, tmp_path):
    folder = save_model(tmp_path / "half", llama_config(4, dtype=torch.float16))
    recover(folder, "--blocks", "2", samples=40)
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    changed = [
        n for n, tensor in after.items() if ".layers.1." in n and not torch.equal(tensor, before[n])
    ]
    assert changed
    assert {after[name].dtype for name in changed} == {torch.float16}
    assert not any(torch.equal(after[name].bfloat16().half(), after[name]) for name in changed)


def failing(module, name, error):
    """Return a function that lets a function of a module fail."""

    def fail(*arguments):
        raise error

    return lambda patch: patch.setattr(module, name, fail)


def interrupted_fit(patch):
    turns = cycle([DEFAULT, DEFAULT, KeyboardInterrupt])
    patch.setattr(closed_form, "fit_block", Mock(wraps=closed_form.fit_block, side_effect=turns))


@pytest.fixture
def fits(monkeypatch):
    """The blocks that are fitted, one after the other."""
    fit, found = closed_form.fit_block, []
    counted = lambda projections, fit_some, *most: (  # noqa: E731
        found.append(fit_some.__self__.block) or fit(projections, fit_some, *most)
    )
    monkeypatch.setattr(closed_form, "fit_block", counted)
    return found


@pytest.mark.parametrize(
    ("fail", "code", "all_fitted", "options"),
    [
        (failing(engine, "prove", ProofError("It failed.", hint="Try again.")), 9, True, []),
        (
            failing(engine, "write_weights", OSError(errno.ENOSPC, "full")),
            8,
            True,
            ["--dtype", "bfloat16"],
        ),
        (interrupted_fit, 130, False, ["--stream"]),
    ],
    ids=["proof", "disk", "Ctrl-C"],
)
def test_no_fit_is_lost_and_none_to_other_text_is_used(
    recover, tiny_llama, tmp_path, monkeypatch, fits, fail, code, all_fitted, options
):
    command = [tiny_llama, "--blocks", "2", *options]
    recover(*command, samples=20, output="whole")
    whole = fits.copy()
    with monkeypatch.context() as patch:
        fail(patch)
        stopped = recover(*command, samples=20, code=code)
        assert "Continuing" not in recover(*command, "--seed", 1, samples=20, code=code).stderr
    assert "What was found is saved in" in stopped.stderr
    fitted = fits[len(whole) :]
    result = recover(*command, samples=20)
    assert re.search(r"Continuing with \d+ fits of an interrupted run.", result.stderr)
    again = fits[len(whole) + len(fitted) :]
    assert (again == []) == all_fitted
    assert fitted[: len(whole) - len(again)] + again == whole  # each once, in two runs
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "change", [["--sequence-length", 64], ["--dtype", "float16"]], ids=["length", "rounding"]
)
def test_a_fit_is_not_continued_with_another_setting(
    apply, tiny_llama, tmp_path, monkeypatch, change
):
    # The longer sequences have the very tokens of the shorter ones; without --dtype, the norms keep
    # their float32.
    folder, text = shutil.copytree(tiny_llama, tmp_path / "model"), tmp_path / "text.txt"
    change_weights(
        folder,
        lambda dense: {
            n: dense[n].to(torch.float32 if "norm" in n else torch.float16) for n in dense
        },
    )
    text.write_text(prose(100))
    command = [folder, "--blocks", "2", "--recover", "--calibration", text, "--sequence-length", 32]
    records = [
        json.loads(apply(*command, *options, "--json", output=output).stdout)["recovery"]
        for options, output in (([], "before"), (change, "undisturbed"))
    ]
    assert all(
        len({record[text]["tokens_sha256"] for record in records}) == 1
        for text in ("train_text", "validation_text")
    )
    with monkeypatch.context() as patch:
        failing(engine, "prove", ProofError("It failed.", hint="Try again."))(patch)
        apply(*command, code=9)
    assert "Continuing" not in apply(*command, *change).stderr
    assert same_weights(tmp_path / "undisturbed", tmp_path / "out")


@pytest.mark.parametrize(
    ("stops", "end"), [({"MIN_GAIN": 1.0}, 0), ({"PATIENCE": 99}, -1)], ids=["fewest", "most"]
)
def test_a_forecast_counts_what_runs(recover, tmp_path, monkeypatch, stops, end):
    run, ran = SkippableModel.run_block, []

    def counted(self, call, entering):
        ran.append(entering.shape[:2].numel())
        return run(self, call, entering)

    def timed(once, **how):
        ran.clear()
        once()
        return [10.0 + ran.pop()]  # a call takes as long as ten tokens

    monkeypatch.setattr(SkippableModel, "run_block", counted)
    for name, value in (stops | {"BATCH_TOKENS": 32}).items():
        monkeypatch.setattr(closed_form, name, value)
    monkeypatch.setattr(depth, "PROBED_TOKENS", 32)
    monkeypatch.setattr(forecast, "LONG", 0.0)
    monkeypatch.setattr(forecast.timeit, "repeat", timed)
    told = recover(
        save_model(tmp_path / "deep", llama_config(20)), "--blocks", "6", "--no-verify", samples=20
    ).stderr
    hours = re.findall(r"([\d.]+) h ", told)
    assert 1 / 2 < float(hours[end]) * 3600 / sum(ran) < 2


def test_what_nobody_continued_is_cleared_later(sleb, tiny_llama, tmp_path):
    kept = {"ours": "block-3.safetensors", "fresh": "block-3.safetensors", "not ours": "notes.txt"}
    for name, file in kept.items():
        folder = tmp_path / f".{name}.recovery" / "float32-float32-0123456789abcdef"
        folder.mkdir(parents=True)
        (
            folder / ".block-2.safetensors.01234567.partial"
        ).touch()  # of a process that was killed while it saved
        for saved in (file, "closed-form.safetensors"):
            (folder / saved).touch()
        for path in [] if name == "fresh" else [*folder.iterdir(), folder]:
            os.utime(path, (0, 0))
    sleb("apply", tiny_llama, "--blocks", "2", "-o", "out")
    assert {path.name for path in tmp_path.glob(".*")} == {".fresh.recovery", ".not ours.recovery"}


def test_a_quantized_model_is_refused(recover, tiny_llama, fit, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "quantized")
    write_config(folder, quantization_config={"quant_method": "fp8"})
    assert (
        "is quantized, so its blocks cannot be recovered"
        in recover(folder, "--blocks", "2", code=4).stderr
    )
    assert not fit.calls


def test_what_cannot_be_is_refused(recover, search, llama_plan, text_file, fit):
    assert "4 sequences cannot be divided" in recover(llama_plan, samples=4, code=5).stderr
    too_much = recover(llama_plan, samples=5000, code=5).stderr
    assert (
        search("--remove", 1, samples=5000, code=5).stderr.splitlines()[-2:]
        == too_much.splitlines()[-2:]
    )
    assert "no usable cuda:77" in recover(llama_plan, "--device", "cuda:77", code=7).stderr


def test_without_the_memory_for_the_model_it_is_refused(recover, llama_plan, fit, monkeypatch):
    monkeypatch.setattr(door, "memory_shortage", shortage_at(1000))
    needed = r"Recovery needs \S+ [kM]B of memory on cpu \(\S+ kB for the model, .* for regression sums\)"
    assert re.search(needed, recover(llama_plan, code=7).stderr)


@pytest.mark.parametrize("planned", ["", "{}", "{}:1"])
def test_the_default_text_is_the_plans_or_the_models_own(
    apply, llama_plan, tiny_llama, text_file, fit, planned
):
    plan = json.loads(llama_plan.read_text())
    plan["calibration"]["source"] = planned.format(text_file)
    llama_plan.write_text(json.dumps(plan))
    subject = [llama_plan] if planned else [tiny_llama, "--blocks", "3"]
    options = ["--recover", "--samples", 10, "--sequence-length", 32, "--no-verify", "--json"]
    source = json.loads(apply(*subject, *options).stdout)["recovery"]["train_text"]["source"]
    assert source == (f"{text_file}:0.75,self:0.25" if planned else "self")


def test_the_plan_of_a_recovered_checkpoint_measures_the_recovered_weights(
    recover, sleb, llama_plan, tiny_llama, text_file, fit, tmp_path
):
    recover(llama_plan)
    plan, text = "out/sleb_plan.json", evaluation(text_file)

    def evaluated(*words):
        return json.loads(sleb("eval", *words, "--json").stdout)["texts"][0]

    dense, removed, alone = (
        evaluated(subject, *text) for subject in (tiny_llama, llama_plan, "out")
    )
    both = evaluated(plan, "--model", tiny_llama, *text)
    said = sleb("eval", plan, "--model", tiny_llama, *text).stderr
    assert f"The pruned model is {tmp_path / 'out'}, with its recovered weights." in " ".join(
        said.split()
    )
    assert both["dense"] == dense["dense"]
    (pruned,) = both["pruned"]
    assert pruned["losses"] == alone["dense"]["losses"]
    assert pruned["losses"] != removed["pruned"][0]["losses"]
    # Neither is taken for the other where it was measured before.
    again = [word for word in text if word != "--force"]
    for _ in range(2):
        assert evaluated(plan, "--model", tiny_llama, *again) == both
        assert evaluated(llama_plan, *again) == removed
    sleb("export", plan, "--to", "table", "-o", "table.csv")
    row = (tmp_path / "table.csv").read_text().splitlines()[2]
    assert {"recovered in closed form", str(pruned["perplexity"])} <= {*row.split(",")}
    other = "has no other size"
    for *options, words in (
        ["--remove", 1, other],
        ["--every", 1, other],
        ["--stream", "both must fit on one device"],
    ):
        assert words in sleb("eval", plan, "--model", tiny_llama, *text, *options, code=2).stderr

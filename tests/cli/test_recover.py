"""`sleb apply --recover`, through `main()`, with a fit that only its interface is known of."""

import errno
import json
import math
import os
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_files import change_weights, write_config
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
from recovering import failing, standing_in
from sleb_cli.engine.door import recovery as door
from sleb_cli.engine.files.tensors import read_all
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.output import checkpoint as engine
from sleb_cli.engine.recovery import recover as recover_module
from sleb_cli.engine.recovery.ridge import Gap
from sleb_cli.plan import read_plan
from sleb_plugins import ProofError

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def fit(monkeypatch):
    return standing_in(
        monkeypatch, [DOWN, "model.layers.5.mlp.down_proj.weight", "model.norm.weight"]
    )


@pytest.fixture
def recover(apply, text_file):
    """Refit a model or plan into `out`, on text, and give the result."""
    refit = ["--recover", "--no-heal"]
    return lambda subject, *options, samples=10, **how: apply(
        subject, *refit, *calibration(text_file, samples), *options, **how
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
    result = recover(llama_plan)
    out = tmp_path / "out"
    loaded = [call.args[0] for call in loads.mock_calls]
    assert loaded.count(tiny_llama) == 1
    assert len(loaded) == 2  # what was written, too
    plan = read_plan(out / "sleb_plan.json")
    record = plan.recovery
    removed, fitted, validation = fit.calls[0]
    assert (removed, fitted.shape, validation.shape) == (sorted(plan.removals), (7, 32), (2, 32))
    texts = (record.train_text, record.validation_text, record.test_text)
    assert [text.sequences for text in texts] == [7, 2, 1]
    assert len({text.tokens_sha256 for text in texts}) == 3
    assert (record.dense.divergence, plan.proof.reference) == (0.0, "recovered")
    pruned, recovered = (math.exp(each.loss) for each in (record.pruned, record.models[-1][1]))
    for words in (
        "matches the recovered model in memory",
        f"{pruned:.2f}",
        f"{recovered:.2f}",
        *record.summaries(None),
    ):
        assert words in result.stdout
    card = (out / "README.md").read_text()
    assert str(text_file.parent) not in card
    for words in (
        text_file.name,
        "bitwise equal to those of the recovered model in memory",
        f"| recovered in closed form | {recovered:.2f} |",
        "the remaining blocks given new weights",
    ):
        assert words in card

    before = weights_of(tiny_llama)
    after = weights_of(out)
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
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    dense = {}
    for name, tensor in weights_of(folder).items():
        dense[name] = tensor.to(getattr(torch, norms if "norm" in name else weights))
    change_weights(folder, lambda _: dense)
    write_config(folder, dtype=config)
    proof = json.loads(recover(folder, "--blocks", "3", "--json").stdout)["proof"]
    assert proof["logits_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype
    computed = torch.float32 if loaded is torch.float16 else loaded
    assert proof["dtype"] == str(computed).removeprefix("torch.")
    written = weights_of(tmp_path / "out")
    for name, tensor in written.items():
        assert tensor.dtype is dense[name].dtype, name
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


@pytest.mark.parametrize("stage", [("--recover", "--no-heal"), ("--heal", "--heal-tokens", 1024)])
def test_float16_is_recovered_in_float32_and_keeps_every_stored_digit(
    apply, text_file, tmp_path, processor, monkeypatch, stage
):
    processor(torch.float16)
    opened = Mock(wraps=recover_module.open_model)
    monkeypatch.setattr(recover_module, "open_model", opened)
    folder = save_model(tmp_path / "half", llama_config(4, dtype=torch.float16))
    apply(folder, "--blocks", "2", *stage, *calibration(text_file, 40))
    assert opened.mock_calls[0].args[1].dtype is torch.float32
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    changed = []
    for name, tensor in after.items():
        if ".layers.1." in name and not torch.equal(tensor, before[name]):
            changed.append(tensor)
    assert changed
    assert {tensor.dtype for tensor in changed} == {torch.float16}
    assert not any(torch.equal(tensor.bfloat16().half(), tensor) for tensor in changed)


@pytest.fixture
def fits(monkeypatch):
    """The blocks that are fitted, one after the other."""
    fit = Gap.fit
    found = []

    def counted(gap):
        found.append(gap.block)
        return fit(gap)

    monkeypatch.setattr(Gap, "fit", counted)
    return found


@pytest.mark.parametrize(
    ("fail", "code", "options"),
    [
        (failing(engine, "prove", ProofError("It failed.", hint="Try again.")), 9, []),
        (
            failing(engine, "write_weights", OSError(errno.ENOSPC, "full")),
            8,
            ["--dtype", "bfloat16"],
        ),
        (failing(recover_module, "file_tensors", KeyboardInterrupt), 130, ["--stream"]),
    ],
    ids=["proof", "disk", "Ctrl-C"],
)
def test_no_fit_is_lost_and_none_to_other_text_is_used(
    recover, tiny_llama, tmp_path, monkeypatch, fits, fail, code, options
):
    command = [tiny_llama, "--blocks", "1,3", *options]
    recover(*command, samples=20, output="whole")
    fitted = fits.copy()
    with monkeypatch.context() as patch:
        fail(patch)
        stopped = recover(*command, samples=20, code=code)
        assert "Continuing" not in recover(*command, "--seed", 1, samples=20, code=code).stderr
    assert "What was found is saved in" in stopped.stderr
    result = recover(*command, samples=20)
    assert "Continuing after the fits of an interrupted run." in result.stderr
    assert fits == 3 * fitted  # the third for other text
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
    refit = ["--recover", "--no-heal", "--calibration", text, "--sequence-length", 32]
    command = [folder, "--blocks", "2", *refit]
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


def test_what_nobody_continued_is_cleared_later(sleb, tiny_llama, tmp_path):
    names = {
        "ours": ".ours.float32-float32-0123456789abcdef.recovery",
        "other": ".not ours.recovery",
    }
    for name in names.values():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    fresh = ".fresh.float32-float32-0123456789abcdef.recovery"
    (tmp_path / fresh).touch()
    sleb("apply", tiny_llama, "--blocks", "2", "-o", "out")
    assert {path.name for path in tmp_path.glob(".*")} == {fresh, names["other"]}


def test_a_quantized_model_is_refused(recover, tiny_llama, fit, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "quantized")
    write_config(folder, quantization_config={"quant_method": "fp8"})
    assert (
        "is quantized, so its blocks cannot be recovered"
        in recover(folder, "--blocks", "2", code=4).stderr
    )
    assert not fit.calls


def test_without_the_memory_for_the_model_it_is_refused(recover, llama_plan, fit, monkeypatch):
    monkeypatch.setattr(door, "memory_shortage", shortage_at(1000))
    needed = (
        r"Recovery needs \S+ [kM]B of memory on cpu "
        r"\(\S+ kB for the model, .* for regression sums\)"
    )
    assert re.search(needed, recover(llama_plan, code=7).stderr)


@pytest.mark.parametrize("planned", ["", "{}", "{}:1"])
def test_the_default_text_is_the_plans_or_the_models_own(
    apply, llama_plan, tiny_llama, text_file, fit, planned
):
    plan = json.loads(llama_plan.read_text())
    plan["calibration"]["source"] = planned.format(text_file)
    llama_plan.write_text(json.dumps(plan))
    subject = [llama_plan] if planned else [tiny_llama, "--blocks", "3"]
    options = "--recover --no-heal --samples 10 --sequence-length 32 --no-verify --json"
    source = json.loads(apply(*subject, options).stdout)["recovery"]["train_text"]["source"]
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
    said = sleb("eval", plan, "--model", tiny_llama, *text).said
    assert f"The pruned model is {tmp_path / 'out'}, with its own weights" in said
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

"""The data type that each command computes in, on processors that compute in few."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import (
    calibration,
    evaluation,
    llama_config,
    prose,
    save_model,
    shortage_at,
    tokens_of_test_text,
    weights_of,
)
from recovering import interrupt_healing
from sleb_cli.engine.forward import placement
from sleb_cli.engine.search import journal as journals
from sleb_cli.plan import read_plan

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture
def model(tmp_path):
    """Make a tiny Llama with weights of a data type."""
    return lambda dtype, blocks=6: save_model(tmp_path / dtype, llama_config(blocks, dtype=dtype))


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize(
    ("weights", "processor_has", "computed"),
    [("bfloat16", [], "float32"), ("float16", [F16], "float16")],
)
def test_each_command_computes_in_what_the_processor_has(
    sleb, model, processor, text_file, weights, processor_has, computed
):
    folder, text = model(weights), calibration(text_file)
    processor(*processor_has)
    said = sleb("search", folder, "--remove 1", *text).stdout
    shown = computed if weights == computed else f"{computed} (weights: {weights})"
    assert f"{shown} on cpu" in " ".join(said.split())
    plan = json.loads(Path("plan.json").read_text())
    assert (plan["search"]["dtype"], plan["model"]["dtype"]) == (computed, weights)
    commands = {
        "apply": ["--recover --no-heal", *calibration(text_file, samples=10), "-o out"],
        "eval": evaluation(text_file),
        "bench": ["--prompt --prompt-length 8 --iterations 1"],
    }
    for command, options in commands.items():
        result = sleb(command, "plan.json", *options, "--json").data
        assert (result.get("proof", result)["dtype"], result["model"]["dtype"]) == (
            computed,
            weights,
        ), command
    assert {str(tensor.dtype) for tensor in weights_of(Path("out")).values()} == {
        f"torch.{weights}"
    }
    assert (
        "dtype: bfloat16" in sleb("export plan.json --to mergekit").stdout or weights != "bfloat16"
    )


def test_the_numbers_are_those_of_the_type_computed_in(sleb, model, processor, text_file):
    folder, options = model("bfloat16"), ["--remove 2", *calibration(text_file)]
    sleb("search", folder, *options, "--dtype float32 -o named.json")
    processor()
    sleb("search", folder, *options)
    assert read_plan(Path("plan.json")).steps == read_plan(Path("named.json")).steps


def test_resumed_and_extended_elsewhere_it_keeps_its_type(
    sleb, model, processor, text_file, monkeypatch
):
    folder, text = model("bfloat16"), calibration(text_file)
    processor()
    with monkeypatch.context() as patch:
        patch.setattr(journals, "delete_journal", lambda *of: None)
        sleb("search", folder, "--remove 2", *text)
    processor(BF16)
    assert "Continuing with the" in sleb("search", folder, "--remove 2", *text, "--resume").stderr
    sleb("search", folder, "--remove 3 --extend plan.json -o more.json")
    assert [read_plan(Path(f"{name}.json")).search.dtype for name in ("plan", "more")] == [
        "float32"
    ] * 2


def test_a_healing_goes_on_in_its_type(sleb, model, processor, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(prose(400))
    healing = ["--heal --heal-tokens 4096", *calibration("text.txt", samples=10), "-o out"]
    command = ["apply", model("bfloat16"), "--blocks 2", *healing]
    processor()
    with monkeypatch.context() as patch:
        interrupt_healing(patch, 2)
        sleb(*command, code=130)
    processor(BF16)
    assert "Continuing an interrupted healing" in sleb(*command).stderr
    assert weights_of(Path("out"))["model.norm.weight"].dtype is BF16


def test_without_memory_for_float32_it_says_that_it_is_slow(
    sleb, model, processor, text_file, monkeypatch
):
    folder = model("bfloat16", 20)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    processor()
    free = [size * 3 // 2]
    monkeypatch.setattr(placement, "memory_shortage", lambda *needed: shortage_at(free[0])(*needed))
    told = sleb("eval", folder, *evaluation(text_file))
    assert (
        "This will be slow: the processor has no bfloat16 arithmetic, and float32 needs"
        in told.stderr
    )
    assert "bfloat16 on cpu" in told.stdout
    free[0] = size * 9 // 10
    told = sleb("eval", folder, *evaluation(text_file))
    assert "Streaming its blocks from disk" in told.stderr
    assert "float32 (weights: bfloat16) on cpu" in told.stdout


@pytest.mark.parametrize(
    ("weights", "cast", "more"),
    [("float32", "bfloat16", []), ("bfloat16", "float16", ["--stream"])],
)
def test_a_cast_is_proven_and_recovered_as_it_is_read(
    sleb, model, processor, text_file, tmp_path, weights, cast, more
):
    folder, proven = model(weights), "float16" if cast == "float16" else "float32"
    processor()
    recover = [
        "--recover --no-heal",
        *calibration(text_file, samples=10),
        "--dtype",
        cast,
        "-o out --json",
        *more,
    ]
    result = sleb("apply", folder, "--blocks 2", *recover).data
    assert (result["proof"]["dtype"], result["proof"]["logits_difference"]) == (proven, 0)
    reported = tokens_of_test_text(folder, text_file, result["recovery"])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    logits = written(reported).logits[:, :-1].log_softmax(-1)
    loss = -logits.gather(-1, reported[:, 1:, None]).mean().item()
    assert result["recovery"]["closed_form_losses"]["loss"] == pytest.approx(loss, rel=1e-6)

"""`sleb apply` of a model whose blocks are streamed: the same files, and a complete proof."""

import json

import pytest
import torch

from conftest import calibration, save_model
from families import tiny_config
from sleb_cli.engine.forward import streaming
from sleb_cli.engine.output import proof
from sleb_cli.engine.recovery import closed_form, settings

COMPLETE = ["complete", "same bytes", "loads", "same logits", "generates", "saves again"]


@pytest.fixture
def recover(run_sleb, text_file):
    """Recover a plan, and give the result."""

    def run(plan, *options, samples=20, output="out"):
        result = run_sleb("apply", plan, "--recover", *calibration(text_file, samples), *options, "-o", output)
        assert result.exit_code == 0, result.stderr
        return result

    return run


def written(folder):
    """Return everything in a checkpoint that must not depend on where its weights were, and its proof."""
    plan = json.loads((folder / "sleb_plan.json").read_text())
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}, plan.pop("proof", None), plan


@pytest.mark.parametrize(
    "model_type",
    ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)],
)
def test_it_is_recovered_to_the_same_bytes(run_sleb, recover, model_type, text_file, tmp_path):
    model = save_model(tmp_path / "model", tiny_config(model_type, dtype=torch.bfloat16))
    found = run_sleb("search", model, "--remove", 1, *calibration(text_file), "-o", "plan.json")
    assert found.exit_code == 0, found.stderr
    assert "without its blocks" not in recover("plan.json", "--no-stream", output="there").stderr
    assert "without its blocks" in recover("plan.json", "--stream", output="streamed").stderr
    files, proven, plan = written(tmp_path / "streamed")
    expected, _, planned = written(tmp_path / "there")
    assert (files, plan) == (expected, planned)
    assert any(fit["kept"] for fit in plan["recovery"]["closed_form"]["fits"])
    assert proven["checks"] == COMPLETE
    assert (proven["partial"], proven["logits_difference"], proven["new_tokens"]) == (None, 0.0, 2)


def test_without_memory_it_is_streamed_with_a_notice(recover, llama_plan, tmp_path, monkeypatch):
    recover(llama_plan, output="there")
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 260_000)
    monkeypatch.setattr(proof, "free_bytes", lambda device: 260_000)
    told = recover(llama_plan, output="streamed").stderr
    assert "are free on cpu. Streaming its blocks from disk (--stream)" in told
    assert "The proof leaves the blocks on disk" in told
    files, proven, plan = written(tmp_path / "streamed")
    expected, _, planned = written(tmp_path / "there")
    assert (files, plan) == (expected, planned)
    assert (proven["checks"], proven["new_tokens"], proven["dtype"]) == (COMPLETE, 2, "float32")


def test_more_batches_take_no_more_reads(recover, llama_plan, visits, monkeypatch):
    recover(llama_plan, "--stream", "--no-verify", samples=40, output="few")
    few = len(visits)
    visits.clear()
    monkeypatch.setattr(closed_form, "BATCH_TOKENS", 64)
    recover(llama_plan, "--stream", "--no-verify", samples=40, output="many")
    # Which fits are kept may differ with the last bits of their sums, and so where fitting stops.
    assert abs(len(visits) - few) <= 4
    assert few <= 40


def test_hidden_states_wait_in_host_memory(recover, llama_plan, tmp_path, monkeypatch, simulate):
    simulate()
    options = ["--device", "sim", "--stream", "--no-verify"]
    recover(llama_plan, *options, output="device")
    needed, large = settings._needed_bytes, {settings.HIDDEN_STATES: 2**30}
    monkeypatch.setattr(settings, "_needed_bytes", lambda *args, **how: needed(*args, **how) | large)
    monkeypatch.setattr(settings, "free_bytes", lambda device: 2**29 if device.type == "sim" else 2**31)
    held = []
    monkeypatch.setattr(closed_form._States, "held", lambda self, tensor: held.append(self.on_host) or tensor.cpu())
    recover(llama_plan, *options, output="host")
    assert set(held) == {True}
    assert written(tmp_path / "host") == written(tmp_path / "device")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--heal"], "--heal trains the model, so all of it must be in memory"),
        (["--recover", "--calibration", "self"], "A streamed model cannot write its own text"),
    ],
)
def test_what_needs_all_of_it_is_refused(run_sleb, llama_plan, options, words):
    result = run_sleb("apply", llama_plan, *options, "--stream", "-o", "out")
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_default_text_is_not_its_own(run_sleb, llama_plan, text_file, tmp_path):
    options = ["--samples", 10, "--sequence-length", 32, "--no-verify"]
    result = run_sleb("apply", llama_plan, "--recover", "--stream", *options, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert written(tmp_path / "out")[2]["recovery"]["text"]["source"] == text_file.name

"""`sleb apply` of a model whose blocks are streamed: the same files, and a complete proof."""

import json

import pytest
import torch

from conftest import calibration, save_model
from families import tiny_config
from sleb_cli.engine.forward import streaming
from sleb_cli.engine.output import proof
from sleb_cli.engine.recovery import closed_form, run

COMPLETE = ["complete", "same bytes", "loads", "same logits", "generates", "saves again"]


def written(folder):
    """Return everything in a checkpoint that must not depend on where its weights were, and its proof."""
    plan = json.loads((folder / "sleb_plan.json").read_text())
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}, plan.pop("proof", None), plan


@pytest.mark.parametrize(
    "model_type",
    ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)],
)
def test_it_is_recovered_to_the_same_bytes(run_sleb, model_type, text_file, tmp_path):
    model = save_model(tmp_path / "model", tiny_config(model_type, dtype=torch.bfloat16))
    found = run_sleb("search", model, "--remove", 1, *calibration(text_file), "-o", "plan.json")
    assert found.exit_code == 0, found.stderr
    for name in ("no-stream", "stream"):
        result = run_sleb("apply", "plan.json", "--recover", f"--{name}", *calibration(text_file, 20), "-o", name)
        assert result.exit_code == 0, result.stderr
        assert ("without its blocks" in result.stderr) == (name == "stream")
    files, proven, plan = written(tmp_path / "stream")
    expected, _, planned = written(tmp_path / "no-stream")
    assert (files, plan) == (expected, planned)
    assert any(fit["kept"] for fit in plan["recovery"]["closed_form"]["fits"])
    assert proven["checks"] == COMPLETE
    assert (proven["partial"], proven["logits_difference"], proven["new_tokens"]) == (None, 0.0, 2)


def test_a_model_that_does_not_fit_is_streamed(run_sleb, llama_plan, text_file, tmp_path, monkeypatch):
    options = ["apply", llama_plan, "--recover", *calibration(text_file, 20)]
    assert run_sleb(*options, "-o", "there").exit_code == 0
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 260_000)
    monkeypatch.setattr(proof, "free_bytes", lambda device: 260_000)
    result = run_sleb(*options, "-o", "streamed")
    assert result.exit_code == 0, result.stderr
    assert "are free on cpu. Streaming its blocks from disk (--stream)" in result.stderr
    assert "For the proof, blocks stay on the disk" in result.stderr
    files, proven, plan = written(tmp_path / "streamed")
    expected, _, planned = written(tmp_path / "there")
    assert (files, plan) == (expected, planned)
    assert (proven["checks"], proven["new_tokens"], proven["dtype"]) == (COMPLETE, 2, "float32")


def test_more_batches_take_no_more_reads(run_sleb, llama_plan, text_file, visits, monkeypatch):
    options = ["apply", llama_plan, "--recover", "--stream", "--no-verify", *calibration(text_file, 40)]
    assert run_sleb(*options, "-o", "few").exit_code == 0
    few = len(visits)
    visits.clear()
    monkeypatch.setattr(closed_form, "BATCH_TOKENS", 64)
    assert run_sleb(*options, "-o", "many").exit_code == 0
    # Which fits are kept may differ with the last bits of their sums, and so where fitting stops.
    assert abs(len(visits) - few) <= 4
    assert few <= 40


def test_hidden_states_wait_in_host_memory_if_need_be(run_sleb, llama_plan, text_file, tmp_path, monkeypatch, simulate):
    simulate()
    options = ["apply", llama_plan, "--recover", "--device", "sim", "--stream", *calibration(text_file, 20)]
    assert run_sleb(*options, "--no-verify", "-o", "device").exit_code == 0
    needed = run._needed_bytes
    monkeypatch.setattr(run, "_needed_bytes", lambda *args: needed(*args) | {run.HIDDEN_STATES: 2**30})
    monkeypatch.setattr(run, "free_bytes", lambda device: 2**29 if device.type == "sim" else 2**31)
    held = []
    monkeypatch.setattr(
        closed_form._ClosedFormFit, "_held", lambda self, tensor: held.append(self.settings.place) or tensor.cpu()
    )
    result = run_sleb(*options, "--no-verify", "-o", "host")
    assert result.exit_code == 0, result.stderr
    assert {place.type for place in held} == {"cpu"}
    assert written(tmp_path / "host") == written(tmp_path / "device")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--heal"], "--heal trains the model, so all of it must be in memory"),
        (["--recover", "--calibration", "self"], "does not write its own text: each token would read all of it"),
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

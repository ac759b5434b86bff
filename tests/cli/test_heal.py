"""`sleb apply --heal`, through `main()`."""

import json
import math
import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from conftest import calibration, interrupt_healing, llama_config, prose, random_model, save_model, weights_of
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.output import apply
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery import heal as healing
from sleb_cli.engine.recovery import settings
from sleb_cli.engine.recovery.variant import Variant
from sleb_cli.plan import read_plan
from sleb_plugins import ProofError


@pytest.fixture
def healed(run_sleb, tiny_llama, text_file):
    """Heal the tiny Llama without two blocks, and give the result and its record."""

    def run(output, *options, tokens=8192, code=0):
        budget = ["--heal-tokens", tokens] if tokens else []
        command = ["apply", tiny_llama, "--blocks", "2,3", "--heal", *budget, *calibration(text_file, samples=10)]
        result = run_sleb(*command, "-o", output, *options)
        assert result.exit_code == code, result.stderr
        return result

    return run


def same_weights(one, two):
    found, expected = weights_of(one), weights_of(two)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def nearer(record):
    return record["heal"]["losses"]["divergence"] < record["pruned"]["divergence"]


def test_healing_comes_nearer_to_the_dense_model(healed, tmp_path):
    result = healed("out")
    assert re.search(r"dense .*\n.* pruned .*\n.* healed .*\n(.*\n)?.*; \d+% of the divergence", result.stdout)
    assert "bitwise equal to those of the recovered model in memory" in result.stdout
    told = re.findall(r"healing, (\d+)%: KL to the dense model (\S+), on deciding text (\S+)", result.stderr)
    assert len(told) >= 8
    assert int(told[-1][0]) >= 100
    assert float(told[-1][1]) < float(told[0][1])
    assert float(told[-1][2]) < float(told[0][2])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_was_done_is_recorded(run_sleb, llama_plan, text_file, tmp_path):
    command = ["apply", llama_plan, "--heal", "--heal-tokens", 2048, *calibration(text_file, samples=10)]
    assert run_sleb(*command, "-o", "out").exit_code == 0
    recovery = read_plan(tmp_path / "out" / "sleb_plan.json").recovery
    assert recovery
    heal = recovery.heal
    assert heal
    assert (heal.token_budget, heal.minutes, heal.stopped, heal.tokens) == (2048, None, "budget", 2048)
    assert heal.losses.divergence < recovery.pruned.divergence
    assert recovery.recovered == heal.losses
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| healed on 2,048 tokens | {math.exp(heal.losses.loss):.2f} |" in card


def test_a_budget_of_tokens_gives_the_same_bytes_again(healed, tiny_llama, tmp_path):
    healed("one")
    healed("two")
    assert same_weights(tmp_path / "one", tmp_path / "two")
    before, after = weights_of(tiny_llama), weights_of(tmp_path / "one")
    outside = [name for name in after if ".layers." not in name]
    assert outside
    assert all(torch.equal(before[name], after[name]) for name in outside)  # embeddings and head are the model's own
    assert not torch.equal(before["model.layers.5.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"])


def test_an_interrupted_healing_goes_on_to_the_same_bytes(healed, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "PORTION_TOKENS", 1024)
    healed("whole")
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 6)
        healed("out", code=130)
    assert sorted(name for name in os.listdir(tmp_path) if "out" in name) == [".out.recovery"]
    assert "holds an unfinished healing" in healed("out", code=8).stderr
    assert (
        "belongs to another healing (heal_tokens: 4096, not 8192)"
        in healed("out", "--resume", tokens=4096, code=3).stderr
    )
    with monkeypatch.context() as patches:
        steps = interrupt_healing(patches, 100)
        healed("out", "--resume")
    assert len(steps) == 3
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / ".out.recovery").exists()


def test_a_healing_whose_proof_fails_goes_on_from_its_end(healed, tmp_path, monkeypatch):
    healed("whole", "--recover")

    def fail(*arguments):
        raise ProofError("It failed.", hint="Try again.")

    with monkeypatch.context() as patches:
        patches.setattr(apply, "prove", fail)
        stopped = healed("out", "--recover", code=9)
    assert "The healing is kept in" in stopped.stderr
    assert "rerun with --resume to continue" in stopped.stderr
    assert "holds an unfinished healing" in healed("out", "--recover", code=8).stderr
    steps = interrupt_healing(monkeypatch, 1)
    healed("out", "--recover", "--resume")
    assert not steps
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_a_healing_is_not_resumed_on_other_text(run_sleb, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(prose(400))
    command = ["apply", tiny_llama, "--blocks", "2,3", "--heal", "--heal-tokens", 8192, "-o", "out"]
    command += calibration(tmp_path / "text.txt", samples=10)
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 6)
        assert run_sleb(*command).exit_code == 130
    (tmp_path / "text.txt").write_text(prose(400, seed=1))
    result = run_sleb(*command, "--resume")
    assert result.exit_code == 3
    assert "belongs to another healing (text: " in result.stderr


def test_out_of_memory_heals_fewer_sequences_at_once(healed, tmp_path, monkeypatch):
    distill, failed = healing.distill, []

    def short_of_memory(teacher, student, ids, *rest):
        if len(ids) > 8:
            failed.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return distill(teacher, student, ids, *rest)

    monkeypatch.setattr(healing, "distill", short_of_memory)
    result = healed("out", "--json")
    assert failed == [32, 16]
    assert "Out of memory on cpu; healing 8 sequences at a time." in result.stderr
    assert nearer(json.loads(result.stdout)["recovery"])


@pytest.mark.parametrize("overflows", [False, True])
def test_float16_gradients_are_scaled(monkeypatch, overflows):
    monkeypatch.setattr(healing, "SCALE_HEADROOM", 2**20 if overflows else 16)
    found, scales = first_gradient(torch.float16)
    assert (scales[1] < scales[0]) == overflows
    exact, _ = first_gradient(torch.float32)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.999
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


def first_gradient(dtype):
    """Return the gradient of a healing's first step, and the scale of the loss before and after it."""
    teacher, student = (random_model(llama_config(3)).half().to(dtype).requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight *= 0.5
    ids = torch.randint(2, 300, (32, 32), generator=torch.Generator().manual_seed(0))
    with (
        SkippableModel(teacher, teacher.model.layers) as dense,
        SkippableModel(student, student.model.layers) as pruned,
    ):
        case = healing.Case(
            Variant(dense), Variant(pruned), 0, {"down": student.model.layers[2].mlp.down_proj.weight},
            stored=torch.float16, portion=None, deciding=ids,
        )  # fmt: skip
        budget = healing.HealBudget(None, 1)
        run = healing._Healing(case, budget, ProcessGroup(), lambda saved: None, lambda event: None)
        began, wanted = run.progress.scale, Variant(dense).final_states(ids).detach()
        return run._gradient(ids, wanted, wanted), (began, run.progress.scale)


def test_a_broken_state_is_named(healed, tmp_path):
    (tmp_path / ".out.recovery").mkdir()
    (tmp_path / ".out.recovery" / "healing.safetensors").write_bytes(b"nothing")
    assert "healing.safetensors is broken" in healed("out", "--resume", code=3).stderr
    healed("out", "--force", tokens=512)


def test_a_budget_of_minutes_ends(healed, monkeypatch):
    monkeypatch.setattr(healing, "PATIENCE", healing.CHECKS + 2)  # more checks than there are
    result = healed("out", "--heal-minutes", 0.02, "--json", tokens=None)
    heal = json.loads(result.stdout)["recovery"]["heal"]
    assert (heal["stopped"], heal["minutes"], heal["token_budget"]) == ("budget", 0.02, None)
    assert 1 <= heal["seconds"] < 60


def test_it_stops_without_gains_and_keeps_the_best_point(healed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "LEARNING_RATE", 100.0)
    result = healed("out", "--json")
    heal = json.loads(result.stdout)["recovery"]["heal"]
    assert (heal["stopped"], heal["kept_tokens"]) == ("patience", 0)
    before, after = weights_of(tiny_llama), weights_of(tmp_path / "out")
    assert torch.equal(before["model.layers.5.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"])


def test_it_starts_from_the_closed_form(healed, tmp_path, monkeypatch):
    from test_recover import standing_in

    name = "model.layers.4.mlp.down_proj.weight"
    standing_in(monkeypatch, [name, "model.norm.weight"])
    monkeypatch.setattr(healing, "LEARNING_RATE", 0.0)
    result = healed("out", "--recover", "--json", tokens=512)
    record = json.loads(result.stdout)["recovery"]
    assert record["heal"]["losses"] == record["closed_form_losses"] != record["pruned"]


def test_a_small_file_may_be_part_of_a_mixture(run_sleb, tiny_llama, tmp_path):
    (tmp_path / "small.txt").write_text(prose(60))
    command = ["apply", tiny_llama, "--blocks", "2", "--heal", "--heal-tokens", 4096, "--sequence-length", 32]
    mixture = ["--calibration", "small.txt:0.75,self:0.25", "--samples", 8]
    result = run_sleb(*command, *mixture, "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recovery"]["heal"]["tokens"] >= 4096


@pytest.mark.parametrize(("source", "times"), [("text.txt", {1}), ("text.txt:0.5,self:0.5", {1, 2}), ("self", {2})])
def test_text_is_used_once_or_twice_if_the_model_wrote_it(
    run_sleb, tiny_llama, text_file, tmp_path, monkeypatch, source, times
):
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
    seen, distill = [], healing.distill

    def listening(teacher, student, ids, *rest):
        seen.extend(tuple(row) for row in ids.tolist())
        return distill(teacher, student, ids, *rest)

    monkeypatch.setattr(healing, "distill", listening)
    monkeypatch.setattr(healing, "BATCH_TOKENS", 128)
    command = ["apply", tiny_llama, "--blocks", "2", "--heal", "--heal-tokens", 1024, "--sequence-length", 32]
    result = run_sleb(*command, "--calibration", source, "--samples", 20, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert {seen.count(row) for row in seen} == times
    assert ("measured on self" in " ".join(result.stdout.split())) == (source == "self")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--heal-tokens", "5"], 2, "--heal-tokens requires --heal."),
        (["--resume"], 2, "--resume requires --heal."),
        (["--recover", "--heal-minutes", "5"], 2, "--heal-minutes requires --heal."),
        (["--heal", "--heal-minutes", "5", "--heal-tokens", "5"], 2, "cannot be combined"),
        (["--heal", "--heal-minutes", "0"], 2, "--heal-minutes must be above 0, not 0."),
        (["--heal", "--heal-tokens", "-1"], 2, "--heal-tokens -1 is too small"),
        (["--heal", "--source", "x.gguf"], 2, "--source names one of another model"),
    ],
)
def test_what_cannot_be_is_refused(run_sleb, tiny_llama, options, code, words):
    result = run_sleb("apply", tiny_llama, "--blocks", "2", *options, "-o", "out")
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


def test_without_the_memory_it_is_refused(healed, monkeypatch):

    monkeypatch.setattr(settings, "free_bytes", lambda device: 500_000)
    words = healed("out", code=7).stderr
    assert re.search(
        r"Healing needs \S+ MB of memory on cpu \(.* trained weights, \S+ kB for the state of training", words
    )


@pytest.mark.slow
def test_two_processes_heal_one_model(tiny_llama, text_file, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["-m", "sleb_cli", "apply", tiny_llama, "--blocks", "2", "--heal", "--heal-tokens", 8192, "-o", "out"]
    command += ["--device", "cpu", *calibration(text_file, samples=10)]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote out") == 1
    assert 1 <= run.stderr.count("healing, 5") <= 2
    assert "Traceback" not in run.stderr
    assert weights_of(tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def test_blocks_far_below_the_gap_are_shared_and_stay(run_sleb, text_file, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(9))
    command = ["apply", folder, "--blocks", "6", "--heal", "--heal-tokens", 2048, *calibration(text_file, samples=10)]
    assert run_sleb(*command, "-o", "out").exit_code == 0
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    changed = [
        block
        for block in range(8)
        if not torch.equal(
            before[f"model.layers.{block + (block >= 6)}.mlp.up_proj.weight"],
            after[f"model.layers.{block}.mlp.up_proj.weight"],
        )
    ]
    assert changed == [2, 3, 4, 5, 6, 7]

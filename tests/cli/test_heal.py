"""`sleb apply --heal`, through `main()`."""

import math
import re
from itertools import chain, count, repeat
from pathlib import Path

import pytest
import torch

from conftest import (
    calibration,
    llama_config,
    prose,
    save_model,
    shortage_at,
    weight_bytes_of,
    weights_of,
)
from recovering import failing, interrupt_healing, standing_in
from sleb_cli.engine.door import recovery as door
from sleb_cli.engine.output import checkpoint as writing
from sleb_cli.engine.recovery import training
from sleb_cli.engine.recovery.heal import Heal
from sleb_cli.engine.recovery.language import Distillation
from sleb_cli.plan import read_plan
from sleb_plugins import ProofError

TOKENS = ["--heal-tokens 4096"]


@pytest.fixture
def healed(sleb, llama_plan, tmp_path):
    """Heal a model, by default the tiny Llama without the two blocks of its plan."""
    (tmp_path / "text.txt").write_text(prose(400))

    text = calibration("text.txt", samples=10)
    return lambda *options, of=(llama_plan,), **how: sleb(
        "apply", *of, "--heal", *text, "-o out", *options, **how
    )


def recovery():
    """Return what the plan in the checkpoint says of it."""
    return read_plan(Path("out/sleb_plan.json")).recovery


def test_healing_comes_nearer_to_the_dense_model(healed, tiny_llama, tmp_path):
    result = healed("--recover", *TOKENS)
    assert re.search(
        r"dense .*\n.* pruned .*\n.* recovered .*\n.* healed .*\n(.*\n)?.*; \d+% of the divergence",
        result.stdout,
    )
    assert "matches the recovered model in memory" in result.stdout
    told = re.findall(
        r"healing, (\d+)%: KL to the dense model (\S+), on validation text (\S+)", result.stderr
    )
    assert len(told) >= 8
    assert int(told[-1][0]) >= 100
    assert float(told[-1][2]) < float(
        told[0][2]
    )  # the other numbers are of other batches each time
    found, heal = recovery(), recovery().heal
    assert (heal.token_budget, heal.minutes, heal.stopped, heal.tokens) == (
        4096,
        None,
        "budget",
        4096,
    )
    assert heal.losses.divergence < found.pruned.divergence
    assert found.models[-1][1] == heal.losses
    assert (
        f"| healed on 4,096 tokens | {math.exp(heal.losses.loss):.2f} |"
        in (tmp_path / "out" / "README.md").read_text()
    )
    before, after = weights_of(tiny_llama), weights_of(tmp_path / "out")
    assert all(
        torch.equal(before[name], after[name])
        for name in after
        if "embed" in name or "head" in name
    )
    assert not torch.equal(
        before["model.layers.5.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"]
    )


def test_an_interrupted_healing_resumes_to_the_same_bytes(healed, tmp_path, monkeypatch):
    command, room = ["--recover", *TOKENS], []
    monkeypatch.setattr(writing, "require_space", lambda place, needed: room.append(needed))
    healed(*command, "-o whole")
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 6)
        stopped = healed(*command, code=130)
    kept = sum(file.stat().st_size for file in tmp_path.glob(".out.*.recovery"))
    checkpoint = sum(
        file.stat().st_size for file in tmp_path.glob("whole/*") if file.suffix != ".md"
    )
    assert kept / 2 < room[0] - checkpoint < 2 * kept
    assert re.search(
        r"What was found is saved in \S+: run the same command again to continue", stopped.stderr
    )
    (left,) = tmp_path.glob(".*")
    assert re.fullmatch(r"\.out\.float32-float32-[0-9a-f]{16}\.recovery", left.name)
    assert not (tmp_path / "out").exists()
    for change in (
        ["--heal-tokens 2048"],
        ["--seed 1"],
    ):  # another healing begins anew, and overwrites nothing
        with monkeypatch.context() as patches:
            interrupt_healing(patches, 1)
            assert (
                "Continuing an interrupted healing"
                not in healed(*command, *change, code=130).stderr
            )
    with monkeypatch.context() as patches:
        steps = interrupt_healing(patches, 100)
        failing(writing, "prove", ProofError("It failed.", hint="Try again."))(patches)
        assert (
            "Continuing an interrupted healing, after 2,560 tokens (62%)"
            in healed(*command, code=9).stderr
        )
    assert len(steps) == 3
    with monkeypatch.context() as patches:
        steps = interrupt_healing(patches, 1)
        healed(*command)  # from its end
    assert not steps
    assert room[-1] < checkpoint + 1000  # for what is kept has its place
    assert bool(weight_bytes_of(tmp_path / "whole") == weight_bytes_of(tmp_path / "out"))
    assert not list(tmp_path.glob(".*"))


def test_out_of_memory_heals_fewer_sequences_at_once(healed, monkeypatch):
    add_gradient, failed = Distillation.add_gradient, []

    def short_of_memory(distillation, batch, scale):
        if len(batch.ids) > 4:
            failed.append(len(batch.ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add_gradient(distillation, batch, scale)

    monkeypatch.setattr(Distillation, "add_gradient", short_of_memory)
    said = healed("--heal-tokens 2048").stderr
    assert failed == [16, 8]
    assert "Out of memory on cpu; healing 4 sequences at a time." in said
    assert recovery().heal.losses.divergence < recovery().pruned.divergence


def test_a_budget_of_minutes_ends(healed, monkeypatch):
    monkeypatch.setattr(training, "PATIENCE", training.CHECKS + 2)  # more checks than there are
    healed("--heal-minutes 0.02")
    heal = recovery().heal
    assert (heal.stopped, heal.minutes, heal.token_budget) == ("budget", 0.02, None)
    assert 1 <= heal.seconds < 60


def test_it_stops_without_gains_and_keeps_the_best_point(healed, tiny_llama, tmp_path, monkeypatch):
    rising = count(1.0)
    monkeypatch.setattr(Distillation, "divergence", lambda self, batch: next(rising))
    healed(*TOKENS)
    assert (recovery().heal.stopped, recovery().heal.kept_tokens) == ("patience", 0)
    before, after = weights_of(tiny_llama), weights_of(tmp_path / "out")
    assert torch.equal(
        before["model.layers.5.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize(("other", "kept"), [(0.9, 512), (1.1, 0)])
def test_no_text_becomes_worse(healed, monkeypatch, other, kept):
    """The mean is lower at the second check, and the second text is better or worse."""
    sums = chain([(2.0, 1), (1.0, 1), (0.1, 1), (other, 1)], repeat((9.0, 1)))
    monkeypatch.setattr(training.Training, "_sum", lambda self, batches: next(sums))
    Path("other.txt").write_text(prose(400))
    healed(*TOKENS, "--calibration text.txt:0.5,other.txt:0.5")
    assert recovery().heal.kept_tokens == kept


@pytest.mark.parametrize(
    ("options", "trained"),
    [("", 1024), ("--heal-tokens 512", 512), ("--no-heal", 0), ("--stream", 0)],
)
def test_recover_trains_briefly_where_that_is_possible(
    sleb, llama_plan, text_file, monkeypatch, options, trained
):
    monkeypatch.setattr(door, "RECOVERY_HEAL_TOKENS", 1024)
    text = calibration(text_file, samples=10)
    said = sleb("apply", llama_plan, "--recover -o out", *text, *options.split()).stderr
    heal = recovery().heal
    assert (heal.tokens if heal else 0) == trained
    assert ("Training is left out" in said) == (options == "--stream")


def test_recover_does_not_train_without_the_memory(sleb, llama_plan, text_file, monkeypatch):
    monkeypatch.setattr(door, "memory_shortage", shortage_at(700_000))
    text = calibration(text_file, samples=10)
    said = sleb("apply", llama_plan, "--recover -o out", *text).stderr
    assert "Training is left out" in said
    assert recovery().heal is None


def test_it_starts_from_the_closed_form(healed, monkeypatch):
    standing_in(monkeypatch, ["model.layers.5.mlp.down_proj.weight", "model.norm.weight"])
    monkeypatch.setattr(Heal, "rate", 0.0)
    healed("--recover --heal-tokens 512")
    assert recovery().heal.losses == recovery().closed_form_losses != recovery().pruned


def test_without_the_memory_it_is_refused(healed, monkeypatch):
    monkeypatch.setattr(door, "memory_shortage", shortage_at(700_000))
    needed = (
        r"Healing needs \S+ MB of memory on cpu \(.* trained weights, "
        r"\S+ kB for the state of training"
    )
    assert re.search(needed, healed(*TOKENS, code=7).stderr)


def test_blocks_far_below_the_gap_are_shared_and_stay(healed, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(9))
    healed("--heal-tokens 2048", of=[folder, "--blocks 6"])
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    old = [f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1, 2, 3, 4, 5, 7, 8)]
    new = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(8)]
    changed = [
        block for block in range(8) if not torch.equal(before[old[block]], after[new[block]])
    ]
    assert changed == [2, 3, 4, 5, 6, 7]

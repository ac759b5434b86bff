"""`sleb apply --heal`, through `main()`."""

import math
import os
import re
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_recover import failing, standing_in

from conftest import (
    calibration,
    interrupt_healing,
    llama_config,
    prose,
    random_model,
    save_model,
    shortage_at,
    weight_bytes_of,
    weights_of,
)
from sleb_cli.engine.door import recovery as door
from sleb_cli.engine.forward import forecast
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.output import checkpoint as writing
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.recovery import heal_budget, training
from sleb_cli.engine.recovery.distillation import Batch, Distillation
from sleb_cli.engine.recovery.loss_scale import starting_scale
from sleb_cli.engine.recovery.low_rank import LowRank
from sleb_cli.engine.recovery.variant import Variant
from sleb_cli.events import ignore
from sleb_cli.plan import read_plan
from sleb_plugins import ProofError

TOKENS = ["--heal-tokens", 4096]


@pytest.fixture
def healed(sleb, llama_plan, tmp_path, monkeypatch):
    """Heal a model, by default the tiny Llama without the two blocks of its plan."""
    (tmp_path / "text.txt").write_text(prose(400))
    monkeypatch.setattr(heal_budget, "PORTION_TOKENS", 1024)

    text = calibration("text.txt", samples=10)
    return lambda *options, of=(llama_plan,), **how: sleb(
        "apply", *of, "--heal", *text, "-o", "out", *options, **how
    )


def recovery():
    """Return what the plan in the checkpoint says of it."""
    return read_plan(Path("out/sleb_plan.json")).recovery


def test_healing_comes_nearer_to_the_dense_model(healed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "LONG", 0.0)
    result = healed("--recover", *TOKENS)
    assert re.search(
        r"dense .*\n.* pruned .*\n.* recovered .*\n.* healed .*\n(.*\n)?.*; \d+% of the divergence",
        result.stdout,
    )
    assert "matches the recovered model in memory" in result.stdout
    for long in (
        r"Recovery: up to \d blocks? fitted to \d+ tokens in float32: about",
        "Healing: .*: about \\d+ s",
    ):
        assert re.search(long, result.stderr)
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
    healed(*command, "-o", "whole")
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 6)
        stopped = healed(*command, code=130)
    kept = sum(file.stat().st_size for file in tmp_path.glob(".out.recovery/*/*"))
    checkpoint = sum(
        file.stat().st_size for file in tmp_path.glob("whole/*") if file.suffix != ".md"
    )
    assert kept / 2 < room[0] - checkpoint < 2 * kept
    assert re.search(
        r"What was found is saved in \S+: run the same command again to continue", stopped.stderr
    )
    assert sorted(name for name in os.listdir(tmp_path) if "out" in name) == [".out.recovery"]
    for change in (
        ["--heal-tokens", 2048],
        ["--seed", 1],
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
            "Continuing an interrupted healing, after 2,560 tokens"
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
    said = healed("--heal-tokens", 2048).stderr
    assert failed == [16, 8]
    assert "Out of memory on cpu; healing 4 sequences at a time." in said
    assert recovery().heal.losses.divergence < recovery().pruned.divergence


@pytest.mark.parametrize("overflows", [False, True])
def test_float16_gradients_are_scaled(overflows):
    headroom = 2**20 if overflows else training.SCALE_HEADROOM
    found, scales = first_gradient(torch.float16, headroom)
    assert (scales[1] < scales[0]) == overflows
    exact, _ = first_gradient(torch.float32, headroom)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.999
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


def first_gradient(dtype, headroom):
    """Return the gradient of a healing's first step, and the scale of the loss before and after it."""
    teacher, student = (
        random_model(llama_config(3)).half().to(dtype).requires_grad_(False) for _ in range(2)
    )
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight *= 0.5
    ids = torch.randint(2, 300, (32, 32), generator=torch.Generator().manual_seed(0))
    with (
        SkippableModel(teacher, teacher.model.layers) as dense,
        SkippableModel(student, student.model.layers) as pruned,
    ):
        weight = student.model.layers[2].mlp.down_proj.weight
        trained = LowRank([weight], [weight.detach().clone()], torch.float16)
        distillation, size = (
            Distillation(Variant(dense), Variant(pruned), 0),
            training.BATCH_TOKENS // ids.shape[1],
        )
        job = SimpleNamespace(group=ProcessGroup(), notify=ignore)
        trainer = training.Trainer(job, distillation, trained, size)
        with torch.no_grad():
            batch = Batch(ids, ids >= 0, *Variant(dense).entering_and_final_states(ids, 0))
        began = starting_scale(dtype, training.BATCH_TOKENS * headroom)
        _, gradient, scale = trainer.gradient(batch, began)
        return gradient, (began, scale)


def test_a_budget_of_minutes_ends(healed, monkeypatch):
    monkeypatch.setattr(training, "PATIENCE", training.CHECKS + 2)  # more checks than there are
    healed("--heal-minutes", 0.02)
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


def test_it_starts_from_the_closed_form(healed, monkeypatch):
    standing_in(monkeypatch, ["model.layers.5.mlp.down_proj.weight", "model.norm.weight"])
    monkeypatch.setattr(training, "LEARNING_RATE", 0.0)
    healed("--recover", "--heal-tokens", 512)
    assert recovery().heal.losses == recovery().closed_form_losses != recovery().pruned


def test_without_the_memory_it_is_refused(healed, monkeypatch):
    monkeypatch.setattr(door, "memory_shortage", shortage_at(500_000))
    needed = r"Healing needs \S+ MB of memory on cpu \(.* trained weights, \S+ kB for the state of training"
    assert re.search(needed, healed(*TOKENS, code=7).stderr)


def test_blocks_far_below_the_gap_are_shared_and_stay(healed, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(9))
    healed("--heal-tokens", 2048, of=[folder, "--blocks", "6"])
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    old = [f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1, 2, 3, 4, 5, 7, 8)]
    new = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(8)]
    changed = [
        block for block in range(8) if not torch.equal(before[old[block]], after[new[block]])
    ]
    assert changed == [2, 3, 4, 5, 6, 7]

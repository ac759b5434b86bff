"""Weights that stay on disk, by `--stream`, `--device-map` or for lack of memory: the same files
and numbers.
"""

import gc
import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from conftest import calibration, evaluation, save_model, shortage_at, slow, weight_bytes_of
from families import tiny_config
from sleb_cli.cache import cache_root
from sleb_cli.engine.door import recovery as door
from sleb_cli.engine.forward import placement
from sleb_cli.engine.output import proof_placement
from sleb_cli.engine.quality import texts
from sleb_cli.engine.recovery import ridge

COMPLETE = ["complete", "same bytes", "loads", "same logits", "generates"]
WAYS = {"in memory": ["--no-stream"], "streamed": ["--stream"], "large": []}


@pytest.fixture
def plan_of(found):
    """Search, and give the plan without the machine and its times."""

    def run(*options, **how):
        return found("--remove 2", *options, **how).model_copy(update={"environment": None})

    return run


def written(folder):
    """Return what must not depend on where the weights were: a checkpoint's weights and its plan;
    and its proof.
    """
    plan = json.loads((folder / "sleb_plan.json").read_text()) | {"environment": None}
    proof = plan.pop("proof", None)
    return (weight_bytes_of(folder), plan), proof


@pytest.mark.parametrize(
    "case",
    [
        ("streamed", "llama", "nll"),
        ("placed", "llama", "cosine"),
        ("large", "llama", "nll"),
        *(
            slow((way, family, "nll"))
            for family in ("gemma3_text", "mixtral")
            for way in ("streamed", "placed")
        ),
        slow(("placed", "llama", "magnitude")),
    ],
    ids=" ".join,
)
def test_plan_checkpoint_and_measurements_are_the_same(
    sleb, text_file, tmp_path, spread, monkeypatch, case
):
    other, family, metric = case
    model = save_model(tmp_path / "model", tiny_config(family, dtype=torch.bfloat16))
    too_large = (
        "of memory, but only 100 kB is free on cpu. Streaming its blocks from disk (--stream)"
    )
    found = []
    for way in ("in memory", other):
        where = [*(spread(model, 0) if way == "placed" else WAYS[way]), "--force"]
        if way == "large":
            for room in (placement, proof_placement):
                monkeypatch.setattr(room, "memory_shortage", shortage_at(100_000))
        searched = sleb(
            "search", model, "--remove 2 --metric", metric, *calibration(text_file), *where
        )
        applied = sleb(
            "apply --recover --no-heal", *calibration(text_file, samples=20), *where, "-o out"
        )
        measured = sleb("eval --every 1", *evaluation(text_file), *where, "--json")
        files, proven = written(tmp_path / "out")
        found.append((*files, measured.data | {"commands": None}))
        assert (proven["checks"], proven["partial"], proven["logits_difference"]) == (
            COMPLETE,
            None,
            0.0,
        )
        for command in (searched, applied, measured):
            assert ("without its blocks" in command.stderr) == (way in ("streamed", "large"))
            assert (too_large in command.stderr) == (way == "large")
    assert (proven["new_tokens"] == 2) == (other != "placed")
    assert other != "large" or "The proof leaves the blocks on disk" in applied.stderr
    # Not the bytes themselves, of which pytest would show the differences for minutes.
    assert [one == other for one, other in zip(*found, strict=True)] == [True] * 3
    fits = found[0][1]["recovery"]["closed_form"]["fits"]
    assert any(fit["error_left"] < 1 for fit in fits)
    gc.collect()
    assert not list(cache_root().glob(".offload.*"))


def test_more_batches_recover_with_no_more_reads(sleb, llama_plan, text_file, visits, monkeypatch):
    command = [
        "apply",
        llama_plan,
        "--recover",
        *calibration(text_file, samples=40),
        "--stream --no-verify",
    ]
    sleb(*command, "-o few")
    few = len(visits)
    visits.clear()
    monkeypatch.setattr(ridge, "BATCH_TOKENS", 64)
    sleb(*command, "-o many")
    assert few == len(visits) <= 40


def test_all_parts_and_sizes_of_texts_are_measured_in_one_read(
    sleb, tiny_llama, text_file, visits, monkeypatch
):
    monkeypatch.setattr(texts, "TOKENS_PER_PART", 64)
    reads = []
    for blocks, windows in (("1,3", 12), ("1,3,2", 24)):
        visits.clear()
        text = ["--perplexity", text_file, "--sequence-length 32 --max-windows", windows]
        sleb("eval", tiny_llama, "--blocks", blocks, "--every 1", *text, "--stream")
        assert visits[-1] == list(range(6))
        reads.append(len(visits))
    assert reads[0] == reads[1]


@pytest.mark.slow
def test_hidden_states_wait_in_host_memory(
    sleb, llama_plan, text_file, tmp_path, monkeypatch, simulate
):
    simulate()
    command = [
        "apply",
        llama_plan,
        "--recover",
        *calibration(text_file, samples=20),
        "--device sim --stream",
    ]
    sleb(*command, "--no-verify -o device")
    of_device = iter((0, 2**31))  # for all, and without hidden states

    def shortage(needed, device, *of):
        return shortage_at(next(of_device) if device.type == "sim" else 2**31)(needed, device, *of)

    monkeypatch.setattr(door, "memory_shortage", shortage)
    held = []
    monkeypatch.setattr(
        ridge, "to_cpu", lambda tensor: held.append(tensor.device.type) or tensor.cpu()
    )
    sleb(*command, "--no-verify -o host")
    assert "sim" in held
    assert written(tmp_path / "host") == written(tmp_path / "device")


def test_a_streamed_model_writes_no_text(sleb, llama_plan, text_file, tmp_path):
    command = ["apply", llama_plan, "--stream --no-verify -o out --sequence-length 32 --samples 10"]
    own_text = sleb(*command, "--recover --calibration self", code=2).stderr
    assert "A streamed model cannot write its own text" in own_text
    sleb(*command, "--recover")  # by default, on the text of its plan
    (_, plan), _ = written(tmp_path / "out")
    assert plan["recovery"]["train_text"]["source"] == text_file.name


def test_a_model_that_is_partly_on_disk_writes_its_own_text(plan_of, tiny_llama, text_file, spread):
    text = f"self:0.5,{text_file}:0.5"
    assert plan_of(text=text) == plan_of(*spread(tiny_llama, 0), text=text)


@pytest.mark.parametrize("how", ["auto", slow("balanced"), slow("sequential")])
def test_accelerate_chooses_the_places_and_may_split_no_block(
    plan_of, search, tiny_llama, spread, monkeypatch, how
):
    expected = plan_of()
    spread(tiny_llama, 0)
    assert plan_of("--device-map", how) == expected
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", None)
    said = search("--remove 2 --device-map", how, "--force", code=4).stderr
    assert "accelerate would split a block across devices: it puts model.layers." in said

"""Weights that stay on disk, by `--stream`, `--device-map` or for lack of memory: the same files and numbers."""

import gc
import json
from pathlib import Path

import pytest
import torch
from transformers.integrations import accelerate as placing
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from conftest import calibration, evaluation, save_model, slow, weight_bytes_of
from families import tiny_config
from sleb_cli.engine.files.cache import cache_root
from sleb_cli.engine.forward import placement
from sleb_cli.engine.output import proof
from sleb_cli.engine.quality import texts
from sleb_cli.engine.recovery import closed_form, settings

COMPLETE = ["complete", "same bytes", "loads", "same logits", "generates", "saves again"]
ON_DISK = {"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.5": "disk"}
WAYS = {"in memory": ["--no-stream"], "streamed": ["--stream"], "placed": ["--device-map", "places.json"], "large": []}


def write(places):
    Path("places.json").write_text(json.dumps(places))
    return "places.json"


@pytest.fixture
def plan_of(found):
    """Search, and give the plan without the machine and its times."""

    def run(*options, **how):
        return found("--remove", 2, *options, **how).model_copy(update={"environment": None})

    return run


def written(folder):
    """Return what must not depend on where the weights were: a checkpoint's weights and its plan; and its proof."""
    plan = json.loads((folder / "sleb_plan.json").read_text()) | {"environment": None}
    proof = plan.pop("proof", None)
    return (weight_bytes_of(folder), plan), proof


@pytest.mark.parametrize(
    "case",
    [
        ("streamed", "llama", "nll"),
        ("placed", "llama", "taylor"),
        ("large", "llama", "nll"),
        *(slow((way, family, "nll")) for family in ("gemma3_text", "mixtral") for way in ("streamed", "placed")),
        *(slow(("placed", "llama", metric)) for metric in ("nll", "cosine", "magnitude")),
    ],
    ids=" ".join,
)
def test_plan_checkpoint_and_measurements_are_the_same(sleb, text_file, tmp_path, monkeypatch, case):
    other, family, metric = case
    model = save_model(tmp_path / "model", tiny_config(family, dtype=torch.bfloat16))
    write(ON_DISK)
    too_large = "of memory in bfloat16, but only 100 kB is free on cpu. Streaming its blocks from disk (--stream)"
    found = []
    for way in ("in memory", other):
        where = [*WAYS[way], "--force"]
        if way == "large":
            monkeypatch.setattr(placement, "own_free_bytes", lambda device: 100_000)
            monkeypatch.setattr(proof, "free_bytes", lambda device: 100_000)
        searched = sleb("search", model, "--remove", 2, "--metric", metric, *calibration(text_file), *where)
        applied = sleb("apply", "--recover", *calibration(text_file, samples=20), *where, "-o", "out")
        measured = sleb("eval", "--every", 1, *evaluation(text_file), *where, "--json")
        files, proven = written(tmp_path / "out")
        found.append((*files, json.loads(measured.stdout)))
        assert (proven["checks"], proven["partial"], proven["logits_difference"]) == (COMPLETE, None, 0.0)
        for command in (searched, applied, measured):
            assert ("without its blocks" in command.stderr) == (way in ("streamed", "large"))
            assert (too_large in command.stderr) == (way == "large")
    assert (proven["new_tokens"] == 2) == (other != "placed")
    assert other != "large" or "The proof leaves the blocks on disk" in applied.stderr
    # Not the bytes themselves, of which pytest would show the differences for minutes.
    assert [one == other for one, other in zip(*found, strict=True)] == [True] * 3
    assert any(fit["kept"] for fit in found[0][1]["recovery"]["closed_form"]["fits"])
    gc.collect()
    assert not list(cache_root().glob(".offload.*"))


def test_more_batches_recover_with_no_more_reads(sleb, llama_plan, text_file, visits, monkeypatch):
    command = ["apply", llama_plan, "--recover", *calibration(text_file, samples=40), "--stream", "--no-verify"]
    sleb(*command, "-o", "few")
    few = len(visits)
    visits.clear()
    monkeypatch.setattr(closed_form, "BATCH_TOKENS", 64)
    sleb(*command, "-o", "many")
    # Which fits are kept may differ with the last bits of their sums, and so where fitting stops.
    assert abs(len(visits) - few) <= 4
    assert few <= 40


def test_all_parts_and_sizes_of_texts_are_measured_in_one_read(sleb, tiny_llama, text_file, visits, monkeypatch):
    monkeypatch.setattr(texts, "TOKENS_OF_A_PART", 64)
    reads = []
    for blocks, windows in (("1,3", 12), ("1,3,2", 24)):
        visits.clear()
        text = ["--perplexity", text_file, "--sequence-length", 32, "--max-windows", windows, "--fresh"]
        sleb("eval", tiny_llama, "--blocks", blocks, "--every", 1, *text, "--stream")
        assert visits[-1] == list(range(6))
        reads.append(len(visits))
    assert reads[0] == reads[1]


def test_hidden_states_wait_in_host_memory(sleb, llama_plan, text_file, tmp_path, monkeypatch, simulate):
    simulate()
    command = ["apply", llama_plan, "--recover", *calibration(text_file, samples=20), "--device", "sim", "--stream"]
    sleb(*command, "--no-verify", "-o", "device")
    of_device = iter((0, 2**31))  # for all, and without hidden states
    monkeypatch.setattr(settings, "own_free_bytes", lambda device: next(of_device) if device.type == "sim" else 2**31)
    held = []
    monkeypatch.setattr(closed_form._States, "held", lambda self, tensor: held.append(self.on_host) or tensor.cpu())
    sleb(*command, "--no-verify", "-o", "host")
    assert set(held) == {True}
    assert written(tmp_path / "host") == written(tmp_path / "device")


def test_a_streamed_model_neither_trains_nor_writes_its_own_text(sleb, llama_plan, text_file, tmp_path):
    command = ["apply", llama_plan, "--stream", "--no-verify", "-o", "out", "--sequence-length", 32, "--samples", 10]
    assert "--heal trains the model, so all of it must be in memory" in sleb(*command, "--heal", code=2).stderr
    own_text = sleb(*command, "--recover", "--calibration", "self", code=2).stderr
    assert "A streamed model cannot write its own text" in own_text
    sleb(*command, "--recover")  # by default, on the text of its plan
    (_, plan), _ = written(tmp_path / "out")
    assert plan["recovery"]["text"]["source"] == text_file.name


def test_a_model_that_is_all_on_disk_writes_its_own_text(plan_of, text_file):
    text = f"self:0.5,{text_file}:0.5"
    assert plan_of("--device-map", write({"": "disk"}), text=text) == plan_of(text=text)


@pytest.mark.parametrize("how", ["auto", slow("balanced"), slow("sequential")])
def test_accelerate_chooses_the_places_and_may_split_no_block(plan_of, search, monkeypatch, how):
    expected = plan_of()
    room = {"cpu": 200_000}  # of 310 kB
    monkeypatch.setattr(placing, "accelerate_max_memory", lambda asked=None: dict(room))
    assert plan_of("--device-map", how) == expected
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", None)
    said = search("--remove", 2, "--device-map", how, "--force", code=4).stderr
    assert "accelerate would split a block across devices: it puts model.layers." in said


@pytest.mark.parametrize(
    ("places", "code", "sentence"),
    [
        ({"": 0}, 7, "puts '' on accelerator 0, but this machine has none"),
        ({"": "gpu"}, 2, "puts '' on 'gpu', which is not a device"),
        ({"": "cpu", "model.layer.1": "disk"}, 2, "Did you mean 'model.layers.1'?"),
        ({"": "cpu", "model.layers.1.mlp": "disk"}, 2, "a block cannot be split"),
        ({"model": "cpu"}, 2, "names no device for lm_head"),
        ({}, 2, "must be an object that maps modules to devices"),
        ({"": "cpu", "lm_head": "disk"}, 2, "share a weight"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(search, tiny_llama, tmp_path, places, code, sentence):
    model = save_model(tmp_path / "tied", tiny_config("gemma3_text")) if "lm_head" in places else tiny_llama
    assert sentence in search("--remove", 2, "--device-map", write(places), model=model, code=code).stderr

"""`--device-map` on the CPU: blocks on disk give the same plan, checkpoint and measurements; and what is refused."""

import gc
import json
from pathlib import Path

import pytest
from transformers.integrations import accelerate as placing
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from conftest import calibration, evaluation, save_model, slow, weight_bytes_of
from families import tiny_config
from sleb_cli.engine.files.cache import cache_root

ON_DISK = {"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.5": "disk"}


def write(places):
    Path("places.json").write_text(json.dumps(places))
    return "places.json"


def search(run_sleb, model, text, *options, code=0):
    given = ["--remove", 2, *calibration(text, length=16), "-o", "plan.json", "--force", "-q"]
    result = run_sleb("search", model, *given, *options)
    assert result.exit_code == code, result.stderr
    if code:
        return result.stderr
    assert result.stderr == ""
    plan = json.loads(Path("plan.json").read_text())
    del plan["environment"]
    return plan


def left_in_cache():
    gc.collect()
    return list(cache_root().glob(".offload.*"))


@pytest.mark.parametrize("metric", ["taylor", slow("nll"), slow("cosine"), slow("magnitude")])
def test_plan_checkpoint_and_measurements_are_the_same(run_sleb, tiny_llama, text_file, tmp_path, metric):
    found = []
    for where in ([], ["--device-map", write(ON_DISK)]):
        plan = search(run_sleb, tiny_llama, text_file, "--metric", metric, *where)
        options = ["plan.json", "--recover", "--dtype", "bfloat16", *calibration(text_file, samples=8)]
        result = run_sleb("apply", *options, *where, "-o", "out", "--force")
        assert result.exit_code == 0, result.stderr
        proof = json.loads((tmp_path / "out" / "sleb_plan.json").read_text())["proof"]
        assert len(proof["checks"]) == 6
        result = run_sleb("eval", "plan.json", *evaluation(text_file), "-o", "e.json", "--force", *where)
        assert result.exit_code == 0, result.stderr
        texts = json.loads(Path("e.json").read_text())["texts"]
        found.append((plan, proof, texts, weight_bytes_of(tmp_path / "out")))
    # Not the bytes themselves, of which pytest would show the differences for minutes.
    assert [one == other for one, other in zip(*found, strict=True)] == [True] * 4
    assert not left_in_cache()


def test_a_model_that_is_all_on_disk_writes_its_own_text(run_sleb, tiny_llama, text_file):
    options = ("--calibration", f"self:0.5,{text_file}:0.5")
    expected = search(run_sleb, tiny_llama, text_file, *options)
    assert search(run_sleb, tiny_llama, text_file, *options, "--device-map", write({"": "disk"})) == expected


@pytest.mark.slow
def test_weights_that_transformers_converts_do_not_stay_on_disk(run_sleb, text_file, tmp_path):
    model = save_model(tmp_path / "mixtral", tiny_config("mixtral"))
    remove = ("--remove", 1)
    expected = search(run_sleb, model, text_file, *remove)
    assert search(run_sleb, model, text_file, *remove, "--device-map", write({"": "disk"})) == expected
    options = ["apply", "plan.json", "--recover", *calibration(text_file, samples=5, length=16)]
    for folder, where in (("expected", []), ("found", ["--device-map", "places.json"])):
        result = run_sleb(*options, *where, "-o", folder)
        assert result.exit_code == 0, result.stderr
    expected, found = (weight_bytes_of(tmp_path / folder) for folder in ("expected", "found"))
    assert bool(expected == found)
    assert not left_in_cache()


@pytest.mark.parametrize("how", ["auto", slow("balanced"), slow("sequential")])
def test_accelerate_chooses_the_places(run_sleb, tiny_llama, text_file, monkeypatch, how):
    expected = search(run_sleb, tiny_llama, text_file)
    room = {"cpu": 200_000}  # of 310 kB
    monkeypatch.setattr(placing, "accelerate_max_memory", lambda asked=None: dict(room))
    assert search(run_sleb, tiny_llama, text_file, "--device-map", how) == expected


def test_a_block_that_accelerate_would_split_is_refused(run_sleb, tiny_llama, text_file, monkeypatch):
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", None)
    monkeypatch.setattr(placing, "accelerate_max_memory", lambda asked=None: {"cpu": 200_000})
    said = search(run_sleb, tiny_llama, text_file, "--device-map", "auto", code=4)
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
def test_a_map_that_does_not_fit_is_refused(run_sleb, tiny_llama, text_file, tmp_path, places, code, sentence):
    model = save_model(tmp_path / "tied", tiny_config("gemma3_text")) if "lm_head" in places else tiny_llama
    assert sentence in search(run_sleb, model, text_file, "--device-map", write(places), code=code)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--stream",), "--device-map and --stream"),
        (("--device", "cpu"), "--device does not apply"),
        (("--device-map", "missing.json"), "Cannot read the device map missing.json"),
    ],
)
def test_what_does_not_go_with_a_map_is_refused(run_sleb, tiny_llama, text_file, options, sentence):
    assert sentence in search(run_sleb, tiny_llama, text_file, "--device-map", write(ON_DISK), *options, code=2)

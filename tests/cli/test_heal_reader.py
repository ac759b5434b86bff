"""`sleb apply --heal` of models that only read, through `main()`."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from conftest import calibration, prose, weight_bytes_of, weights_of
from encoders import add_modules, save_reader, word_pieces
from recovering import interrupt_healing
from sleb_cli.engine.recovery.outputs import OutputDistillation
from sleb_cli.plan import read_plan

TOKENS = 8000


@pytest.fixture
def healed(sleb, tmp_path):
    """Heal a model that only reads without two of its blocks."""
    (tmp_path / "text.txt").write_text(prose(700))
    return partial(heal, sleb)


def heal(sleb, model, *more, blocks="2,3", tokens=TOKENS, **how):
    options = [*calibration("text.txt", samples=100), "--heal -o out", "--heal-tokens", tokens]
    return sleb("apply", model, "--blocks", blocks, *options, *more, **how)


@pytest.mark.parametrize("model", ["tiny_encoder", "tiny_classifier", "tiny_reranker"])
def test_healing_brings_the_outputs_back(model, healed, request, tmp_path):
    folder = request.getfixturevalue(model)
    result = healed(folder)
    told = re.findall(r"distance from the dense model (\S+), on validation text", result.stderr)
    assert len(told) >= 8
    (before,) = re.findall(r"pruned[ │]+(\S+)", result.stdout)
    (after,) = re.findall(r"healed on [\d,]+ tokens[ │]+(\S+)", result.stdout)
    assert float(after) < 0.8 * float(before)
    (left,) = re.findall(r"(\d+)% of the distance from the dense model is left", result.stdout)
    half = 0.5 * 10 ** -len(after.partition(".")[2])  # how far the shown figures may be rounded
    lowest = (float(after) - half) / (float(before) + half)
    highest = (float(after) + half) / (float(before) - half)
    assert round(100 * lowest) <= int(left) <= round(100 * highest)
    assert f"| {after} |" in (tmp_path / "out" / "README.md").read_text()
    old, new = weights_of(folder), weights_of(tmp_path / "out")
    for name, value in new.items():
        source = re.sub(r"layer\.([23])\.", lambda match: f"layer.{int(match[1]) + 2}.", name)
        assert value.dtype == old[source].dtype
        assert torch.equal(value, old[source]) == ("layer." not in name)


def test_the_plan_records_it(healed, sleb, tiny_encoder, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "a cat on a mat"}\n' * 40)
    sleb(
        "search",
        tiny_encoder,
        "--remove 1 --prompt query --sample-tokens 0",
        *calibration("lines.jsonl", 6, 16),
    )
    sleb("apply --heal --heal-tokens 64 --samples 40 --no-verify -o out")
    found = read_plan(Path("out/sleb_plan.json")).recovery
    assert (found.train_text.source, found.train_text.sequence_length) == ("lines.jsonl", 16)
    assert (found.train_text.sequences, found.test_text.sequences) == (36, 2)
    assert found.heal.rank is None
    assert found.heal.losses.divergence <= found.pruned.divergence
    assert 0 <= found.dense.divergence < 1e-6


def test_an_interrupted_healing_resumes_to_the_same_bytes(
    healed, tiny_encoder, tmp_path, monkeypatch
):
    healed(tiny_encoder, "-o whole")
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 7, OutputDistillation)
        healed(tiny_encoder, code=130)
    resumed = healed(tiny_encoder)
    assert "Continuing an interrupted healing, after" in resumed.stderr
    assert "Reading 90 texts with the dense model" in resumed.stderr
    assert weight_bytes_of(tmp_path / "whole") == weight_bytes_of(tmp_path / "out")


add_gradient = OutputDistillation.add_gradient


def short_of_memory(distillation, batch, scale):
    if batch.targets > 8:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return add_gradient(distillation, batch, scale)


def test_out_of_memory_heals_fewer_texts_at_once(healed, tiny_encoder, monkeypatch):
    whole = healed(tiny_encoder, tokens=2000).stdout
    monkeypatch.setattr(OutputDistillation, "add_gradient", short_of_memory)
    pieces = healed(tiny_encoder, "--force", tokens=2000)
    assert "Out of memory on cpu; healing 8 sequences at a time." in pieces.stderr
    distances = [re.findall(r"healed on .* (0\.\d+)", shown) for shown in (whole, pieces.stdout)]
    assert float(distances[0][0]) == pytest.approx(float(distances[1][0]), rel=0.05)


def test_the_closed_form_is_refused(healed, tiny_encoder):
    stderr = healed(tiny_encoder, "--recover", code=2).stderr
    assert "only reads" in stderr
    assert "Use --heal" in stderr


def test_weights_whose_names_have_a_prefix_are_healed(healed, tmp_path):
    folder = add_modules(
        save_reader(tmp_path / "masked", word_pieces(prose(200)), auto_class=AutoModelForMaskedLM)
    )
    healed(folder)
    assert "bert.encoder.layer.3.output.dense.weight" in weights_of(tmp_path / "out")

"""`sleb eval --stream` says what it says in memory, digit for digit."""

import json

import pytest
import torch

from conftest import save_model
from families import tiny_config
from sleb_cli.engine.forward import streaming
from sleb_cli.engine.quality import texts


def measured(run_sleb, model, text_file, *options):
    sizes = [] if "--blocks" in options else ["--blocks", "1,3", "--remove", "1,2", "--max-windows", 12]
    text = ["--perplexity", text_file, "--sequence-length", 32]
    result = run_sleb("eval", model, *sizes, *text, "--json", "--fresh", *options)
    assert result.exit_code == 0, result.stderr
    return result, json.loads(result.stdout)


@pytest.mark.parametrize(
    "model_type",
    ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)],
)
def test_texts_are_measured_the_same(run_sleb, text_file, tmp_path, model_type):
    model = save_model(tmp_path / "model", tiny_config(model_type, dtype=torch.bfloat16))
    _, expected = measured(run_sleb, model, text_file, "--no-stream")
    result, found = measured(run_sleb, model, text_file, "--stream")
    assert found == expected
    assert "without its blocks" in result.stderr


def test_all_parts_and_sizes_read_the_weights_once(run_sleb, tiny_llama, text_file, visits, monkeypatch):
    monkeypatch.setattr(texts, "TOKENS_OF_A_PART", 64)
    measured(run_sleb, tiny_llama, text_file, "--stream")
    before = len(visits)
    assert visits[-1] == list(range(6))
    # Parts of twice as many windows, and their sizes, take no other read.
    visits.clear()
    measured(run_sleb, tiny_llama, text_file, "--blocks", "1,3,2", "--every", 1, "--max-windows", 24, "--stream")
    assert len(visits) == before


def test_a_model_that_does_not_fit_is_streamed_with_a_notice(run_sleb, tiny_llama, text_file, monkeypatch):
    _, expected = measured(run_sleb, tiny_llama, text_file)
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 150_000)
    result, found = measured(run_sleb, tiny_llama, text_file)
    assert found == expected
    assert "are free on cpu. Streaming its blocks from disk (--stream)" in result.stderr

"""`sleb bench` and `sleb export` on models that only read, through `main()`."""

import json
import re
from unittest.mock import patch
from urllib.parse import unquote

import pytest
import torch
from transformers import AutoModel

from conftest import calibration
from sleb_cli.engine.forward.ending import Vectors

QUICK = "--iterations 5 --warmup 1"


@pytest.fixture
def plan(sleb, tiny_encoder, text_file, tmp_path):
    """A plan of two blocks of the tiny encoder, with held-out texts."""
    words = ["--remove 2", "--holdout", 0.5, "--sample-tokens", 0]
    sleb("search", tiny_encoder, *calibration(text_file, 8), *words)
    return tmp_path / "plan.json"


def export_page(sleb, plan):
    """Export a report, and return it as it is shown, pictures and all."""
    sleb("export --to report", plan)
    return unquote(plan.with_suffix(".report.html").read_text())


def labels(data):
    shapes = []
    for result in data["workloads"]:
        workload = result["workload"]
        shape = f"{workload['batch_size']}x{workload['prompt_length']}"
        shapes.append(f"{workload['name']} {shape}")
    return shapes


def test_texts_and_a_query_are_timed_and_exported(plan, sleb, without_memory):
    shown = sleb("bench --every 1", QUICK, "-o b.json").stdout
    data = json.loads((plan.parent / "b.json").read_text())
    # The model reads up to 48 tokens.
    assert labels(data) == ["texts 1x48", "texts 8x48", "texts 32x48", "query 1x16"]
    texts = data["workloads"][2]
    assert len(texts["pruned"]) == 2
    for timing in (texts["dense"], *texts["pruned"]):
        assert f"{32_000 / timing['e2el_ms']['median']:,.1f}" in shown
    assert "texts/s" in shown
    assert "tokens/s" not in shown
    assert "batch x tokens of a text" in shown
    html = export_page(sleb, plan)
    assert "texts 32x48, times as fast" in html
    assert "query 1x16, times as fast" in html
    assert "sleb eval plan.json --every 2 --corpus …" in re.sub("</?span>", "", html)
    assert "Distance from the dense model by blocks removed" in html
    assert "1 - cosine of the vectors" in html
    assert "held out of the search" in html
    table = sleb("export --to table").stdout
    assert "texts 8x48, times as fast" in table
    removals = json.loads(plan.read_text())["removals"]
    assert sleb("export --to indices").stdout == ",".join(map(str, removals)) + "\n"
    for text in (html, table):
        assert not re.search(r"[Pp]erplexity|\b(nan|NaN|None)\b|nats per token", text)


def test_the_vectors_are_computed_with_the_model(sleb, tiny_encoder):
    words = [QUICK, "--batch-size 2 --prompt-length 7 --json"]
    with patch.object(Vectors, "outputs", autospec=True, side_effect=Vectors.outputs) as outputs:
        data = sleb("bench", tiny_encoder, *words).data
    assert labels(data) == ["texts 2x7", "query 1x16"]
    memory = data["workloads"][0]["dense"]["memory"]
    assert (memory["kv_cache_bytes"], memory["peak_bytes"] > 10**6) == (0, True)
    _, output, texts = outputs.call_args_list[0].args
    assert texts.mask.tolist() == [[1] * 7] * 2
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(tiny_encoder).eval()(texts.ids)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("kind", ["tiny_reranker", "tiny_classifier"])
def test_each_point_of_a_sweep_is_timed_once(request, sleb, without_memory, kind):
    words = [QUICK, "--sweep", "batch=1,3 prompt=5,64", "--json"]
    data = sleb("bench", request.getfixturevalue(kind), *words).data
    texts = ["texts 1x5", "texts 1x64", "texts 3x5", "texts 3x64"]
    assert labels(data) == [*texts, "query 1x16"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt"], "--prompt needs a language head"),
        (["--generation"], "--generation needs a language head"),
        (["--new-tokens", 4], "--new-tokens needs a language head"),
        (["--sweep", "new=4"], "--new-tokens needs a language head"),
        (["--prompt-length", 49], "A prompt of 49 tokens exceeds the model's 48 positions"),
    ],
)
def test_what_needs_a_language_head_is_refused(sleb, tiny_encoder, options, said):
    assert said in sleb("bench", tiny_encoder, *options, code=2).said


@pytest.mark.parametrize("name", ["mergekit", "llama-quantize"])
def test_other_tools_take_language_models(sleb, plan, name):
    said = sleb("export --to", name, code=4).said
    assert f"{name} needs a language head, and" in said
    assert "sleb apply" in said


def test_a_report_of_a_search_says_what_is_not_measured(plan, sleb):
    data = json.loads(plan.read_text())
    data["steps"][-1]["held_out"] |= {"overfits": True, "generalization_gap": 0.25}
    plan.write_text(json.dumps(data))
    html = export_page(sleb, plan)
    assert "on held-out text, the distance is 0.250 larger" in html
    assert "quality on a corpus" in html
    assert "What both models say" not in html
    assert not re.search(r"perplexity|what both models", html)

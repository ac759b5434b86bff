"""One line before long work: what, how much, in which data type, and about how long."""

import json
import re

import pytest

import sleb_cli as sleb
from sleb_cli.engine import forecast
from sleb_cli.events import BlockRemoved

TASK = """
task: own_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes it is", "no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def everything_is_long(monkeypatch):
    monkeypatch.setattr(forecast, "LONG", 0.0)


def lines(result):
    assert result.exit_code == 0, result.stderr
    return [line for line in result.stderr.splitlines() if re.search(": (about|at most) ", line)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "Search: 2 of 6 blocks, 28 evaluations of 32 tokens in float32"),
        (("--fast",), "Search: 2 of 6 blocks, at most 28 evaluations"),
        (("--strategy", "refine"), "Search: 2 of 6 blocks, at most"),
        (("--strategy", "oneshot"), "Search: 2 of 6 blocks, 16 evaluations"),
        (("--metric", "cosine"), "Search: 2 of 6 blocks, 28 evaluations"),
        (("--metric", "kl", "--holdout", "0.25"), "Search: 2 of 6 blocks, 21 evaluations"),
        (("--stream",), "Search: 2 of 6 blocks, 28 evaluations"),
    ],
    ids=str,
)
def test_a_search_says_what_it_will_do(search, everything_is_long, options, words):
    (line,) = lines(search("--remove", "2", *options))
    assert line.startswith(words)
    assert re.search(r": about \d+ s on this CPU\.$", line)


def test_it_names_another_device(search, everything_is_long, simulate):
    simulate()
    (line,) = lines(search("--remove", "1", "--device", "sim"))
    assert re.search(r"16 evaluations of 32 tokens in float32: about \d+ s on sim(:0)?\.$", line)


def test_a_resumed_search_counts_what_is_left(search, everything_is_long, tiny_llama, text_file):
    def stop(event):
        if isinstance(event, BlockRemoved):
            raise KeyboardInterrupt

    text = {"calibration": str(text_file), "samples": 4, "sequence_length": 32}
    with pytest.raises(KeyboardInterrupt):
        sleb.search(sleb.SearchRequest(str(tiny_llama), remove=2, **text), stop)
    (line,) = lines(search("--remove", "2", "--resume"))
    assert line.startswith("Search: 2 of 6 blocks, 12 evaluations")


def test_nothing_is_said_of_short_work_nor_with_quiet(search, monkeypatch):
    assert lines(search("--remove", "2")) == []
    monkeypatch.setattr(forecast, "LONG", 0.0)
    assert search("--remove", "2", "-q", "--force").stderr == ""


def test_an_evaluation_says_it_for_each_text_and_task(run_sleb, everything_is_long, llama_plan, text_file):
    options = ("--perplexity", text_file, "--sequence-length", "32", "--max-windows", "5", "--every", "1")
    assert [line.partition(": about")[0] for line in lines(run_sleb("eval", llama_plan, *options))] == [
        f"Perplexity on {text_file}: 5 windows of 32 tokens, 3 models in float32"
    ]
    assert lines(run_sleb("eval", llama_plan, *options)) == []  # from the cache


def test_recovery_says_it(run_sleb, everything_is_long, llama_plan, text_file):
    found = lines(run_sleb("apply", llama_plan, "--recover", "--calibration", text_file, "--samples", "8",
                           "--sequence-length", "32"))  # fmt: skip
    assert any(re.match(r"Recovery: up to \d blocks? fitted to \d+ tokens in float32: at most", line) for line in found)


def test_a_task_says_it_once_for_all_models(run_sleb, everything_is_long, llama_plan, tmp_path):
    items = [{"question": f"{n} plus {n}?", "answer": str(2 * n)} for n in range(6)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    (tmp_path / "own.yaml").write_text(TASK.format(data=tmp_path / "items.json"))
    (line,) = lines(run_sleb("eval", llama_plan, "--tasks", "own_sums", "--include-path", tmp_path))
    assert re.match(r"own_sums: 12 requests of about \d+ tokens, 2 models in float32: about", line)


def test_a_task_that_writes_says_how_much_at_most(run_sleb, everything_is_long, llama_plan, tmp_path):
    (tmp_path / "items.json").write_text(json.dumps([{"question": "snow", "answer": "rain"}] * 3))
    task = re.sub("output_type.*", "output_type: generate_until", TASK.format(data=tmp_path / "items.json"))
    task = re.sub("doc_to_choice.*", "generation_kwargs: {max_gen_toks: 5, until: ['.']}", task)
    task = task.replace("doc_to_target: 0", "doc_to_target: answer").replace("metric: acc", "metric: exact_match")
    (tmp_path / "own.yaml").write_text(task)
    (line,) = lines(run_sleb("eval", llama_plan, "--tasks", "own_sums", "--include-path", tmp_path))
    assert line.startswith("own_sums: 3 requests of about")
    assert "tokens and up to 5 new ones each, 2 models in float32: at most" in line


def test_generated_text_says_it(run_sleb, everything_is_long, tiny_llama):
    text = ("--calibration", "self", "--samples", "3", "--sequence-length", "32")
    first, _ = lines(run_sleb("search", tiny_llama, *text, "--remove", "1"))
    assert first.startswith("Generating calibration text: 3 sequences of 32 tokens in float32: about")

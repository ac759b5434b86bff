"""Requests to measure quality that cannot be met are refused before a model is loaded."""

from pathlib import Path

import lm_eval
import pytest

from conftest import prose
from sleb_cli.engine.door.evaluate import resolve_evaluation
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.events import TaskStarted
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import EvalRequest
from sleb_plugins import DataError, SlebError, UsageError

THREE = {"perplexity": ("t.txt",), "blocks": (1, 2, 3)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ("canarys",)}, DataError, "Did you mean 'canaries'?"),
        ({"tasks": ("piqa",), "include_path": Path("nowhere")}, DataError, "no folder nowhere"),
        ({"tasks": ("bad",), "include_path": Path()}, DataError, "lm-eval cannot load bad"),
        ({"tasks": ("sleb_sums",), "num_fewshot": 9}, UsageError, "sleb_sums has 8 examples, not 9"),
        ({"tasks": ("canaries",), "stream": True}, UsageError, "--tasks needs the whole model in memory"),
        ({"perplexity": ("nowhere.txt",)}, DataError, "no file nowhere.txt"),
        ({"perplexity": ("short.txt",)}, DataError, "less than one sequence of 128"),
        ({"perplexity": ("wikitext2",)}, DataError, "Salesforce/wikitext"),
        ({"perplexity": ("org/none",)}, DataError, "The data set org/none:train:text cannot be loaded"),
        ({"perplexity": ("self",)}, DataError, "self is text to calibrate on"),
        ({"perplexity": ("t.txt",), "sequence_length": 999}, UsageError, "128 positions"),
        ({"batch_size": "many"}, UsageError, "--batch-size many"),
        ({"perplexity": ("t.txt",), "every": 2}, UsageError, "--every 2 needs a plan or --blocks"),
        ({**THREE, "every": 2, "remove": (1,)}, UsageError, "cannot be combined"),
        ({**THREE, "remove": (2, 4)}, UsageError, "--remove 1 to 3"),
        ({"remove": (1,)}, UsageError, "No blocks given"),
        ({"limit": 5}, UsageError, "--limit requires --tasks"),
        ({"perplexity": ("t.txt",), "num_fewshot": 0}, UsageError, "--num-fewshot requires --tasks"),
        ({"run_code": True}, UsageError, "--run-code requires --tasks"),
        ({"tasks": ("piqa",), "sequence_length": 64}, UsageError, "--sequence-length requires --perplexity"),
    ],
)
def test_what_cannot_be_is_refused(tiny_llama, tmp_path, monkeypatch, options, error, message):
    # To say that it has no such task, lm-eval reads all of them, which takes ten seconds.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(Path(lm_eval.__file__).parent / "tasks/piqa/none"))
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(prose(60))
    Path("short.txt").write_text("short")
    Path("bad.yaml").write_text("task: bad\n")
    events, request = [], EvalRequest(str(tiny_llama), **options)
    with pytest.raises(SlebError) as raised:
        resolve_evaluation(request, load_plugins(), events.append, ProcessGroup())
    assert type(raised.value) is error
    assert message in f"{raised.value.message} {raised.value.hint}"
    assert not any(isinstance(event, TaskStarted) for event in events)

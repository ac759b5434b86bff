"""The verbs from Python: the same requests, the same files and the same results as the commands."""

import json
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import mypy.api
import pytest
from safetensors.torch import save_file

import sleb_cli as sleb
from conftest import prose, weights_of
from sleb_cli.events import TaskFinished, TaskStarted
from sleb_cli.plan import Plan, read_plan
from sleb_plugins import PlanError, UsageError

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def request_for(tiny_llama, text_file):
    """A request that is the same as the command line that found `llama_plan`."""

    def make(**options):
        text = {
            "calibration": str(text_file),
            "samples": 4,
            "sequence_length": 32,
            "sample_tokens": 6,
        }
        return sleb.SearchRequest(str(tiny_llama), **(text | options))

    return make


def without_environment(plan):
    return {key: value for key, value in plan.to_data().items() if key != "environment"}


def test_a_search_is_the_command_s(request_for, llama_plan):
    events = []
    plan = sleb.search(request_for(remove=2, output=Path("called.json")), events.append)
    assert without_environment(plan) == without_environment(read_plan(llama_plan))
    assert without_environment(plan) == without_environment(read_plan(Path("called.json")))
    started = [event.task for event in events if isinstance(event, TaskStarted)]
    finished = [event.task for event in events if isinstance(event, TaskFinished)]
    assert "Search" in started
    assert sorted(started) == sorted(finished)
    assert not Path("called.json.journal").exists()


def test_a_search_without_a_target_is_refused(request_for):
    with pytest.raises(UsageError, match="No target given"):
        sleb.search(request_for())


def test_a_request_takes_lists_for_tuples_and_paths_for_texts():
    given = sleb.EvalRequest(Path("plan.json"), tasks=["piqa"], remove=[2, 4], output="found.json")
    assert given == sleb.EvalRequest(
        "plan.json", tasks=("piqa",), remove=(2, 4), output=Path("found.json")
    )


@pytest.mark.slow  # mypy reads all modules behind the names
def test_a_type_checker_knows_the_names_of_the_module(monkeypatch, tmp_path):
    monkeypatch.setenv("MYPYPATH", str(DOCS.parent))
    lines = [
        "import sleb_cli as sleb",
        "def lost(plan: sleb.Plan) -> sleb.EvalResult:",
        '    return sleb.evaluate(sleb.EvalRequest(plan, tasks=["piqa"], remove=[2, 4]))',
        'lost(sleb.read_plan("plan.json"))',
        'sleb.serch("demo")',
    ]
    (tmp_path / "user.py").write_text("\n".join(lines))
    said, _, _ = mypy.api.run(["--strict", "user.py"])
    assert [line for line in said.splitlines() if line.startswith("user.py")] == [
        'user.py:5: error: Module has no attribute "serch"; maybe "search"?  [attr-defined]'
    ]


def test_a_plan_is_a_path_while_its_file_is_unchanged(request_for, llama_plan):
    plan = sleb.search(request_for(remove=2, output="found.json"))
    assert sleb.EvalRequest(plan) == sleb.EvalRequest(Path("found.json").absolute())
    assert (
        sleb.export(sleb.ExportRequest(plan, to="indices")).text
        == ",".join(map(str, plan.removals)) + "\n"
    )
    assert sleb.ApplyRequest(read_plan(llama_plan)).subject == str(llama_plan)
    sleb.search(request_for(remove=1, output="found.json", force=True))
    for other, words in (
        (plan, "found.json holds another plan"),
        (Plan(**dict(plan)), "This plan is in no file"),
    ):
        with pytest.raises(PlanError, match=words):
            sleb.ApplyRequest(other)


def test_errors_name_arguments_in_python_and_options_in_the_terminal(
    request_for, run_sleb, llama_plan
):
    with pytest.raises(UsageError, match=r"^remove -1 is too small.\nHint: Use 0 or more.$"):
        request_for(remove=-1)
    request = sleb.ApplyRequest(llama_plan, blocks=[1])
    with pytest.raises(
        UsageError, match=r"^blocks applies to a model, but .*\nHint: Leave out blocks.$"
    ):
        sleb.apply(request)
    assert run_sleb("apply", llama_plan, "--blocks 1").stderr.endswith(
        "hint: Leave out --blocks.\n"
    )


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"perplexity": "a.txt"}, "perplexity cannot be 'a.txt'.", "Give a list of texts."),
        ({"remove": [1.5]}, "remove cannot be (1.5,).", "Give a list of whole numbers."),
        ({"limit": True}, "limit cannot be True.", "Give a whole number."),
        ({"run_code": 3}, "run_code cannot be 3.", "Give one of confined, unconfined."),
        ({"bos": 1}, "bos cannot be 1.", "Give True or False."),
        (
            {"run_code": "confine"},
            "Unknown value 'confine' for run_code.",
            "Did you mean 'confined'?",
        ),
        ({"batch_size": 1.5}, "batch_size cannot be 1.5.", "Give a text or a whole number."),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(options, said, hint):
    with pytest.raises(UsageError) as refused:
        sleb.EvalRequest("plan.json", **options)
    assert str(refused.value) == said
    assert refused.value.__notes__ == [f"Hint: {hint}"]


def test_the_listener_for_trackio_hears_every_step(tiny_llama, text_file, monkeypatch):
    tracked = Mock()
    monkeypatch.setitem(sys.modules, "trackio", tracked)
    monkeypatch.setattr(sys, "argv", ["track.py", str(tiny_llama), str(text_file)])
    short = {"samples": 16, "sequence_length": 32}
    monkeypatch.setattr(
        sleb, "SearchRequest", partial(sleb.SearchRequest, sample_tokens=6, **short)
    )
    monkeypatch.setattr(sleb, "ApplyRequest", partial(sleb.ApplyRequest, heal_tokens=2048, **short))
    runpy.run_path(str(DOCS / "track.py"), run_name="__main__")
    logged = [call.args[0] for call in tracked.log.call_args_list]
    plan = read_plan(Path("plan.json"))
    steps = [row for row in logged if "removed" in row]
    assert [(row["removed"], row["score"]) for row in steps] == [
        (n, step.score) for n, step in enumerate(plan.steps, 1)
    ]
    assert [row["KL"] for row in logged if "KL" in row]
    assert logged[-1] == {"removals": str(plan.removals)}
    tracked.finish.assert_called_once()


@pytest.mark.parametrize("right", [0, 1])
def test_fine_tuning_learns_the_task_of_its_page(right, tiny_llama, monkeypatch, capsys, tmp_path):
    items = [
        {"prompt": f"the river {n}", "choices": [" stone", " water"], "right": right}
        for n in range(40)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setattr(
        sys, "argv", ["fine_tune.py", "items.jsonl", "items.jsonl", str(tiny_llama)]
    )
    script = (DOCS / "fine_tune.py").read_text()
    assert "2e-5" in script
    exec(script.replace("2e-5", "3e-3"), {"__name__": "__main__"})  # the weights are random
    assert " 1.000 after, " in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_runs(tiny_llama, text_file, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    settings, text = '"demo", "self", Path("sleb-example")', (DOCS / "example.py").read_text()
    assert settings in text
    exec(text.replace(settings, f'{str(tiny_llama)!r}, {str(text_file)!r}, Path("out")'), {})
    said = capsys.readouterr().out
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert f"{plan.removals}\n" in said
    assert (
        f"{6 - len(plan.removals)} blocks, checked: complete, same bytes, loads, same logits"
        in said
    )
    assert f"{','.join(map(str, plan.removals))}\n" in said
    assert (
        json.loads((tmp_path / "out" / "pruned" / "config.json").read_text())["num_hidden_layers"]
        == 4
    )


@pytest.mark.slow
def test_the_example_serves_new_queries_from_an_old_index(
    tiny_encoder, monkeypatch, capsys, tmp_path
):
    lines = [json.dumps({"text": line}) for line in prose(900).splitlines()]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    # Random blocks change all neighbours: these change little.
    shutil.copytree(tiny_encoder, tmp_path / "model")
    weights = weights_of(tiny_encoder)
    for name, value in weights.items():
        if "output.dense.weight" in name:
            value *= 0.2
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["example_encoder.py", "model", "texts.jsonl"])
    monkeypatch.setattr(sleb, "SearchRequest", partial(sleb.SearchRequest, samples=16))
    monkeypatch.setattr(sleb, "ApplyRequest", partial(sleb.ApplyRequest, heal_tokens=8000))
    runpy.run_path(str(DOCS / "example_encoder.py"), run_name="__main__")
    said = capsys.readouterr().out
    removed = read_plan(tmp_path / "sleb-encoder" / "plan.json").removals
    assert f"without blocks {removed}\n" in said
    assert "same outputs, same vectors" in said
    (share,) = re.findall(r"^(\S+)% of the 10 nearest documents stay$", said, re.MULTILINE)
    assert 25 < float(share) < 100  # by chance, 10 of 135 stay
    config = json.loads((tmp_path / "sleb-encoder" / "smaller" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6 - len(removed)

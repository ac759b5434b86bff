"""`--config`: every option of every command from a file, and a search from its plan."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from conftest import as_typed, llama_config, prose, save_model
from sleb_cli import api
from sleb_cli.__main__ import main
from sleb_cli.plan import read_plan
from sleb_cli.requests import (
    ApplyRequest,
    BenchRequest,
    EvalRequest,
    ExportRequest,
    SearchRequest,
    kinds_of,
)

COMMANDS = {
    "search": (SearchRequest, {"model": "some/model"}),
    "apply": (ApplyRequest, {}),
    "eval": (EvalRequest, {}),
    "bench": (BenchRequest, {}),
    "export": (ExportRequest, {"to": "table", "more": ["b.json"]}),
}
"""The request of each command, and what it cannot do without."""


def another_value(field, annotation):
    """Return a value that is not a field's default, as YAML holds it."""
    kinds = kinds_of(annotation)
    if str in kinds or Path in kinds:
        return "1e3"  # which YAML could take for a number
    (kind,) = kinds
    if get_origin(kind) is Sequence:
        return [7, 3] if int in get_args(kind) else ["wikitext2", "c4"]
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    minimum = field.metadata["doc"].minimum
    return {bool: True, int: minimum + 3, float: minimum + 0.25}[kind]


@pytest.fixture
def asked(monkeypatch):
    """Run a command whose work is left out, and return its request."""
    found = []

    def stop(request, notify=None):
        found.append(request)
        raise KeyboardInterrupt

    for name in ("search", "apply", "evaluate", "bench", "export"):
        monkeypatch.setattr(api, name, stop)

    def run(*words):
        assert main(as_typed(words)) == 130
        return found.pop()

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_may_stand_in_a_file(asked, command, tmp_path):
    request_type, needed = COMMANDS[command]
    kinds = get_type_hints(request_type)
    for each in fields(request_type):
        if each.name in ("force", "resume"):  # for one run
            continue
        value = another_value(each, kinds[each.name])
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(needed | {each.name: value}))
        found = getattr(asked(command, "--config run.yaml"), each.name)
        assert found != each.default
        assert (str(found) if isinstance(found, Path) else found) == (
            tuple(value) if isinstance(value, list) else value
        )


def test_what_is_typed_wins_and_values_are_read_as_if_typed(asked, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: demo\nsamples: 4\nremove: 3\nprotect: [5, 11]\nprotect_kind: linear\nfast: "
        "no\nchat:\n"
    )
    request = asked("search", "--config", file, "--samples 5")
    assert (request.model, request.samples, request.remove, request.protect) == (
        "demo",
        5,
        3,
        (5, 11),
    )
    assert (request.protect_kind, request.fast, request.chat) == (("linear",), False, None)
    file.write_text("model: 010\nremove: 3\nrevision: 1.10\nseed: 010\ncalibration: null\n")
    other = asked("search", "--config", file, "--ratio 0.2")
    assert (other.model, other.revision, other.seed, other.calibration) == ("010", "1.10", 10, None)
    assert (other.ratio, other.remove) == ("0.2", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sampels: 3", "of `sleb search`.\nhint: Did you mean 'samples'?"),
        ("json: true", "has 'json', which is not an option"),
        ("1: 2", "has '1', which is not an option"),
        ("samples: x", "--samples 'x' is not a whole number"),
        ("strategy: gready", "Did you mean 'greedy'?"),
        ("[1, 2", "is not YAML"),
        ("samples: " + "9" * 5000, "99' is not a whole number"),
        ("[" * 90_000, "is not YAML"),
        ("- a", "holds no options"),
        ("model: [a, b]\nremove: \xff", "cannot be read: it is not text"),
        ("fast: maybe", "'--fast'"),
        ("protect-kind: a\nprotect_kind: b", "has 'protect_kind' under two names"),
        ("protect: [1, [2]]", "has more than names with values"),
        ("protect: {5: 11}", "has more than names with values"),
    ],
)
def test_a_wrong_file_is_refused(sleb, tmp_path, text, says):
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    assert says in sleb("search demo --config run.yaml", code=2).stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--ratio", "2/5", "--fast", "--seed", 3, "--batch-size", 2),
        (
            "--remove",
            2,
            "--strategy",
            "refine",
            "--metric",
            "kl",
            "--protect",
            "2,4",
            "--holdout",
            0.25,
        ),
        ("--target-memory", "200KiB", "--serve-length", 16, "--protect-first", 0),
    ],
)
def test_a_plan_repeats_its_search_to_the_last_digit(search, sleb, tmp_path, options):
    search(*options)
    said = sleb("search --config plan.json -o again.json").stderr
    assert (
        "The search found the same blocks, in the same order; all scores are identical.\n" in said
    )
    plan, again = (read_plan(tmp_path / name) for name in ("plan.json", "again.json"))
    assert plan.model_copy(update={"environment": again.environment}).to_data() == again.to_data()


def test_a_repeated_search_says_what_differs(search, sleb, tmp_path, tiny_llama):
    text, other = tmp_path / "own.txt", save_model(tmp_path / "other", llama_config(), seed=1)
    text.write_text(prose(200))
    search("--remove 3", text=text)
    plan = read_plan(tmp_path / "plan.json")
    environment = plan.environment.model_copy(update={"torch": "1.0"})
    plan.model_copy(update={"environment": environment}).write(tmp_path / "older.json")
    assert "Also different: torch: " in sleb("search --config older.json -o 1.json --json").stderr
    text.write_text(prose(200, seed=9))
    said = sleb("search", other, "--config plan.json --remove 2 -o 2.json").stderr
    assert "other blocks from step " in said
    assert "scores differ by at most " in said
    assert all(f"{name}: " in said for name in ("tokens", "weights", "options.remove"))
    assert read_plan(tmp_path / "2.json").request["model"] == str(other)


def test_a_plan_that_cannot_be_repeated_is_refused(search, sleb, tmp_path):
    search("--remove 1")
    assert "already exists" in sleb("search --config plan.json", code=8).stderr
    data = json.loads((tmp_path / "plan.json").read_text())
    for change, code, message in (
        ({"trust_remote_code": True}, 3, "has 'trust_remote_code', which is not an option that"),
        ({"output": "other.json"}, 3, "has 'output'"),
        ({"samples": "many"}, 2, "--samples 'many' is not a whole number"),
        ({"model": "/moved"}, 4, "/moved"),
    ):
        (tmp_path / "plan.json").write_text(
            json.dumps(data | {"request": data["request"] | change})
        )
        assert message in sleb("search --config plan.json -o new.json", code=code).stderr

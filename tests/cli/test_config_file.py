"""`--config` and `--save-config`: every option of every command, from a file."""

import os
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from sleb_cli import api
from sleb_cli.__main__ import main
from sleb_cli.requests import ApplyRequest, BenchRequest, EvalRequest, ExportRequest, SearchRequest

COMMANDS = {
    "search": (SearchRequest, {"model": ["some/model"]}),
    "apply": (ApplyRequest, {}),
    "eval": (EvalRequest, {}),
    "bench": (BenchRequest, {}),
    "export": (ExportRequest, {"to": ["--to", "summary"]}),
}
"""The request of each command, and the words that it cannot do without."""


def words_for(request_type):
    """Yield the words that give each field another value than its default."""
    kinds = get_type_hints(request_type)
    for each in fields(request_type):
        doc, kind = each.metadata["doc"], kinds[each.name]
        options = [one for one in (get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)) if one]
        one = str if str in options else options[0]
        flag = doc.flag or f"--{each.name.replace('_', '-')}"
        if doc.argument:
            yield each.name, ["some/model"]
        elif one is bool:
            yield each.name, [flag.partition("/")[0]]
        elif doc.repeated:
            yield each.name, [flag, "a", flag, "b"]
        elif get_origin(one) is tuple:
            yield each.name, [flag, "7,3" if get_args(one)[0] is int else "wikitext2,c4"]
        elif get_origin(one) is Literal:
            yield each.name, [flag, get_args(one)[-1]]
        elif one is int:
            yield each.name, [flag, str(doc.least + 3)]
        elif one is float:
            yield each.name, [flag, f"{doc.least + 0.25}"]
        else:
            yield each.name, [flag, "1e3"]  # which YAML could take for a number


@pytest.fixture
def asked(monkeypatch):
    """Run a command whose work is left out, and return its request."""
    found = []

    def stop(request, notify=None):
        found.append(request)
        raise KeyboardInterrupt

    for name in ("search", "compare", "apply", "evaluate", "bench", "export"):
        monkeypatch.setattr(api, name, stop)

    def run(*words):
        assert main([str(word) for word in words]) == 130
        return found.pop()

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_may_stand_in_a_file(asked, command, tmp_path):
    request_type, needed = COMMANDS[command]
    defaults = {each.name: each.default for each in fields(request_type)}
    for name, words in words_for(request_type):
        if name in ("force", "resume"):  # for one run
            continue
        others = [word for other, more in needed.items() if other != name for word in more]
        file = tmp_path / f"{name}.yaml"
        typed = asked(command, *others, *words, "--save-config", file)
        assert getattr(typed, name) != defaults[name]
        assert len(yaml.safe_load(file.read_text())) == 1 + bool(others)
        assert asked(command, "--config", file) == typed


def test_what_is_typed_wins_and_lists_may_be_lists(asked, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: demo\nsamples: 4\nremove: 3\nprotect: [5, 11]\nprotect_kind: linear\nfast: false\nchat:\n")
    request = asked("search", "--config", file, "--samples", 5)
    assert (request.model, request.samples, request.remove, request.protect) == ("demo", 5, 3, (5, 11))
    assert (request.protect_kinds, request.fast, request.chat) == (("linear",), False, None)
    other = asked("search", "--config", file, "--ratio", 0.2, "--save-config", "other.yaml")
    assert (other.ratio, other.remove) == ("0.2", None)
    assert "remove" not in yaml.safe_load((tmp_path / "other.yaml").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampels: 3", "has 'sampels', which is not an option of `sleb search`.\nhint: Did you mean 'samples'?"),
        ("json: true", "has 'json', which is not an option"),
        ("1: 2", "has 1, which is not an option"),
        ("samples: x", "Invalid value for '--samples'"),
        ("samples: 0", "--samples 0 is too small"),
        ("strategy: gready", "Did you mean 'greedy'?"),
        ("[1, 2", "is not YAML"),
        ("revision: 2024-13-45", "is not YAML"),
        ("samples: " + "9" * 5000, "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("- a", "holds no options"),
        ("model: [a, b]\nremove: \xff", "is not YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_refused(run_sleb, tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    result = run_sleb("search", "demo", "--config", "run.yaml", "--save-config", "saved.yaml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "saved.yaml").exists()


def test_a_command_that_fails_saves_no_options(run_sleb, tmp_path):
    assert run_sleb("search", "nowhere/at/all", "--remove", 2, "--save-config", "run.yaml").exit_code == 4
    assert not (tmp_path / "run.yaml").exists()


def test_a_saved_file_is_not_overwritten(asked, run_sleb, tmp_path):
    asked("search", "demo", "--save-config", "run.yaml")
    assert run_sleb("search", "demo", "--save-config", "run.yaml").exit_code == 8
    asked("search", "demo", "--remove", 2, "--save-config", "run.yaml", "--force")
    os.mkfifo("pipe")
    assert run_sleb("search", "demo", "--save-config", "pipe", "--force").exit_code == 8
    assert Path("pipe").is_fifo()
    saved = (tmp_path / "run.yaml").read_text()
    assert saved == "# sleb search --config run.yaml\nmodel: demo\nremove: 2\n"

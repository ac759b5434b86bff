"""`sleb env`: what a report of a bug needs, whatever is broken."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sleb_cli.engine import device
from sleb_cli.engine.bug_report import PACKAGES

TEMPLATE = Path(__file__).resolve().parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.yml"


def report(run_sleb):
    result = run_sleb("env", "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_it_names_versions_and_the_machine(run_sleb, tmp_path):
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "weights").write_bytes(bytes(1234))
    data, text = report(run_sleb), run_sleb("env").stdout
    assert data["problems"] == []
    assert data["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert all(f"{name} " in text for name in PACKAGES)
    assert data["cache_bytes"] == 1234
    assert 0 < data["free_bytes"] <= data["memory_bytes"]
    assert all(line.split()[1:] for line in text.splitlines())


@pytest.mark.parametrize("units", [(), (torch.bfloat16,), (torch.bfloat16, torch.float16)])
def test_it_says_in_which_data_type_models_run(run_sleb, monkeypatch, units):
    monkeypatch.setattr(device, "cpu_dtypes", lambda: {torch.float32, *units})
    auto, text = report(run_sleb)["auto"], run_sleb("env").stdout
    for dtype in (torch.bfloat16, torch.float16):
        name = device.dtype_name(dtype)
        assert auto[name] == (name if dtype in units else "float32")
        assert (f"float32 (no {name} units)" in text) == (dtype not in units)


def test_an_accelerator_has_a_line(run_sleb, simulate):
    simulate()
    (found, *_), text = report(run_sleb)["accelerators"], run_sleb("env").stdout
    assert found["device"] in text
    assert 0 < found["free_bytes"] <= found["memory_bytes"]


def broken():
    raise RuntimeError("driver too old, see https://user:secret@hub.example/?token=abc\nhf_abcdefghijkl")


@pytest.mark.parametrize("what", ["torch", "metadata", "devices", "plugins", "home"])
def test_what_is_broken_is_a_line_and_no_secret(run_sleb, monkeypatch, what):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    match what:
        case "torch":
            monkeypatch.setitem(sys.modules, "torch", None)
        case "metadata":
            monkeypatch.setattr("importlib.metadata.version", lambda name: broken())
        case "devices":
            monkeypatch.setattr(torch.accelerator, "is_available", broken)
        case "plugins":
            monkeypatch.setattr("sleb_cli.api.load_plugins", broken)
        case "home":
            monkeypatch.setattr("sleb_cli.engine.files.cache.cache_root", broken)
    problems = report(run_sleb)["problems"]
    text = run_sleb("env").stdout
    assert len(problems) == 1
    assert "problem" in text
    assert ("torch" if what == "torch" else "driver too old") in problems[0]
    assert not any(secret in text for secret in ("hf_abcdefghijkl", "secret", "abc"))


def test_the_user_s_folder_is_not_named(run_sleb, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert report(run_sleb)["cache"] == "~/cache"


def test_a_plugin_that_fails_is_named(run_sleb, as_plugins, monkeypatch, tmp_path):
    (tmp_path / "broken_for_env.py").write_text("raise RuntimeError('no')")
    monkeypatch.syspath_prepend(tmp_path)
    as_plugins("broken_for_env")
    assert "RuntimeError: no" in report(run_sleb)["failed"][0]

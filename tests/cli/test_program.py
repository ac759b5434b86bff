"""The program as a whole: help, version, start-up, and what `main()` does with errors."""

import subprocess
import sys

import pytest
import torch

import sleb_cli
import sleb_cli.ui.plugins  # bound before a test replaces what it imports
from conftest import slow
from sleb_cli import __main__ as program
from sleb_cli.engine import device
from sleb_plugins import errors

COMMANDS = ["search", "apply", "eval", "bench", "export", "plugins"]
HEAVY = ["torch", "transformers", "datasets", "accelerate", "lm_eval", "numpy"]


def test_help(sleb):
    for words in ([], ["-h"], ["--help"], ["help"]):
        result = sleb(*words)
        assert all(name in result.stdout for name in ("Usage: sleb", *COMMANDS))
    assert sleb("help", "eval").stdout == sleb("eval", "--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_two_examples_and_is_not_long(sleb, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    lines = sleb(command, "--help").stdout.splitlines()
    assert len(lines) <= 100
    assert sum(line.startswith(f" sleb {command}") for line in lines) == 2


def broken():
    raise RuntimeError(
        "driver too old, see https://user:secret@hub.example/?token=abc\nhf_abcdefghijkl"
    )


def test_the_version_names_what_a_bug_report_needs_and_no_secret(
    run_sleb, simulate, as_plugins, monkeypatch
):
    monkeypatch.setattr(device, "cpu_units", lambda: frozenset({"amx_bf16"}))
    simulate()
    lines = run_sleb("--version").stdout.splitlines()
    assert lines[0] == f"sleb {sleb_cli.__version__}"
    assert [
        line.split()[0] for line in lines
    ] == "sleb Python torch transformers cpu: sim:0: sim:1:".split()
    assert "(amx_bf16)" in lines[4]
    as_plugins("acme")  # of which no code runs
    assert run_sleb("--version").stdout.splitlines()[1] == "plugin unknown package ? (acme)"
    monkeypatch.setattr(torch.accelerator, "is_available", broken)
    shown = run_sleb("--version").stdout
    assert "driver too old" in shown
    assert not any(secret in shown for secret in ("hf_abcdefghijkl", "secret", "abc"))


NOT_FOR_ALL = ["datasets", "lm_eval", "scipy.stats", "sleb_cli.engine.recovery.recover"]
# What commands must not have imported, in one process: so each line holds for those above it, too.
AT_ONCE = [
    *(([command, "--help"], [*HEAVY, "sleb_cli.plan"]) for command in COMMANDS),
    (["plugins"], ["torch", "numpy", *NOT_FOR_ALL]),
    *(
        (f"export PLAN --to {to}".split(), ["torch", *NOT_FOR_ALL])
        for to in ("indices", "table", "report")
    ),
]
ON_TORCH = [
    (["--version"], ["transformers", *NOT_FOR_ALL]),
    (
        "apply MODEL --blocks 1 -o bare --no-verify".split(),
        ["sleb_cli.engine.text.calibration", *NOT_FOR_ALL],
    ),
    ("apply MODEL --blocks 1 -o proven".split(), ["sleb_cli.engine.speed.timing", *NOT_FOR_ALL]),
    ("bench MODEL --blocks 1 --prompt --prompt-length 8 --iterations 1".split(), NOT_FOR_ALL),
    (
        "eval MODEL --blocks 1 --perplexity TEXT --sequence-length 16".split(),
        ["sleb_cli.engine.search", *NOT_FOR_ALL],
    ),
    (
        "search MODEL --calibration TEXT --samples 2 --remove 1 --sample-tokens 0".split(),
        NOT_FOR_ALL,
    ),
]


@pytest.mark.parametrize("lines", [AT_ONCE, slow(ON_TORCH)], ids=["at once", "on torch"])
def test_a_command_imports_only_what_it_needs(tiny_llama, llama_plan, text_file, tmp_path, lines):
    code = "import sys; from sleb_cli.__main__ import main\n"
    for words, others in lines:
        given = {"MODEL": str(tiny_llama), "PLAN": llama_plan.name, "TEXT": str(text_file)}
        words = [given.get(word, word) for word in words]
        if words[:2] == ["bench", str(tiny_llama)]:  # without the processes that measure the memory
            code += "from sleb_cli.engine.speed import benchmark\n"
            code += "benchmark.measure_alone = lambda *given: (None, [None] * len(given[2]))\n"
        code += f"assert main({words}) == 0, {words}; found = {{*{others}}} & {{*sys.modules}}\n"
        code += f"assert not found, ({words}, found)\n"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_unknown_words(sleb):
    for arguments in (["serch"], ["search"], ["--frob"], ["eval", "--tasks"]):
        result = sleb(*arguments, code=2)
        assert result.stderr.startswith("error: ")
        assert result.stdout == ""


def test_each_class_of_error_has_an_exit_code_of_its_own():
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and c.__base__ is errors.SlebError
    ]
    codes = [c.exit_code for c in classes]
    assert sorted(codes) == list(range(2, 10))


def test_a_bug_keeps_its_traceback_and_ctrl_c_has_none(sleb, monkeypatch):
    monkeypatch.setattr("sleb_cli.plugin_manager.load_plugins", lambda points: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program.main(["plugins"])

    def interrupt(points):
        raise KeyboardInterrupt

    monkeypatch.setattr("sleb_cli.plugin_manager.load_plugins", interrupt)
    assert "Interrupted" in sleb("plugins", code=130).stderr


ENDING = """
import atexit, os
from sleb_cli import __main__ as program

class Held:
    def __del__(self):
        os.write(1, b"torn down")

def main():
    atexit.register(print, "handled")
    return 5

held, program.main = Held(), main
program.run()
"""


def test_the_process_exits_after_its_handlers_without_teardown():
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "handled\n")

"""Documents cannot drift from what they describe."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sleb_cli
from sleb_cli.plan import CalibrationRecord, Plan, SearchRecord
from sleb_plugins import SlebError, errors, hookspecs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_what_cog_would_write():
    subprocess.run([sys.executable, "-m", "cogapp", "--check", "README.md"], cwd=ROOT, check=True)


def test_the_completions_are_what_the_program_prints():
    subprocess.run([sys.executable, "-m", "completions", "--check"], cwd=ROOT, check=True)


def test_bash_completes_commands_and_options(tmp_path):
    (tmp_path / "sleb").write_text(f'#!/bin/sh\nexec {sys.executable} -m sleb_cli "$@"\n')
    (tmp_path / "sleb").chmod(0o755)
    script = f"""
        PATH={tmp_path}:$PATH; source {ROOT}/completions/sleb.bash
        COMP_WORDS=(sleb se); COMP_CWORD=1; _sleb_completion sleb; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(sleb search --cal); COMP_CWORD=2; _sleb_completion sleb; echo "${{COMPREPLY[@]}}"
    """
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["search", "--calibration"]


def test_every_hook_key_of_the_plan_and_exit_code_is_in_the_readme():
    hooks = [name for name in vars(hookspecs) if name.startswith("sleb_")]
    assert len(hooks) == 3
    assert all(f"`{hook}()`" in README for hook in hooks)
    assert all(f"| `{key}` |" in README for key in Plan.model_fields)
    classes = [c for c in vars(errors).values() if isinstance(c, type) and c.__base__ is SlebError]
    assert all(f"| {c.exit_code} | `{c.__name__}` |" in README for c in classes)
    keys = {*CalibrationRecord.model_fields, *SearchRecord.model_fields} - {"protect_first", "protect_last", "seed"}
    assert [key for key in keys if f"`{key}`" not in README] == []


def test_the_changelog_begins_with_this_version():
    found = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found
    assert found[1] == sleb_cli.__version__


def test_the_example_plugin_is_short():
    lines = (ROOT / "tests" / "example_plugin" / "sleb_example.py").read_text().splitlines()
    assert len(lines) < 45  # a family, a metric and an export format


@pytest.mark.parametrize("path", ["README.md", "docs/architecture.md", "docs/families.md", "docs/search.md"])
def test_places_that_documents_name_exist(path):
    named = re.findall(r"`((?:sleb_cli|sleb_plugins|tests|docs|completions)/[\w./]*)`", (ROOT / path).read_text())
    assert all((ROOT / place).exists() for place in named)

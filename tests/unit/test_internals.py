"""What we take from inside other packages stands in one module for each."""

import ast
import importlib
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import sleb_cli
from sleb_plugins import MachineError

ADAPTERS = {"transformers": "transformers_internals", "lm_eval": "lm_eval_internals"}


@pytest.mark.parametrize("package", ADAPTERS)
def test_only_its_adapter_takes_names_from_inside_a_package(package):
    taking = {
        path.stem
        for path in Path(sleb_cli.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}.")
        if package == "lm_eval" or node.module != package
    }
    assert taking == {ADAPTERS[package]}


def test_a_name_that_has_moved_is_an_error_of_the_machine(monkeypatch):
    adapter = f"sleb_cli.engine.{ADAPTERS['transformers']}"
    monkeypatch.delattr("transformers.modeling_utils.LoadStateDictConfig")
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    said = f"This sleb does not know transformers {version('transformers')}: cannot import name"
    with pytest.raises(MachineError, match=re.escape(said)):
        importlib.import_module(adapter)

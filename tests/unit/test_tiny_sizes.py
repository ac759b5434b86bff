"""The table of tiny sizes names sizes that there are, and its values reach whatever reads them, in any process."""

import os
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module

import pytest

import tiny_sizes

PRINT = """
from sleb_cli import requests  # before torch is imported
from sleb_cli.engine.forward.memory_budget import CPU_SETTINGS
from sleb_cli.engine.files.copying import BUFFER_BYTES
print(requests.DEFAULT_SHARD_SIZE, BUFFER_BYTES, CPU_SETTINGS.head_positions)
"""


@pytest.mark.parametrize("module", tiny_sizes.TINY)
def test_each_is_a_size_of_its_module(module):
    for name, tiny in tiny_sizes.TINY[module].items():
        usual = getattr(import_module(module), name)
        usual, tiny = (asdict(usual), tiny) if isinstance(tiny, dict) else ({name: usual}, {name: tiny})
        assert tiny.keys() <= usual.keys()
        assert all(type(tiny[field]) is type(usual[field]) for field in tiny)
        assert tiny_sizes.ARE_TINY or all(tiny[field] != usual[field] for field in tiny)


def test_a_new_process_has_them_before_anything_reads_them(tmp_path, monkeypatch):
    for name in (tiny_sizes.VARIABLE, "PYTHONPATH"):  # as where this process has the usual sizes
        monkeypatch.delenv(name, raising=False)
    tiny_sizes.for_children(tmp_path, monkeypatch)
    run = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.split() == ["10kB", "64", "24"]

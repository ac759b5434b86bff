"""The table of tiny sizes names sizes that there are."""

from dataclasses import asdict
from importlib import import_module

import pytest

import tiny_sizes


@pytest.mark.parametrize("module", tiny_sizes.TINY)
def test_each_is_a_size_of_its_module(module):
    for name, tiny in tiny_sizes.TINY[module].items():
        usual = getattr(import_module(module), name)
        usual, tiny = (asdict(usual), tiny) if isinstance(tiny, dict) else ({name: usual}, {name: tiny})
        assert tiny.keys() <= usual.keys()
        assert all(type(tiny[field]) is type(usual[field]) for field in tiny)
        assert tiny_sizes.ARE_TINY or all(tiny[field] != usual[field] for field in tiny)

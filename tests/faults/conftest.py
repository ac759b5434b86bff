"""What tests of faults share: the program in a process of its own, a place for its commands, and
how much is tried.
"""

import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

from conftest import Result
from faults.place import Place
from faults.program import Program, require


def often(names: Iterable[Any], first: Collection[Any]) -> list[Any]:
    """Return parameters of a test: the first ones in every run, and the others only with `pytest -m
    faults`.
    """
    return [
        name if name in first else pytest.param(name, marks=pytest.mark.faults) for name in names
    ]


@pytest.fixture
def sleb(run_sleb: Callable[..., Result]) -> Callable[..., Result]:
    """Run a command in this process, which must end with this exit code, and with a sentence if it
    is an error.
    """
    return lambda *words, code=0: require(run_sleb(*words), (code,))


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program `sleb`, ready to be run thousands of times."""
    if sys.platform != "linux":
        pytest.skip("faults are injected on Linux only")
    return Program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="session")
def place(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder in which commands run and are disturbed."""
    return Place(program, tmp_path_factory.mktemp("place"))

"""What tests of faults share: the program in a process of its own, and the sizes in which they run."""

import sys

import pytest

from faults.program import Program


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrize a test by how much it tries: few in every run, and many of them with `pytest -m faults`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.faults)])


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program `sleb`, ready to be run thousands of times."""
    if sys.platform != "linux":
        pytest.skip("faults are injected on Linux only")
    return Program(tmp_path_factory.mktemp("program"))

"""The same plan from one process, from two and three, and from streamed blocks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import calibration, save_model
from families import tiny_config

WAYS = {
    "two processes": (2, []),
    "three processes": (3, []),
    "streamed": (1, ["--stream"]),
    "streamed by two": (2, ["--stream"]),
}
SEARCHES = {"exact": [], "race": ["--fast"]}
FAMILIES = ["smollm2", "gemma3_text", "mixtral", "opt"]


def launch(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """Start `sleb`, in several processes by torchrun; each computes with one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "sleb_cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def search(model: Path, name: str, processes: int, *options: object) -> dict[str, object]:
    """Search for two removals; return the plan without the machine and its times."""
    place = Path(f"{name}.json")
    with launch(processes, "search", model, "--remove", 2, "--sample-tokens", 2, *options, "-o", place) as run:
        _, stderr = run.communicate()
    assert run.returncode == 0, stderr
    plan = json.loads(place.read_text())
    del plan["environment"]
    return plan


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    """A model of each family; the first is the trained one."""
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2")
    return save_model(tmp_path / "model", tiny_config(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("way", SEARCHES)
def test_the_plan_is_the_same_from_any_machine(model, text_file, way):
    options = [*calibration(text_file, samples=7, length=24), "--batch-size", 1, *SEARCHES[way]]
    expected = search(model, "alone", 1, *options)
    for name, (processes, more) in WAYS.items():
        assert search(model, name.replace(" ", "-"), processes, *options, *more) == expected, name

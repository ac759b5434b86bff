"""`sleb eval` on the simulated device."""

import json

import pytest

from conftest import prose, save_model
from families import tiny_config


@pytest.fixture
def evaluate(run_sleb, tmp_path):
    (tmp_path / "test.txt").write_text(prose(60, seed=5))

    def run(model, *options):
        given = (
            "--blocks 1,2 --perplexity test.txt --sequence-length 32 --batch-size 3 --max-windows 5"
        )
        result = run_sleb("eval", model, *given.split(), *options, "--json", "-q")
        assert (result.exit_code, result.stderr) == (0, "")
        data = json.loads(result.stdout)
        assert data.pop("device") == ("cpu" if "cpu" in options else "sim")
        assert data.pop("processor")
        assert data.pop("commands")
        return data

    return run


def test_perplexities_are_the_cpus(evaluate, simulate, tmp_path, spread):
    model = save_model(tmp_path / "dense", tiny_config("gemma3_text"))
    expected = evaluate(model, "--device", "cpu")
    for float64 in (False, True):
        simulate(float64=float64)
        assert evaluate(model, "--device", "sim:1") == expected
    assert evaluate(model, *spread(model)) == expected

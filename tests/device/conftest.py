"""A search on a device, whose plan is compared with another's."""

import gc
import json

import pytest


@pytest.fixture
def search(run_sleb, text_file, tmp_path):
    """Search on a device; return the result, and the plan without what may differ: device, machine
    and time.
    """

    def run(model, *options, codes=(0,)):
        given = "--remove 2 --sample-tokens 1 --samples 4 --sequence-length 16 --force".split()
        result = run_sleb("search", model, *given, "--calibration", text_file, *options)
        gc.collect()
        assert result.exit_code in codes, result.stderr
        if result.exit_code:
            return result, None
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["search"].pop("device") == ("cpu" if "cpu" in options else "sim")
        del plan["environment"], plan["request"]["device"]
        return result, plan

    return run

"""`sleb search --load-in`: weights in fewer bits for the search, and a plan for the model as it is."""

import json
from importlib import util

import pytest
import torch
from torch import nn

from conftest import llama_config, save_model
from sleb_cli.engine.surgery import fewer_bits as packing
from sleb_cli.plan import read_plan


def test_a_missing_package_or_packed_weights_are_refused(search, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "find_spec", lambda name: None)
    asked = ["--remove", 1, "--load-in", "8bit"]
    assert "pip install 'sleb[bitsandbytes]'" in search(*asked, code=7).stderr
    model = save_model(tmp_path / "packed", llama_config(3))
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    assert "is quantized already, so --load-in does not apply" in search(*asked, model=model, code=4).stderr


def test_weights_that_are_not_packed_are_told():
    block, told = nn.Linear(8, 8, bias=False), []
    packed = nn.Parameter(torch.zeros(4, 8, dtype=torch.uint8), requires_grad=False)
    block.register_parameter("of_4_bits", packed)
    packing.report_unpacked([block, block], told.append)
    assert "packs only 50% of the blocks' weights; weight and others stay" in told[0].text
    del block.weight
    packing.report_unpacked([block], told.append)
    assert len(told) == 1


@pytest.mark.skipif(util.find_spec("bitsandbytes") is None, reason="run pip install 'sleb[bitsandbytes]'")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "other"), [("8bit", "4bit"), ("4bit", "8bit")])
def test_the_plan_says_so_and_applies_to_the_whole_model(search, run_sleb, tmp_path, bits, other):
    model = save_model(tmp_path / "model", llama_config(4, hidden_size=64, intermediate_size=128))
    assert search("--remove", 1, "--load-in", bits, "-q", model=model).stderr == ""
    search("--remove", 1, "-o", "plain.json", model=model)
    plan, plain = (read_plan(tmp_path / name) for name in ("plan.json", "plain.json"))
    assert (plan.search.load_in, plan.search.engine, plain.search.load_in) == (bits, "fork", None)
    assert plan.model == plain.model
    assert plan.dense.loss != plain.dense.loss
    assert plan.dense.loss == pytest.approx(plain.dense.loss, rel=0.05)
    assert run_sleb("apply", "-o", "out").exit_code == 0
    extend = ["search", model, "--extend", "plan.json", "--remove", 2]
    refused = run_sleb(*extend, "--load-in", other)
    assert (refused.exit_code, "load_in" in refused.stderr) == (3, True)
    assert run_sleb(*extend).exit_code == 0
    assert read_plan(tmp_path / "plan.json").search.load_in == bits

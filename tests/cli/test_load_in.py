"""`sleb search --load-in`: weights in fewer bits for the search, and a plan for the model as it is."""

import json
from importlib import util
from pathlib import Path

import pytest

from conftest import calibration, llama_config, save_model
from families import tiny_config
from sleb_cli.engine.surgery import fewer_bits as packing

needs_bitsandbytes = pytest.mark.skipif(
    util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'sleb[bitsandbytes]'"
)


@pytest.fixture
def installed(monkeypatch):
    """Let bitsandbytes be found, or not, whatever is installed."""

    def let(found):
        monkeypatch.setattr(packing, "find_spec", lambda name: object() if found else None)

    return let


def test_a_missing_package_is_named_with_its_install_command(search, installed):
    installed(False)
    assert "pip install 'sleb[bitsandbytes]'" in search("--remove", 1, "--load-in", "8bit", code=7).stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--remove", 1, "--stream"), "--load-in and --stream"),
        (("--remove", 1, "--metric", "taylor"), "taylor reads the weights"),
        (("--remove", 1, "--metric", "magnitude"), "magnitude reads the weights"),
        (("--target-speedup", "1.1"), "--target-speedup times the model as it will run"),
    ],
)
def test_what_does_not_go_with_it_is_refused(search, installed, options, sentence):
    installed(True)
    assert sentence in search("--load-in", "4bit", *options, code=2).stderr


def test_packed_weights_are_not_packed_again(search, installed, tmp_path):
    installed(True)
    model = save_model(tmp_path / "packed", tiny_config("llama"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    told = search("--remove", 1, "--load-in", "4bit", model=model, code=4).stderr
    assert "is quantized already, so --load-in does not apply" in told


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_plan_says_so_and_applies_to_the_whole_model(run_sleb, text_file, tmp_path, bits):
    model = save_model(tmp_path / "model", llama_config(4, hidden_size=64, intermediate_size=128))
    given = ["--remove", 1, *calibration(text_file, length=16), "--load-in", bits]
    result = run_sleb("search", model, *given, "-q")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    plan = json.loads(Path("plan.json").read_text())
    assert (plan["search"]["load_in"], plan["search"]["engine"]) == (bits, "fork")
    plain = run_sleb("search", model, *given[:-2], "-o", "plain.json")
    assert plain.exit_code == 0, plain.stderr
    expected = json.loads(Path("plain.json").read_text())
    assert expected["search"]["load_in"] is None
    assert plan["model"] == expected["model"]
    assert plan["dense"]["loss"] != expected["dense"]["loss"]
    assert plan["dense"]["loss"] == pytest.approx(expected["dense"]["loss"], rel=0.05)
    applied = run_sleb("apply", "plan.json", "-o", "out")
    assert applied.exit_code == 0, applied.stderr


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_a_plan_is_extended_in_the_same_bits(run_sleb, tiny_llama, text_file):
    first = run_sleb("search", tiny_llama, "--remove", 1, *calibration(text_file, length=16), "--load-in", "8bit")
    assert first.exit_code == 0, first.stderr
    again = run_sleb("search", tiny_llama, "--remove", 2, "--extend", "plan.json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(Path("plan.json").read_text())["search"]["load_in"] == "8bit"
    other = run_sleb("search", tiny_llama, "--remove", 3, "--extend", "plan.json", "--load-in", "4bit")
    assert other.exit_code == 3
    assert "load_in" in other.stderr

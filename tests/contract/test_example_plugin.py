"""The plugins of docs/reference/plugins.md: the example as pip installs it, and the steps of the
first one.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import calibration
from sleb_cli.plan import read_plan
from sleb_cli.tables.provenance import search_settings

PACKAGE = Path(__file__).parents[1] / "example_plugin"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "plugins.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip installed the plugin."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for path in PACKAGE.iterdir():
        if path.is_file():
            (source / path.name).write_text(path.read_text())
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    return target


@pytest.fixture(autouse=True)
def _with_plugin(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delitem(sys.modules, "sleb_example", raising=False)


@pytest.fixture
def answer(sleb):
    """Run a command, and return what it says as JSON."""
    return lambda *words: json.loads(sleb(*words, "--json").stdout)


def test_it_is_listed_with_its_package_and_version(answer):
    data = answer("plugins")
    ours = set()
    for offer in data["offers"]:
        if offer["package"] == "sleb-example":
            ours.add((offer["kind"], offer["name"], offer["version"]))
    assert ours == {
        ("engine", "steady", "1.2.3"),
        ("exporter", "slices", "1.2.3"),
        ("family", "gpt2", "1.2.3"),
        ("metric", "next-token-error", "1.2.3"),
    }
    built_in = {"llama", "opt", "nll", "cosine", "mergekit", "llama.cpp", "vllm"}
    assert {offer["name"] for offer in data["offers"]} >= built_in
    assert data["failures"] == []


def test_its_family_and_its_metric_search(answer, sleb, tiny_gpt2, text_file):
    search = ("search", tiny_gpt2, "--remove", 2, *calibration(text_file), "--metric")
    five = answer(*search, "next-token-error:5", "-o", "five.json")
    three = answer("search", tiny_gpt2, "--extend", "five.json", "--remove", 3, "-o", "three.json")
    for plan in (five, three):
        assert plan["search"]["metric"] == "next-token-error:5"
    assert "'many' is no number" in sleb(*search, "next-token-error:many", code=2).stderr
    plan = answer(*search, "next-token-error")
    assert plan["steps"][0]["score"] > five["steps"][0]["score"]
    assert (plan["model"]["family"], plan["search"]["engine"]) == ("gpt2", "model")
    assert plan["score_unit"] == "share of tokens"
    rows = dict(search_settings(read_plan(Path("plan.json"))).rows)
    assert rows["metric"] == "next-token-error of sleb-example 1.2.3"
    predicted = 4 * 31
    for step in plan["steps"]:
        errors = [score * predicted for score in step["scores"].values()]
        assert errors == pytest.approx([round(count) for count in errors], abs=1e-3)
    evaluation = answer("eval", "--perplexity", text_file, "--max-windows", 1)
    assert plan["environment"]["plugins"] == evaluation["plugins"] == {"sleb-example": "1.2.3"}
    sleb("apply", "-o", "out")


def test_its_export_format_writes(answer, sleb, tiny_gpt2):
    export = ("export", tiny_gpt2, "--blocks", "3,1", "--to", "slices")
    slices = "blocks[0:1] + blocks[2:3] + blocks[4:5]\n"
    assert sleb(*export, "-q").stdout == slices
    assert answer(*export)["text"] == slices


STEPS = re.compile(r"^```python\n(import sleb_plugins.*?|\"\"\"A metric.*?)^```", re.M | re.S)


def test_each_step_of_the_first_plugin_loads_and_its_metric_searches(
    answer, search, as_plugins, monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(tmp_path)
    as_plugins("sleb_change")
    first, second = STEPS.findall(PAGE.read_text())
    for step, offers in ((first, []), (second, ["change"])):
        monkeypatch.delitem(sys.modules, "sleb_change", raising=False)
        (tmp_path / "sleb_change.py").write_text(step)
        data = answer("plugins")
        assert data["failures"] == []
        packages = {offer["name"]: offer["package"] for offer in data["offers"]}
        ours = [name for name in packages if not packages[name].startswith("sleb")]
        assert ours == offers
    search("--remove", 1, "--metric", "change")

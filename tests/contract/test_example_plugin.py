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


@pytest.fixture
def sleb_with_plugin(run_sleb, installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delitem(sys.modules, "sleb_example", raising=False)
    return run_sleb


def test_it_is_listed_with_its_package_and_version(sleb_with_plugin):
    result = sleb_with_plugin("plugins", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    ours = {o["kind"]: o["name"] for o in data["offers"] if o["package"] == "sleb-example"}
    assert ours == {
        "engine": "steady",
        "exporter": "slices",
        "family": "gpt2",
        "metric": "next-token-error",
    }
    assert {o["version"] for o in data["offers"] if o["package"] == "sleb-example"} == {"1.2.3"}
    built_in = {"llama", "opt", "nll", "cosine", "mergekit", "llama.cpp", "vllm"}
    assert {o["name"] for o in data["offers"]} >= built_in
    assert data["failures"] == []


def test_its_family_and_its_metric_search(sleb_with_plugin, tiny_gpt2, text_file):
    options = ["--remove", 2, *calibration(text_file), "--json", "--metric"]
    result = sleb_with_plugin(
        "search", tiny_gpt2, *options, "next-token-error:5", "-o", "five.json"
    )
    plan = json.loads(result.stdout)
    assert plan["search"]["metric"] == "next-token-error:5"
    result = sleb_with_plugin(
        "search", tiny_gpt2, "--extend", "five.json", "--remove", 3, "--json", "-o", "three.json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["search"]["metric"] == "next-token-error:5"
    assert (
        "'many' is no number"
        in sleb_with_plugin("search", tiny_gpt2, *options, "next-token-error:many").stderr
    )
    result = sleb_with_plugin("search", tiny_gpt2, *options, "next-token-error")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"][0]["score"] > plan["steps"][0]["score"]
    plan = json.loads(result.stdout)
    assert plan["model"]["family"] == "gpt2"
    assert plan["search"]["engine"] == "model"
    rows = dict(search_settings(read_plan(Path("plan.json"))).rows)
    assert rows["metric"] == "next-token-error of sleb-example 1.2.3"
    assert plan["environment"]["plugins"] == {"sleb-example": "1.2.3"}
    predicted = 4 * 31
    for step in plan["steps"]:
        errors = [score * predicted for score in step["scores"].values()]
        assert errors == pytest.approx([round(count) for count in errors], abs=1e-3)
    result = sleb_with_plugin("eval", "--perplexity", text_file, "--max-windows", 1, "--json")
    assert json.loads(result.stdout)["plugins"] == {"sleb-example": "1.2.3"}
    result = sleb_with_plugin("apply", "-o", "out")
    assert result.exit_code == 0, result.stderr


def test_its_export_format_writes(sleb_with_plugin, tiny_gpt2):
    options = [tiny_gpt2, "--blocks", "3,1", "--to", "slices"]
    result = sleb_with_plugin("export", *options, "-q")
    assert (result.exit_code, result.stdout) == (0, "blocks[0:1] + blocks[2:3] + blocks[4:5]\n"), (
        result.stderr
    )
    result = sleb_with_plugin("export", *options, "--json")
    assert json.loads(result.stdout)["text"] == "blocks[0:1] + blocks[2:3] + blocks[4:5]\n"


def test_each_step_of_the_first_plugin_loads_and_its_metric_searches(
    run_sleb, as_plugins, monkeypatch, tmp_path, tiny_llama, text_file
):
    monkeypatch.syspath_prepend(tmp_path)
    as_plugins("sleb_change")
    first, second = re.findall(
        r"^```python\n(import sleb_plugins.*?|\"\"\"A metric.*?)^```", PAGE.read_text(), re.M | re.S
    )
    for step, offers in ((first, []), (second, ["change"])):
        monkeypatch.delitem(sys.modules, "sleb_change", raising=False)
        (tmp_path / "sleb_change.py").write_text(step)
        data = json.loads(run_sleb("plugins", "--json").stdout)
        assert data["failures"] == []
        built_in = {"sleb", "sleb-example"}
        assert [
            offer["name"] for offer in data["offers"] if offer["package"] not in built_in
        ] == offers
    result = run_sleb(
        "search", tiny_llama, "--remove", 1, *calibration(text_file), "--metric", "change", "--json"
    )
    assert result.exit_code == 0, result.stderr

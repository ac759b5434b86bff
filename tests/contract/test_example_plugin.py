"""The example plugin of the README, installed with pip into a virtual environment of its own."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from conftest import calibration

PACKAGE = Path(__file__).parents[1] / "example_plugin"


@pytest.fixture(scope="module")
def sleb_with_plugin(tmp_path_factory):
    """A virtual environment that sees the packages of this one, and holds the plugin besides."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    scheme = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    Path(scheme, "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = home / "bin" / "python"
    source = home / "source"
    source.mkdir()
    for path in PACKAGE.iterdir():
        if path.is_file():
            (source / path.name).write_text(path.read_text())
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet", str(source)]
    subprocess.run([sys.executable, *install[:2], "--python", python, *install[2:]], check=True)

    def run(*arguments, cwd):
        command = [python, "-m", "sleb_cli", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)

    return run


def test_it_is_listed_with_its_package_and_version(sleb_with_plugin, tmp_path):
    result = sleb_with_plugin("plugins", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    ours = [(o["kind"], o["name"]) for o in data["offers"] if (o["package"], o["version"]) == ("sleb-example", "1.2.3")]
    expected = [("engine", "steady"), ("exporter", "slices"), ("family", "gpt2"), ("metric", "next-token-error")]
    assert sorted(ours) == expected
    built_in = {"llama", "opt", "nll", "cosine", "mergekit", "gguf", "llama.cpp", "vllm"}
    assert {o["name"] for o in data["offers"]} >= built_in
    assert data["failures"] == []


def test_its_family_and_its_metric_search(sleb_with_plugin, tiny_gpt2, text_file, tmp_path):
    options = ["--remove", 2, "--metric", "next-token-error", *calibration(text_file), "--json"]
    result = sleb_with_plugin("search", tiny_gpt2, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["model"]["family"] == "gpt2"
    assert plan["search"]["engine"] == "model"
    assert plan["environment"]["plugins"] == {"sleb-example": "1.2.3"}
    predicted = 4 * 31
    for step in plan["steps"]:
        errors = [score * predicted for score in step["scores"].values()]
        assert errors == pytest.approx([round(count) for count in errors], abs=1e-3)
    result = sleb_with_plugin("apply", "-o", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_its_export_format_writes(sleb_with_plugin, tiny_gpt2, tmp_path):
    options = [tiny_gpt2, "--blocks", "3,1", "--to", "slices"]
    result = sleb_with_plugin("export", *options, "-q", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "blocks[0:1] + blocks[2:3] + blocks[4:5]\n"), result.stderr
    result = sleb_with_plugin("export", *options, "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["document"] == {"slices": [[0, 1], [2, 3], [4, 5]]}
    result = sleb_with_plugin("export", *options, "--source", "x.gguf", cwd=tmp_path)
    assert (result.returncode, "--source does not apply to --to slices" in result.stderr) == (2, True)


@pytest.mark.slow
def test_its_engine_is_timed(sleb_with_plugin, tiny_gpt2, tmp_path):
    options = ["--blocks", "3,1", "--engine", "steady", "--prompt", "--iterations", 2, "--json", "-q"]
    result = sleb_with_plugin("bench", tiny_gpt2, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads(result.stdout)["workloads"]
    assert measured["workload"]["engine"] == "steady"
    assert measured["pruned"][0]["speedup"] > 1


def test_without_it_its_metric_is_unknown(run_sleb, tiny_gpt2):
    result = run_sleb("search", tiny_gpt2, "--remove", 1, "--metric", "next-token-error")
    assert result.exit_code == 2
    assert "no metric 'next-token-error'" in result.stderr

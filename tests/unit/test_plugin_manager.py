"""A plugin can only hurt itself."""

import json
import sys
from importlib.metadata import EntryPoint

import pytest

from conftest import calibration
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import PluginError


def hook(name, body, arguments=""):
    return f"@sleb.hookimpl\ndef sleb_{name}({arguments}):\n    {body}\n"


HEAD = "import sleb_plugins as sleb\n"
FAMILY = hook("families", "return [sleb.FamilyAdapter({name!r}, frozenset({{{type!r}}}), 'a.b')]")
METRIC = (
    "class M(sleb.ModelMetric):\n    name = {name!r}\n    def score_model(self, model, tokenizer, sequences):\n"
    "        return 0\n"
) + hook("metrics", "return [M()]")

BROKEN = {
    "import_error": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "leaves": ("import sys\nsys.exit('no licence')", "no licence"),
    "wrong_type": (hook("metrics", "return ['nll']"), "'nll', which is not a named"),
    "raises": (hook("families", "raise KeyError('x')"), "KeyError"),
    "string_of_types": (hook("families", "return [sleb.FamilyAdapter('a', 'llama', 'b')]"), "is a string"),
    "unknown_hook": (hook("familys", "return []"), "sleb_familys"),
    "no_hook": ("class M(sleb.ModelMetric):\n    name = 'm'", "no function of bad_no_hook has @sleb_plugins.hookimpl"),
    "strange_engine": (
        "class E(sleb.Engine):\n    name, reads = 'e', 'onnx'\n    def load(self, *given): ...\n"
        + hook("engines", "return [E()]"),
        "reads 'onnx', not one of checkpoint, gguf",
    ),
    "unknown_argument": (hook("metrics", "return []", "model"), "model"),
}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Write modules and give their entry points."""
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "modules").mkdir()

    def write(**modules):
        for name, source in modules.items():
            (tmp_path / "modules" / f"{name}.py").write_text(HEAD + source)
            sys.modules.pop(name, None)
        return [EntryPoint(name, name, "sleb") for name in modules]

    return write


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_hurts_only_itself(plugins, kind):
    source, reason = BROKEN[kind]
    registry = load_plugins(
        plugins(**{f"bad_{kind}": source, f"good_{kind}": FAMILY.format(name="acme", type="acme_lm")})
    )
    assert [failure.plugin.module for failure in registry.failures] == [f"bad_{kind}"]
    assert reason in registry.failures[0].reason
    assert registry.family("acme_lm").name == "acme"


def test_a_name_claimed_twice_stops_whoever_asks_for_it_with_both_names(plugins):
    found = plugins(
        one=FAMILY.format(name="one", type="llama") + METRIC.format(name="same"),
        two=FAMILY.format(name="two", type="llama") + METRIC.format(name="same"),
        three=METRIC.format(name="other"),
    )
    registry = load_plugins(found)
    with pytest.raises(PluginError, match=r"\(one\).*\(two\)"):
        registry.metric("same")
    with pytest.raises(PluginError, match=r"'llama' is claimed by .*\(one\).*\(two\)"):
        registry.family("llama")
    assert registry.metric("other").name == "other"


def test_sleb_names_other_plugins_first_and_then_the_broken_ones(run_sleb, plugins, as_plugins, tiny_llama):
    assert "Loading plugins" not in run_sleb("plugins").stderr
    broken = "import sys\nprint('here I run', file=sys.stderr)\nimport nothing_of_that_name"
    plugins(bad_cli=broken, twin_cli=FAMILY.format(name="twin", type="llama"))
    as_plugins("bad_cli", "twin_cli")
    result = run_sleb("plugins")
    assert result.exit_code == 0
    assert 0 <= result.stderr.find("(bad_cli)") < result.stderr.find("here I run")
    assert "nothing_of_that_name" in result.stderr
    assert "'llama' is claimed by sleb" in result.stderr
    data = json.loads(run_sleb("plugins", "--json").stdout)
    assert data["failures"][0]["plugin"] == "bad_cli"
    assert len(data["collisions"]) == 1
    words = ("search", tiny_llama, "--remove", 1, "--calibration", "self")
    result = run_sleb(*words)
    assert result.exit_code == 6
    assert result.stderr.startswith("Loading plugins of other packages: unknown package ? (bad_cli)")
    assert result.stderr.count("(bad_cli) failed to load") == 1
    assert "twin_cli" in result.stderr
    assert "Loading plugins" not in run_sleb(*words, "-q").stderr


def test_an_adapter_that_points_nowhere_is_named(run_sleb, plugins, as_plugins, tiny_gpt2):
    plugins(lost=FAMILY.format(name="lost", type="gpt2"))
    as_plugins("lost")
    result = run_sleb("search", tiny_gpt2, "--remove", 1, "--calibration", "self")
    assert result.exit_code == 4
    assert "The family lost says that gpt2 keeps its blocks at a.b" in result.stderr


RAISING = (
    "class M(sleb.ModelMetric):\n    name, argument = 'm', '[N]'\n    def with_argument(self, argument):\n"
    "        self.n = int(argument)\n        return self\n    def score_model(self, model, tokenizer, sequences):\n"
    "        raise RuntimeError('boom')\n"
) + hook("metrics", "return [M()]")


@pytest.mark.parametrize(
    ("metric", "said"),
    [("m", "raised RuntimeError: boom (raising.py, line 8)"), ("m:1", "boom"), ("m:x", "ValueError")],
)
def test_what_a_plugin_raises_names_it(run_sleb, plugins, as_plugins, tiny_llama, text_file, metric, said):
    plugins(raising=RAISING)
    as_plugins("raising")
    result = run_sleb("search", tiny_llama, "--remove", 1, *calibration(text_file), "--metric", metric)
    assert result.exit_code == 6
    shown = " ".join(result.stderr.split())
    assert "The metric 'm" in shown
    assert said in shown
    assert "Traceback" not in shown


def test_a_metric_that_copies_itself_keeps_its_argument(plugins):
    source = (
        "import copy\nclass M(sleb.ModelMetric):\n    name, argument, n = 'm', '[N]', 0\n"
        "    def with_argument(self, argument):\n        new = copy.copy(self)\n        new.n = int(argument)\n"
        "        return new\n    def score_model(self, model, tokenizer, sequences):\n        return self.n\n"
    ) + hook("metrics", "return [M()]")
    registry = load_plugins(plugins(copying=source))
    scores = {name: registry.metric(name).score_model(None, None, None) for name in ("m", "m:3", "m:5")}
    assert scores == {"m": 0, "m:3": 3, "m:5": 5}

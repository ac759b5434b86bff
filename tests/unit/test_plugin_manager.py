"""A plugin can only hurt itself."""

import json
import re
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from conftest import calibration
from sleb_cli.plugin_manager import load_plugins
from sleb_plugins import ExpertUse, PluginError


def hook(name, body, arguments=""):
    return f"@sleb.hookimpl\ndef sleb_{name}({arguments}):\n    {body}\n"


HEAD = "import sleb_plugins as sleb\n"
FAMILY = hook("families", "return [sleb.FamilyAdapter({name!r}, frozenset({{{type!r}}}), 'a.b')]")
METRIC = (
    "class M(sleb.ModelMetric):\n    name = {name!r}\n    def score_model(self, model, tokenizer, "
    "sequences):\n"
    "        return 0\n"
) + hook("metrics", "return [M()]")

BROKEN = {
    "import_error": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "leaves": ("import sys\nsys.exit('no licence')", "no licence"),
    "wrong_type": (
        hook("metrics", "return ['nll']"),
        "'nll', which is not a LogitMetric or HiddenStateMetric",
    ),
    "no_list": (hook("metrics", "pass"), "sleb_metrics returns None, not a list"),
    "a_class": (
        METRIC.format(name="m").replace("M()", "M"),
        "sleb_metrics offers the class M, not an object: M()",
    ),
    "no_name": (METRIC.format(name="a:b"), "the metric M has the name 'a:b', which is no word"),
    "no_functions": (
        FAMILY.format(name="a", type="b").replace("'a.b'", "'a.b', config_keys=['k']"),
        "is no mapping",
    ),
    "raises": (hook("families", "raise KeyError('x')"), "KeyError"),
    "string_of_types": (
        hook("families", "return [sleb.FamilyAdapter('a', 'llama', 'b')]"),
        "is a string",
    ),
    "unknown_hook": (hook("familys", "return []"), "sleb_familys"),
    "no_hook": (
        "class M(sleb.ModelMetric):\n    name = 'm'",
        "no function of bad_no_hook has @sleb_plugins.hookimpl",
    ),
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
        plugins(
            **{f"bad_{kind}": source, f"good_{kind}": FAMILY.format(name="acme", type="acme_lm")}
        )
    )
    assert [failure.plugin.module for failure in registry.failures] == [f"bad_{kind}"]
    assert reason in registry.failures[0].reason
    assert registry.family("acme_lm").name == "acme"


def test_a_name_that_two_plugins_register_is_an_error_naming_both(plugins):
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


def test_plugins_are_named_before_broken_plugins(run_sleb, plugins, as_plugins, tiny_llama):
    assert "Loading plugins" not in run_sleb("plugins").stderr
    broken = "import sys\nprint('here I run', file=sys.stderr)\nimport nothing_of_that_name"
    plugins(bad_cli=broken, twin_cli=FAMILY.format(name="twin", type="llama"))
    as_plugins("bad_cli", "twin_cli")
    result = run_sleb("plugins")
    assert result.exit_code == 0
    assert 0 <= result.stderr.find("(bad_cli)") < result.stderr.find("here I run")
    assert "nothing_of_that_name" in result.stderr
    assert "'llama' is claimed by sleb" in result.stderr
    assert "│ transformers " in result.stdout
    data = json.loads(run_sleb("plugins", "--json").stdout)
    assert data["failures"][0]["plugin"] == "bad_cli"
    assert len(data["collisions"]) == 1
    words = ("search", tiny_llama, "--remove", 1, "--calibration", "self")
    result = run_sleb(*words)
    assert result.exit_code == 6
    assert result.stderr.startswith(
        "Loading plugins of other packages: unknown package ? (bad_cli)"
    )
    assert result.stderr.count("(bad_cli) failed to load") == 1
    assert "twin_cli" in result.stderr
    assert "It is built in: uninstall unknown package." in result.stderr
    assert "Loading plugins" not in run_sleb(*words, "-q").stderr


def test_an_adapter_that_points_nowhere_is_named(run_sleb, plugins, as_plugins, tiny_gpt2):
    plugins(lost=FAMILY.format(name="lost", type="gpt2"))
    as_plugins("lost")
    result = run_sleb("search", tiny_gpt2, "--remove", 1, "--calibration", "self")
    assert result.exit_code == 4
    assert "The family lost says that gpt2 keeps its blocks at a.b" in result.stderr


RAISING = (
    "class M(sleb.ModelMetric):\n    name, argument = 'm', '[N]'\n    def with_argument(self, "
    "argument):\n"
    "        self.n = int(argument)\n        return self\n    def score_model(self, model, "
    "tokenizer, sequences):\n"
    "        raise RuntimeError('boom')\nclass N(sleb.ModelMetric):\n    name = 'nan'\n"
    "    def score_model(self, *_):\n        return float('nan')\n"
) + hook("metrics", "return [M(), N()]")


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("m", "raised RuntimeError: boom (raising.py, line 8)"),
        ("m:1", "boom"),
        ("m:x", "ValueError"),
        (
            "nan",
            "as NaN or infinite, such as block 1, although the model without it computes finite "
            "numbers",
        ),
    ],
)
def test_an_error_raised_in_a_plugin_names_the_plugin(
    run_sleb, plugins, as_plugins, tiny_llama, text_file, metric, said
):
    plugins(raising=RAISING)
    as_plugins("raising")
    result = run_sleb(
        "search", tiny_llama, "--remove", 1, *calibration(text_file), "--metric", metric
    )
    assert result.exit_code == 6
    shown = " ".join(result.stderr.split())
    assert f"The metric '{metric[0]}" in shown
    assert said in shown
    assert "Traceback" not in shown


COPYING = """
import copy

class M(sleb.ModelMetric):
    name, argument, n = "m", "[N]", 0

    def with_argument(self, argument):
        new = copy.copy(self)
        try:
            new.n = self.read(argument)
        except ValueError:
            new.n = 7
        return new

    def read(self, argument):
        return int(argument)

    def score_model(self, *_):
        return self.n

@sleb.hookimpl
def sleb_metrics():
    return [M()]
"""


def test_a_metric_that_copies_itself_keeps_its_argument_and_catches_its_own_errors(plugins):
    registry = load_plugins(plugins(copying=COPYING))
    scores = {
        name: registry.metric(name).score_model(None, None, None)
        for name in ("m", "m:3", "m:5", "m:x")
    }
    assert scores == {"m": 0, "m:3": 3, "m:5": 5, "m:x": 7}


STATES, USE = torch.ones(2, 4, 8), ExpertUse(*torch.ones(6, 8))
CALLS = {
    "LogitMetric": lambda metric: metric.score_tokens(STATES[0], STATES[0, :, 0].long(), None),
    "HiddenStateMetric": lambda metric: metric.score_tokens(STATES, STATES),
    "WeightMetric": lambda metric: metric.score_block(None, 0),
    "ExpertMetric": lambda metric: metric.score_experts(USE, 0),
    "ModelMetric": lambda metric: metric.with_argument("2").fingerprint(),
    "Exporter": lambda exporter: exporter.export(SimpleNamespace(output=None)),
    "Engine": lambda engine: engine.load(None, None).run([[1]], 2),
}
SHAPE = "not a number for each position: a tensor of shape"
RUN = "class L(sleb.LoadedModel):\n        run = close = lambda *_: {}\n    load = lambda *_: M.L()"


@pytest.mark.parametrize(
    ("base", "body", "said"),
    [
        (
            "LogitMetric",
            "score_tokens = lambda _, logits, *more: logits[:, 0] * float('nan')",
            f"returned a float32 Tensor of shape (4,) with NaN or infinity from score_tokens, "
            f"{SHAPE} (4,)",
        ),
        (
            "HiddenStateMetric",
            "score_tokens = lambda *given: given[1]",
            f"(2, 4, 8) from score_tokens, {SHAPE} (2, 4)",
        ),
        (
            "HiddenStateMetric",
            "score_tokens = lambda *_: [1, 2]",
            f"returned a list of 2 from score_tokens, {SHAPE}",
        ),
        (
            "WeightMetric",
            "score_block = lambda *_: float('nan')",
            "returned nan from score_block, not a number",
        ),
        (
            "ExpertMetric",
            "score_experts = lambda _, use, block: use.norms[1:]",
            "(7,) from score_experts, not a",
        ),
        (
            "ModelMetric",
            "with_argument = score_model = lambda *_: 1",
            "returned 1 from with_argument, not a metric",
        ),
        (
            "ModelMetric",
            "with_argument = score_model = fingerprint = lambda m, *_: m",
            "from fingerprint, not a str",
        ),
        (
            "ModelMetric",
            "with_argument, score_model = lambda m, _: m, 0\n"
            "    fingerprint = lambda m: 'a\\ud800'",
            r"returned 'a\ud800' from fingerprint, not text of whole characters",
        ),
        (
            "WeightMetric",
            "score_block = lambda *_: exit('no licence')",
            "raised SystemExit: no licence (mistaken.py, line 5)",
        ),
        ("Exporter", "export = lambda *_: b''", "returned b'' from export, not a str"),
        ("Engine", "load = lambda *_: None", "returned None from load, not a LoadedModel"),
        (
            "Engine",
            RUN.format("0.1"),
            "returned 0.1 from run, not a TimedRun of more than 0 seconds, with 2",
        ),
        ("Engine", RUN.format("sleb.TimedRun(1.0, (0.5,))"), "(0.5,)) from run, not a TimedRun"),
        ("Engine", RUN.format("sleb.TimedRun(0.0, (0.0, 0.0))"), "from run, not a TimedRun"),
        (
            "Engine",
            RUN.format("1 / 0"),
            "raised ZeroDivisionError: division by zero (mistaken.py, line 6)",
        ),
    ],
)
def test_a_wrong_value_from_a_plugin_names_the_plugin(plugins, base, body, said):
    kind = {"Exporter": "exporter", "Engine": "engine"}.get(base, "metric")
    source = f"\nclass M(sleb.{base}):\n    name, reads = 'm', 'gguf'\n    {body}\n"
    offer = load_plugins(plugins(mistaken=source + hook(f"{kind}s", "return [M()]"))).choose(
        kind, "m"
    )
    with pytest.raises(
        PluginError, match=rf"^The {kind} 'm' of unknown package \? .*{re.escape(said)}"
    ):
        CALLS[base](offer.value)


WRITING = """
class M(sleb.HiddenStateMetric):
    name = "m"

    def score_tokens(self, entering, leaving):
        larger = leaving.zero_().add(entering)[..., 0] > 0
        return larger.to_sparse()

class E(sleb.ExpertMetric):
    name = "e"

    def score_experts(self, use, block):
        return use.norms.zero_() > 0
"""


def test_a_metric_writes_into_copies_and_may_return_sparse_tensors_and_booleans(plugins):
    registry = load_plugins(plugins(writing=WRITING + hook("metrics", "return [M(), E()]")))
    scores = registry.metric("m").score_tokens(STATES, STATES)
    assert scores.dtype is torch.float32
    assert scores.tolist() == torch.ones(2, 4).tolist()
    assert registry.metric("e").score_experts(USE, 0).tolist() == [0.0] * 8
    assert STATES.min() == USE.norms.min() == 1


def test_an_error_raised_in_a_family_names_the_family(plugins):
    source = FAMILY.format(name="f", type="t").replace(
        "'a.b'", "'a.b', config_keys={'k': lambda value, kept: 1 / 0}"
    )
    with pytest.raises(
        PluginError, match=r"^The family 'f' of unknown package \? raised ZeroDivisionError"
    ):
        load_plugins(plugins(keyed=source)).family("t").config_keys["k"](1, None)

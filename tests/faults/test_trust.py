"""Nothing from outside runs as code, unless the user said so, and then only the code that was there at the time."""

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sleb_cli
import sleb_plugins
from conftest import calibration, llama_config, save_model
from faults.arrangements import with_a_bug
from faults.conftest import counts
from faults.lies import Runs
from sleb_cli import plugin_manager

TOKEN, PASSWORD = "hf_" + "Canary" * 5, "s3cretCanary"
TRUST = "--trust-remote-code"


def payloads(canary):
    """Objects whose unpickling would leave a file at `canary`, by kind."""
    touch = f"open({str(canary)!r}, 'w')"
    inner = pickle.dumps(Runs(os.system, f"touch {canary}"))
    return {
        "system": Runs(os.system, f"touch {canary}"),
        "eval": Runs(eval, touch),
        "exec": Runs(exec, touch),
        "open": Runs(open, str(canary), "w"),
        "process": Runs(subprocess.Popen, ["touch", str(canary)]),
        "pickle in a pickle": Runs(pickle.loads, inner),
        "storage": Runs(torch.storage._load_from_bytes, inner),
        "torch.load": Runs(torch.load, str(canary)),
    }


def pickled(folder, model, content=None, form="zip"):
    """Copy a model whose tensors are a pickle, with more `content` beside them, alone, bare, or in a shard."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if form == "shard" else "pytorch_model.bin"
    data = content if form == "alone" else tensors | ({} if content is None else {"more": content})
    if form == "bare":
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(data, folder / name, _use_new_zipfile_serialization=form != "legacy")
    if form == "shard":
        index = {"weight_map": dict.fromkeys(tensors, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


COMMANDS = (("search", "--remove", 1, "--calibration", "self"), ("apply", "--blocks", 1, "-o", "out"), ("eval",))


@counts(5, 120)
def test_nothing_in_a_pickle_runs(run_sleb, tiny_llama, tmp_path, count, tried):
    canary = tmp_path / "canary"
    forms = ("zip", "legacy", "alone", "bare", "shard")
    cases = [(kind, form, command) for command in COMMANDS for form in forms for kind in payloads(canary)]
    assert len(cases) == 120
    for kind, form, command in cases[:: len(cases) // count]:
        folder = pickled(tmp_path / "model", tiny_llama, payloads(canary)[kind], form)
        result = run_sleb(command[0], folder, *command[1:])
        assert result.exit_code == 4, (kind, form, command, result.stderr)
        assert "pytorch_model" in result.stderr
        assert os.listdir() == ["model"], (kind, form, command)
        shutil.rmtree(folder)
    tried("pickles that would run code", count)


def test_the_payloads_would_run_where_nothing_stops_them(tmp_path):
    canary = tmp_path / "canary"
    for kind, payload in payloads(canary).items():
        if kind != "torch.load":  # which reads what is not there
            with contextlib.suppress(RuntimeError):  # torch finds no tensors, after it has run the payload
                found = pickle.loads(pickle.dumps(payload))
                if isinstance(found, subprocess.Popen):
                    found.wait()
            canary.unlink()


def test_pickles_are_named(run_sleb, tiny_llama, tmp_path):
    result = run_sleb("apply", pickled(tmp_path / "model", tiny_llama), "--blocks", 1, "-o", "out", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "pytorch_model.bin" in result.stderr


def test_every_reader_of_pickles_and_code_is_a_safe_one():
    wrong, loads = [], 0
    files = [file for package in (sleb_cli, sleb_plugins) for file in Path(package.__file__).parent.rglob("*.py")]
    for file in files:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                name, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
                loads += name == "torch.load"
                unsafe = name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "pickle.load")
                unsafe |= "allow_pickle" in options or (name == "torch.load" and options.get("weights_only") != "True")
                unsafe |= name == "pickle.loads" and file.name != "process_group.py"
                if name.startswith("Auto") and name.endswith(".from_pretrained"):
                    unsafe |= options.get("trust_remote_code") not in ("False", "source.trust_remote_code")
                wrong += [f"{file.name}:{call.lineno} calls {name}"] if unsafe else []
    assert loads
    assert wrong == []


CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({canary!r}).touch()

class MineConfig(LlamaConfig):
    model_type = {model_type!r}

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""
AUTO_MAP = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}


@pytest.fixture
def own_code(tmp_path):
    """Save a model with code of its own, that leaves a file when it runs."""

    def save(model_type="mine", auto_map=AUTO_MAP):
        folder = save_model(tmp_path / "mine", llama_config(4))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))
        (folder / "mine.py").write_text(CODE.format(canary=str(tmp_path / "canary"), model_type=model_type))
        return folder

    return save


@pytest.fixture
def sleb(program, tmp_path):
    """Run a command, which must end with this exit code, and say this, and run the model's code or not."""

    def run(*words, code=0, runs=False, says=""):
        environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        result = program.run(*words, cwd=tmp_path, codes=[code], environment=environment)
        assert says in result.stderr
        canary = tmp_path / "canary"
        assert canary.exists() == runs, result.stderr
        canary.unlink(missing_ok=True)
        return result

    return run


def test_the_code_of_a_plan_is_required_by_every_command(sleb, own_code, text_file, tmp_path):
    folder = own_code()
    search = ["search", folder, "--remove", 1, *calibration(text_file), "--sample-tokens", 4]
    sleb(*search, code=4)
    sleb(*search, TRUST, runs=True)
    plan, code = json.loads((tmp_path / "plan.json").read_text()), (folder / "mine.py").read_text()
    commands = (
        ("apply", "plan.json", "-o", "out"),
        ("eval", "plan.json", "--perplexity", text_file, "--sequence-length", 32, "--max-windows", 2),
        ("bench", "plan.json"),
        ("export", "plan.json", "--to", "indices"),
        ("search", folder, "--extend", "plan.json", "--remove", 2, "--sample-tokens", 4),
    )
    for command in commands:  # a plan grants no trust
        sleb(*command, code=4, says=TRUST)
    sleb(*commands[0], TRUST, runs=True)
    published = json.loads((tmp_path / "out" / "sleb_plan.json").read_text())
    assert published["model"]["code"] == plan["model"]["code"]
    for file, content in (("mine.py", code + "\n"), ("more.py", "")):
        (folder / file).write_text(content)
        for command in commands[:: 1 if file == "mine.py" else 4]:
            sleb(*command, TRUST, code=3, says="code")
        (folder / "mine.py").write_text(code)
    (folder / "more.py").unlink()
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"model": plan["model"] | {"code": None}}))
    sleb(*commands[0], TRUST, "--force", code=3, says="code")


def test_numbers_are_those_of_the_code_as_it_is(sleb, own_code, text_file):
    folder = own_code()

    def perplexity():
        command = ("eval", folder, "--perplexity", text_file, "--sequence-length", 32, "--max-windows", 2, "--json")
        found = sleb(*command, TRUST, runs=True)
        return json.loads(found.stdout)["texts"][0]["dense"]["perplexity"], "cached" in found.stderr

    first = perplexity()
    assert perplexity() == (first[0], True)
    with (folder / "mine.py").open("a") as code:
        code.write("\n    def forward(self, input_ids, **options):")
        code.write("\n        return super().forward(input_ids // 2, **options)\n")
    changed, cached = perplexity()
    assert not cached
    assert changed != first[0]


def test_code_that_is_not_needed_runs_only_where_it_is_trusted(sleb, own_code):
    sleb("apply", own_code(model_type="llama"), "--blocks", 1, "-o", "out", "--no-verify")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_never_runs(sleb, own_code, file):
    folder = own_code()
    settings = json.loads((folder / file).read_text())
    elsewhere = {"AutoConfig": "evil/code--mine.MineConfig", "AutoTokenizer": ["evil/code--mine.Tokenizer", None]}
    (folder / file).write_text(json.dumps(settings | {"auto_map": AUTO_MAP | elsewhere}))
    sleb("apply", folder, "--blocks", 1, TRUST, code=4, says="evil/code")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_names_no_compiled_code(run_sleb, tmp_path, key):
    folder = save_model(tmp_path / "model", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    for value in ("evil/kernel", {"": "sdpa", "text_config": "evil/kernel@main"}):
        for changed in ({key: value}, {"more": {key: value}}):
            (folder / "config.json").write_text(json.dumps(config | changed))
            result = run_sleb("apply", folder, "--blocks", 1)
            assert result.exit_code == 4, result.stderr
            assert "evil/kernel" in result.stderr


@pytest.mark.parametrize("metric", ["task:task.yaml", "task:{}/task.yaml:5", "0.5*task:task.yml:5+nll"])
def test_a_plan_names_no_code(run_sleb, tiny_llama, llama_plan, tmp_path, metric):
    plan = json.loads(llama_plan.read_text())
    (tmp_path / "task.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\ndef f(doc):\n    return ''\n")
    (tmp_path / "task.yaml").write_text("task: mine\ndataset_path: json\ndoc_to_text: !function task.f\n")
    changed = plan | {"search": plan["search"] | {"metric": metric.format(tmp_path), "metrics": {}}}
    (tmp_path / "evil.json").write_text(json.dumps(changed))
    result = run_sleb("search", tiny_llama, "--extend", "evil.json", "--remove", 3)
    assert result.exit_code == 3, result.stderr
    assert "task" in result.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("revision", ["main", "../../../x", "a" * 39, "refs/pr/1", "A" * 40, "a" * 40 + "\n"])
def test_a_plan_names_a_commit(run_sleb, llama_plan, revision):
    plan = json.loads(llama_plan.read_text())
    llama_plan.write_text(json.dumps(plan | {"model": plan["model"] | {"revision": revision}}))
    result = run_sleb("apply", llama_plan)
    assert result.exit_code == 3, result.stderr
    assert "model.revision" in result.stderr


def test_plugins_of_other_packages_are_named_before_they_run(run_sleb, tmp_path, monkeypatch):
    (tmp_path / "loud_plugin.py").write_text("import sys\nprint('here I run', file=sys.stderr)\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = plugin_manager.entry_points
    commands = (("plugins",), ("export", tmp_path, "--to", "indices"))
    assert [command for command in commands if "Loading plugins" in run_sleb(*command).stderr] == []
    loud = EntryPoint("loud", "loud_plugin", "sleb")
    monkeypatch.setattr(plugin_manager, "entry_points", lambda group: [*real(group=group), loud])
    for command in commands:
        sys.modules.pop("loud_plugin", None)
        told = run_sleb(*command).stderr
        assert 0 <= told.find("loud_plugin") < told.find("here I run"), told


@pytest.mark.parametrize("environment", [{}, {"HF_TOKEN": "other-Canary-token"}], ids=["pattern", "variable"])
def test_a_traceback_holds_no_token(program, tmp_path, environment):
    arranged = (with_a_bug, PASSWORD, environment.get("HF_TOKEN", TOKEN))
    result = program.run("apply", "plan.json", cwd=tmp_path, environment=environment, before=arranged, codes=None)
    assert result.exit_code == 1
    assert result.stderr.count("Traceback (most recent call last)") == 2
    assert "hub.example" in result.stderr
    assert "Canary" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("verb", "status"),
    [("apply", 500), *(pytest.param(*each, marks=pytest.mark.faults) for each in (("apply", None), ("search", 401)))],
)
def test_a_failed_download_shows_no_token(hub, tmp_path, verb, status):
    hub.refuses = {"/": status}
    port = hub.server_port if status else 9
    environment = os.environ | {
        "HF_ENDPOINT": f"http://jane:{PASSWORD}@127.0.0.1:{port}", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    words = [
        sys.executable,
        "-m",
        "sleb_cli",
        verb,
        "org/model",
        {"apply": "--blocks", "search": "--remove"}[verb],
        "1",
    ]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 4, result.stderr
    assert "127.0.0.1" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Canary" not in result.stdout + result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"Canary" in path.read_bytes()]


PUBLISHED = (
    "sleb_cli sleb_plugins tests completions docs README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md LICENSE "
    "pyproject.toml .gitignore"
).split()


def build(folder, kind, *, umask, times):
    """Build what is published, from a copy of the checkout in another folder."""
    root, before = Path(__file__).resolve().parents[2], os.umask(umask)
    try:
        for path in [path for name in PUBLISHED for path in (root / name, *(root / name).rglob("*")) if path.is_file()]:
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (times, times))
        environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
        words = (sys.executable, "-m", "hatchling", "build", "-t", kind)
        subprocess.run(words, cwd=folder, check=True, capture_output=True, env=environment)
    finally:
        os.umask(before)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_published_is_built_the_same_anywhere(tmp_path, kind):
    one = build(tmp_path / "a", kind, umask=0o022, times=1_000_000_000)
    two = build(tmp_path / "elsewhere" / "b", kind, umask=0o077, times=1_500_000_000)
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())
    if kind == "wheel":
        names = zipfile.ZipFile(one).namelist()
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sleb_cli", "sleb_plugins", "sleb"}
        kinds = {Path(name).suffix for name in names if name.startswith("sleb_")}
        assert kinds <= {".py", ".typed", ".yaml", "", ".j2", ".css", ".js"}
        assert [name for name in names if "test" in name] == []
    else:
        with tarfile.open(one) as archive:
            names = archive.getnames()
        assert {name.split("/")[1] for name in names} == {*PUBLISHED, "PKG-INFO"}
    assert [name for name in names if "__pycache__" in name] == []

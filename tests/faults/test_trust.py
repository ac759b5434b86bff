"""Nothing from outside runs as code, unless the user said so, and then only the code that was there at the time."""

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sleb_cli
import sleb_plugins
from conftest import calibration, llama_config, save_model
from faults.conftest import counts
from sleb_cli import plugin_manager

TOKEN = "hf_" + "Canary" * 5
PASSWORD = "s3cretCanary"


class Runs:
    """A pickle of it calls `function` when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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


def pickled_model(folder, tiny_llama, canary, kind, form):
    """Save a model whose weights hold a payload: beside tensors or in their place, as a zip file, bare, or a shard."""
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    content = payloads(canary)[kind] if form == "alone" else tensors | {"more": payloads(canary)[kind]}
    name = "pytorch_model-00001-of-00001.bin" if form == "shard" else "pytorch_model.bin"
    if form == "bare":
        (folder / name).write_bytes(pickle.dumps(content["more"]))
    else:
        torch.save(content, folder / name, _use_new_zipfile_serialization=form != "legacy")
    if form == "shard":
        index = {"weight_map": dict.fromkeys(tensors, name)}
        (folder / f"{name.partition('-')[0]}.bin.index.json").write_text(json.dumps(index))
    return folder


FORMS = ("zip", "legacy", "alone", "bare", "shard")
COMMANDS = (("search", "--remove", 1, "--calibration", "self"), ("apply", "--blocks", 1, "-o", "out"), ("eval",))


@counts(5, 120)
def test_nothing_in_a_pickle_runs(program, tiny_llama, tmp_path, count, tried):
    kinds = list(payloads(tmp_path))
    cases = [(kind, form, command) for command in COMMANDS for form in FORMS for kind in kinds]
    assert len(cases) == 120
    for kind, form, command in cases[:: len(cases) // count]:
        canary = tmp_path / "canary"
        folder = pickled_model(tmp_path / "model", tiny_llama, canary, kind, form)
        result = program.run(command[0], folder, *command[1:], cwd=tmp_path)
        case = (kind, form, command[0], result.stderr)
        assert result.exit_code == 4, case
        assert "is not safe to read" in result.stderr, case
        assert "Traceback" not in result.stderr, case
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], case
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
            assert canary.exists(), kind
            canary.unlink()


def test_pickles_are_named(program, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    result = program.run("apply", "model", "--blocks", 1, "-o", "out", cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "is stored as pickles (pytorch_model.bin); only tensors are read from them" in result.stderr


def test_every_reader_of_pickles_and_code_is_a_safe_one():
    wrong, loads = [], 0
    for package in (sleb_cli, sleb_plugins):
        for file in Path(package.__file__).parent.rglob("*.py"):
            for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call):
                    continue
                name, where = ast.unparse(call.func), f"{file.name}:{call.lineno}"
                options = {word.arg: ast.unparse(word.value) for word in call.keywords}
                loads += name == "torch.load"
                if name == "torch.load" and options.get("weights_only") != "True":
                    wrong.append(f"{where} loads a pickle with code")
                if name in ("pickle.load", "pickle.loads") and file.name != "process_group.py":
                    wrong.append(f"{where} reads a pickle")
                if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load") or "allow_pickle" in options:
                    wrong.append(f"{where} calls {name}")
                if name.startswith("Auto") and name.endswith(".from_pretrained"):
                    trusted = options.get("trust_remote_code")
                    if trusted not in ("False", "source.trust_remote_code"):
                        wrong.append(f"{where} leaves open whether code is trusted")
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

    def save(name="mine", model_type="mine", auto_map=AUTO_MAP):
        folder = save_model(tmp_path / name, llama_config(4))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))
        (folder / "mine.py").write_text(CODE.format(canary=str(tmp_path / "canary"), model_type=model_type))
        return folder

    return save


def ran(tmp_path):
    """Whether the model's code has run since the last call."""
    canary = tmp_path / "canary"
    found = canary.exists()
    canary.unlink(missing_ok=True)
    return found


def test_the_code_of_a_plan_is_required_by_every_command(program, own_code, text_file, tmp_path):
    def sleb(*arguments):
        return program.run(*arguments, cwd=tmp_path, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})

    folder, trust = own_code(), "--trust-remote-code"
    search = ["search", folder, "--remove", 1, *calibration(text_file), "--sample-tokens", 4, "-o", "plan.json"]
    refused = sleb(*search)
    assert (refused.exit_code, ran(tmp_path)) == (4, False), refused.stderr
    found = sleb(*search, trust)
    assert (found.exit_code, ran(tmp_path)) == (0, True), found.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["model"]["code"]) == 64
    commands = (
        ("apply", "plan.json", "-o", "out"),
        ("eval", "plan.json", "--perplexity", text_file, "--sequence-length", 32, "--max-windows", 2),
        ("bench", "plan.json"),
        ("export", "plan.json", "--to", "indices"),
        ("search", folder, "--extend", "plan.json", "--remove", 2, "--sample-tokens", 4),
    )
    for command in commands:  # a plan grants no trust
        refused = sleb(*command)
        assert (refused.exit_code, ran(tmp_path)) == (4, False), (command, refused.stderr)
        assert "run it with --trust-remote-code" in refused.stderr
    again = sleb(*commands[0], trust)
    assert (again.exit_code, ran(tmp_path)) == (0, True), again.stderr
    published = json.loads((tmp_path / "out" / "sleb_plan.json").read_text())
    assert published["model"]["code"] == plan["model"]["code"]
    code = (folder / "mine.py").read_text()
    for changed in (lambda: (folder / "mine.py").write_text(code + "\n"), lambda: (folder / "more.py").write_text("")):
        changed()
        for command in commands:
            refused = sleb(*command, trust)
            assert (refused.exit_code, ran(tmp_path)) == (3, False), (command, refused.stderr)
            assert "was made with other Python code than" in refused.stderr
        (folder / "mine.py").write_text(code)
    (folder / "more.py").unlink()
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"model": plan["model"] | {"code": None}}))
    refused = sleb(*commands[0], trust, "--force")
    assert (refused.exit_code, ran(tmp_path)) == (3, False), refused.stderr
    assert "was made without the Python code that comes with" in refused.stderr


def test_numbers_are_those_of_the_code_as_it_is(program, own_code, text_file, tmp_path):
    folder = own_code()

    def perplexity():
        command = ("eval", folder, "--perplexity", text_file, "--sequence-length", 32, "--max-windows", 2, "--json")
        environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        found = program.run(*command, "--trust-remote-code", cwd=tmp_path, environment=environment)
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)["texts"][0]["dense"]["perplexity"], "cached" in found.stderr

    first = perplexity()
    assert perplexity() == (first[0], True)
    with (folder / "mine.py").open("a") as code:
        code.write("\n    def forward(self, input_ids, **options):")
        code.write("\n        return super().forward(input_ids // 2, **options)\n")
    changed, cached = perplexity()
    assert not cached
    assert changed != first[0]


def test_code_that_is_not_needed_runs_only_where_it_is_trusted(program, own_code, tmp_path):
    folder = own_code(model_type="llama")
    result = program.run("apply", folder, "--blocks", 1, "-o", "out", cwd=tmp_path)
    assert (result.exit_code, ran(tmp_path)) == (0, False), result.stderr


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_never_runs(program, own_code, tmp_path, file):
    folder = own_code()
    settings = json.loads((folder / file).read_text())
    elsewhere = {"AutoConfig": "evil/code--mine.MineConfig", "AutoTokenizer": ["evil/code--mine.Tokenizer", None]}
    (folder / file).write_text(json.dumps(settings | {"auto_map": AUTO_MAP | elsewhere}))
    result = program.run("apply", folder, "--blocks", 1, "--trust-remote-code", cwd=tmp_path)
    assert (result.exit_code, ran(tmp_path)) == (4, False), result.stderr
    assert "names Python code of another repository, evil/code" in result.stderr


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_names_no_compiled_code(program, tmp_path, key):
    folder = save_model(tmp_path / "model", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    for value in ("evil/kernel", {"": "sdpa", "text_config": "kernels-community/other@main"}):
        for changed in ({key: value}, {"more": {key: value}}):
            (folder / "config.json").write_text(json.dumps(config | changed))
            result = program.run("apply", folder, "--blocks", 1, cwd=tmp_path)
            assert result.exit_code == 4, result.stderr
            assert "names code to be downloaded and run" in result.stderr


def test_a_plan_names_no_code(program, tiny_llama, text_file, tmp_path):
    search = ["search", tiny_llama, "--remove", 1, *calibration(text_file), "--sample-tokens", 4]
    assert program.run(*search, cwd=tmp_path).exit_code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "task.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\ndef f(doc):\n    return ''\n")
    (tmp_path / "task.yaml").write_text("task: mine\ndataset_path: json\ndoc_to_text: !function task.f\n")
    for metric in ("task:task.yaml", f"task:{tmp_path}/task.yaml:5", "0.5*task:task.yml:5+nll"):
        changed = plan | {"search": plan["search"] | {"metric": metric, "metrics": {}}}
        (tmp_path / "evil.json").write_text(json.dumps(changed))
        result = program.run("search", tiny_llama, "--extend", "evil.json", "--remove", 2, cwd=tmp_path)
        assert (result.exit_code, ran(tmp_path)) == (3, False), result.stderr
        assert "a task file may run code" in result.stderr


@pytest.mark.parametrize("revision", ["main", "../../../x", "a" * 39, "refs/pr/1", "A" * 40, "a" * 40 + "\n"])
def test_a_plan_names_a_commit(program, tiny_llama, text_file, tmp_path, revision):
    search = ["search", tiny_llama, "--remove", 1, *calibration(text_file), "--sample-tokens", 4]
    assert program.run(*search, cwd=tmp_path).exit_code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"model": plan["model"] | {"revision": revision}}))
    result = program.run("apply", cwd=tmp_path)
    assert result.exit_code == 3, result.stderr
    assert "model.revision" in result.stderr


def test_plugins_of_other_packages_are_named_before_they_run(run_sleb, tmp_path, monkeypatch):
    (tmp_path / "loud_plugin.py").write_text("import sys\nprint('here I run', file=sys.stderr)\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = plugin_manager.entry_points
    loud = EntryPoint("loud", "loud_plugin", "sleb")
    quiet = [run_sleb("plugins").stderr, run_sleb("export", tmp_path, "--to", "indices").stderr]
    assert [text for text in quiet if "Loading plugins" in text] == []
    monkeypatch.setattr(plugin_manager, "entry_points", lambda group: [*real(group=group), loud])
    for command in (("plugins",), ("export", tmp_path, "--to", "indices")):
        sys.modules.pop("loud_plugin", None)
        told = run_sleb(*command).stderr
        assert 0 <= told.find("(loud_plugin).") < told.find("here I run"), told


def crash(secret):
    """Run the program with a bug in it whose message holds secrets; a test calls this in another process."""
    from sleb_cli import __main__, api

    def fail(*arguments):
        held = secret  # a traceback with local variables would show it
        try:
            raise OSError(f"GET https://jane:{PASSWORD}@hub.example/x?X-Amz-Signature={PASSWORD}&b=1 {held}")
        except OSError as error:
            raise RuntimeError(f"Authorization: Bearer {held}") from error

    api.apply = fail
    sys.argv = ["sleb", "apply", "plan.json"]
    __main__.run()


def test_a_traceback_holds_no_token(program, tmp_path):
    for environment in ({}, {"HF_TOKEN": "other-Canary-token"}):
        secret = environment.get("HF_TOKEN", TOKEN)
        result = program.call(crash, secret, cwd=tmp_path, environment=environment)
        assert result.exit_code == 1
        assert result.stderr.count("Traceback (most recent call last)") == 2
        assert "hub.example" in result.stderr
        assert "Canary" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("apply", "org/model", "--blocks", "1"), 500),
        pytest.param(("apply", "org/model", "--blocks", "1"), None, marks=pytest.mark.faults),
        pytest.param(("search", "org/model", "--remove", "1"), 401, marks=pytest.mark.faults),
    ],
)
def test_a_failed_download_shows_no_token(tmp_path, command, status):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if status is not None:
            Thread(target=server.serve_forever).start()
        port = server.server_port if status is not None else 9
        environment = os.environ | {
            "HF_ENDPOINT": f"http://jane:{PASSWORD}@127.0.0.1:{port}", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-m", "sleb_cli", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        if status is not None:
            server.shutdown()
    assert result.returncode == 4, result.stderr
    assert "Traceback" not in result.stderr
    held = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert "127.0.0.1" in result.stderr
    assert "Canary" not in result.stdout + result.stderr
    assert [content for content in held if b"Canary" in content] == []


BUILD = (sys.executable, "-m", "hatchling", "build", "-t")


def build(folder, kind, *, umask, times):
    """Build what is published, from a copy of the checkout in another folder."""
    root = Path(__file__).resolve().parents[2]
    names = ["sleb_cli", "sleb_plugins", "tests", "completions", "docs", "pyproject.toml"]
    files = [path for name in names for path in (root / name, *(root / name).rglob("*")) if path.is_file()]
    before = os.umask(umask)
    try:
        for path in [*files, *root.glob("*.md"), root / "LICENSE", root / ".gitignore"]:
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (times, times))
        environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
        subprocess.run([*BUILD, kind], cwd=folder, check=True, capture_output=True, env=environment)
    finally:
        os.umask(before)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_published_is_built_the_same_anywhere(tmp_path, kind):
    built = [
        build(tmp_path / "a", kind, umask=0o022, times=1_000_000_000),
        build(tmp_path / "elsewhere" / "b", kind, umask=0o077, times=1_500_000_000),
    ]
    assert built[0].name == built[1].name
    assert built[0].read_bytes() == built[1].read_bytes()
    if kind == "wheel":
        names = zipfile.ZipFile(built[0]).namelist()
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sleb_cli", "sleb_plugins", "sleb"}
        kinds = {Path(name).suffix for name in names if name.startswith("sleb_")}
        assert kinds <= {".py", ".typed", ".yaml", "", ".j2", ".css", ".js"}
        assert [name for name in names if "test" in name or "__pycache__" in name] == []
    else:
        import tarfile

        with tarfile.open(built[0]) as archive:
            assert {name.split("/")[1] for name in archive.getnames()} == {
                "sleb_cli", "sleb_plugins", "tests", "completions", "docs", "README.md", "CONTRIBUTING.md",
                "CHANGELOG.md", "SECURITY.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
            }  # fmt: skip
            assert [name for name in archive.getnames() if "__pycache__" in name] == []

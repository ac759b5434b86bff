"""Nothing from outside runs as code, unless the user said so, and then only the code that was there
at the time.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from transformers import PreTrainedModel

from conftest import calibration, evaluation, llama_config, save_model
from faults.arrangements import with_a_bug, with_a_hub

TOKEN = "hf_" + "Canary" * 5
PASSWORD = "s3cretCanary"
TRUST = "--trust-remote-code"


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


def own_code(folder, model_type="mine"):
    """Save a model with code of its own, that leaves a file beside it when it runs."""
    save_model(folder, llama_config(4))
    edit_json(folder / "config.json", model_type=model_type, auto_map=AUTO_MAP)
    (folder / "mine.py").write_text(
        CODE.format(canary=str(folder.with_name("canary")), model_type=model_type)
    )
    return folder


@pytest.fixture
def run(program, tmp_path):
    """Run a command, which must end with this exit code, and say this, and run the model's code or
    not.
    """

    def run(*words, code=0, runs=False, says=""):
        environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        result = program.run(*words, cwd=tmp_path, codes=[code], environment=environment)
        assert says in result.stderr
        canary = tmp_path / "canary"
        assert canary.exists() == runs, result.stderr
        canary.unlink(missing_ok=True)
        return result

    return run


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def note_kernels(_, loaded, use_kernels, *more):
    loaded.append((use_kernels, os.environ["USE_HUB_KERNELS"]))


@pytest.mark.parametrize("trusted", [False, True])
def test_no_kernel_of_the_hub_is_swapped_in(sleb, text_file, tmp_path, monkeypatch, trusted):
    folder = (
        own_code(tmp_path / "model") if trusted else save_model(tmp_path / "model", llama_config(4))
    )
    loaded = []
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", partialmethod(note_kernels, loaded))
    monkeypatch.setenv("USE_HUB_KERNELS", "YES")
    sleb("eval", folder, "--blocks 1", *evaluation(text_file), *[TRUST] * trusted)
    assert {*loaded} == {(False, "NO")}
    assert os.environ["USE_HUB_KERNELS"] == "YES"


def test_the_code_of_a_plan_is_required_by_every_command(run, text_file, tmp_path):
    folder = own_code(tmp_path / "mine")
    search = ["search", folder, "--remove", 1, *calibration(text_file), "--sample-tokens", 4]
    run(*search, code=4)
    run(*search, TRUST, runs=True)
    apply = ("apply", "plan.json", "-o", "out")
    extend = (*search, "--extend", "plan.json", "--remove", 2)
    evaluate = ("eval", "plan.json", *evaluation(text_file))
    export = ("export", "plan.json", "--to", "mergekit")
    # A plan grants no trust.
    for command in (apply, extend, evaluate, ("bench", "plan.json"), export):
        run(*command, code=4, says=TRUST)
    run(*export, TRUST, runs=True)
    run(*apply, TRUST, runs=True)
    own = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(own + "\n")
    run(*apply, TRUST, "--force", code=3, says="code")
    (folder / "mine.py").write_text(own)
    (folder / "more.py").write_text("")
    run(*extend, TRUST, code=3, says="code")
    (folder / "more.py").unlink()
    found = json.loads(Path("plan.json").read_text())["model"]
    edit_json(Path("plan.json"), model=found | {"code": None})
    run(*apply, TRUST, "--force", code=3, says="code")
    applied = json.loads(Path("out/sleb_plan.json").read_text())
    assert applied["model"]["code"] == found["code"]


def test_code_that_is_not_needed_runs_only_where_it_is_trusted(run, tmp_path):
    run("apply", own_code(tmp_path / "mine", "llama"), "--blocks", 1, "-o", "out", "--no-verify")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_never_runs(run, tmp_path, file):
    folder = own_code(tmp_path / "mine")
    elsewhere = {"AutoConfig": "evil/code--mine.C", "AutoTokenizer": ["evil/code--mine.T", None]}
    edit_json(folder / file, auto_map=elsewhere)
    run("apply", folder, "--blocks", 1, TRUST, code=4, says="evil/code")


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_a_config_names_no_compiled_code(sleb, tmp_path, key):
    folder = save_model(tmp_path / "model", llama_config(4))
    for value in ("evil/kernel", {"": "sdpa", "text_config": "evil/kernel@main"}):
        for changed in ({key: value}, {key: None, "more": {key: value}}):
            edit_json(folder / "config.json", **changed)
            assert "evil/kernel" in sleb("apply", folder, "--blocks", 1, code=4).stderr


@pytest.mark.parametrize("revision", ["main", "../../../x", "a" * 40 + "\n"])
def test_a_plan_names_a_commit(sleb, llama_plan, revision):
    model = json.loads(llama_plan.read_text())["model"]
    edit_json(llama_plan, model=model | {"revision": revision})
    assert "model.revision" in sleb("apply", llama_plan, code=3).stderr


@pytest.mark.parametrize("token", [TOKEN, "other-Canary-token"], ids=["pattern", "variable"])
def test_a_traceback_holds_no_token(program, tmp_path, token):
    environment = {"HF_TOKEN": None if token == TOKEN else token}
    arranged = (with_a_bug, PASSWORD, token)
    result = program.run(
        "apply", "plan.json", cwd=tmp_path, environment=environment, before=arranged, codes=None
    )
    assert result.exit_code == 1
    assert result.stderr.count("Traceback (most recent call last)") == 2
    assert "hub.example" in result.stderr
    assert "Canary" not in result.stderr + result.stdout


class Refusing(BaseHTTPRequestHandler):
    """A hub that knows nobody."""

    def do_GET(self):
        self.send_error(401)

    def do_HEAD(self):
        self.send_error(401)


@pytest.fixture
def refusing():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        yield hub.server_port
        hub.shutdown()
        thread.join()


@pytest.mark.parametrize("answers", [False, True])
def test_a_failed_download_shows_no_token(program, refusing, tmp_path, answers):
    port = refusing if answers else 9
    environment = {
        "HF_ENDPOINT": f"http://jane:{PASSWORD}@127.0.0.1:{port}",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    where = {"cwd": tmp_path, "environment": environment, "before": (with_a_hub,)}
    result = program.run("apply", "org/model", "--blocks", 1, codes=[4], **where)
    assert ("127.0.0.1" if answers else "Connection refused") in result.stderr
    assert "Canary" not in result.stdout + result.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"Canary" not in path.read_bytes()


PUBLISHED = """
sleb_cli sleb_plugins tests completions docs pyproject.toml .gitignore PKG-INFO
README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff SECURITY.md LICENSE
""".split()


def test_what_is_published_is_the_program_its_tests_and_its_pages(tmp_path):
    words = (sys.executable, "-m", "hatchling", "build", "-d", tmp_path)
    subprocess.run(words, cwd=Path(__file__).resolve().parents[2], check=True, capture_output=True)
    (wheel_file,) = tmp_path.glob("*.whl")
    (sdist_file,) = tmp_path.glob("*.tar.gz")
    wheel = zipfile.ZipFile(wheel_file).namelist()
    packages = {re.split("[-/]", name)[0] for name in wheel}
    assert packages == {"sleb_cli", "sleb_plugins", "sleb"}
    kinds = {Path(name).suffix for name in wheel if name.startswith("sleb_")}
    assert kinds <= {".py", ".typed", ".yaml", "", ".j2", ".css", ".mplstyle", ".js"}
    with tarfile.open(sdist_file) as archive:
        names = archive.getnames()
    assert {name.split("/")[1] for name in names} == {*PUBLISHED}
    assert not any("__pycache__" in name for name in [*wheel, *names])

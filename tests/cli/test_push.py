"""`sleb apply --push`, against a hub of a few routes on this machine."""

import hashlib
import json
import os
import re
import threading
from pathlib import Path

import huggingface_hub
import pytest

from conftest import calibration, llama_config, save_model, weight_bytes_of, weights_of
from hub import JANE, Hub
from sleb_cli.plan import read_plan


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "good")
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": server.address}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def push(run_sleb, tiny_llama, tmp_path, hub):
    """Push to the hub, by default the tiny Llama without a block; give the result, and require what was written."""

    def run(*options, repo="acme/small", of=(tiny_llama, "--blocks", "1", "--no-verify"), code=0, says=""):
        result = run_sleb("apply", *of, "-o", "out", "--push", repo, *options)
        assert (result.exit_code, says in result.stderr) == (code, True), result.stderr
        return result

    return run


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def naming(hub, *places):
    """Return the names of the files on the hub in which one of these places of this machine is named."""
    return [name for name, content in hub.files.items() if any(str(place).encode() in content for place in places)]


@pytest.mark.parametrize("options", [(), ("--public",)])
def test_what_was_written_goes_to_the_hub_private_unless_told(push, tmp_path, hub, options):
    def add():
        (tmp_path / "out" / ".netrc").write_text("password")
        (tmp_path / "out" / "later.txt").write_text("password")

    hub.meanwhile = add
    result = push(*options, says="Uploading to acme/small")
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("acme", "small")
    assert hub.repos["acme/small"] == ("public" if options else "private")
    local = written(tmp_path / "out")
    assert hub.files == {name: local[name] for name in local.keys() - {".netrc", "later.txt"}}
    assert "README.md" in hub.files
    weights = weight_bytes_of(tmp_path / "out").values()
    assert weights
    assert {hashlib.sha256(content).hexdigest() for content in weights} <= set(hub.objects)
    assert f"pushed to {hub.address}/acme/small" in result.stdout
    # Whether it may is asked first, and nothing is made before all is done.
    assert hub.asked.index("GET /api/whoami-v2") < hub.asked.index("POST /api/repos/create")
    assert "%|" not in result.stderr


def test_nothing_is_uploaded_if_a_file_has_changed_since_it_was_proven(push, tmp_path, hub):
    hub.meanwhile = lambda: (tmp_path / "out" / "config.json").write_text("{}")
    push(code=8, says="Not uploaded to acme/small: ")
    assert hub.files == {}


def test_what_is_uploaded_holds_no_path_of_this_machine(push, search, run_sleb, tmp_path, text_file, hub):
    folder = save_model(tmp_path / "own" / "model", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(tmp_path / "base"), "vision_config": {"_name_or_path": "org/eyes"}}
    (folder / "config.json").write_text(json.dumps(config | {"text": {"_name_or_path": f"{tmp_path}/base/"}}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": str(tmp_path / "base")}))
    (folder / "plan.eval.json.old").write_text(json.dumps({"sleb_version": "1", "model": str(folder)}))
    (folder / "plan.lm-eval").mkdir()
    (folder / "plan.lm-eval" / "results.json").write_text(json.dumps({"model": str(folder)}))
    (folder / "adapter_config.json").write_text("{}")
    search("--remove", 1, model=folder, text=f"{text_file}:2/3,self:1/3", samples=6)
    push(of=["plan.json"])
    assert hub.files == written(tmp_path / "out")
    assert "adapter_config.json" not in hub.files
    assert naming(hub, tmp_path.parent, text_file.parent, os.environ["SLEB_CACHE"]) == []
    pushed = json.loads(hub.files["config.json"])
    assert (pushed["_name_or_path"], pushed["text"]["_name_or_path"]) == ("base", "base")
    assert pushed["vision_config"]["_name_or_path"] == "org/eyes"
    assert json.loads(hub.files["tokenizer_config.json"]) == tokenizer | {"name_or_path": "base"}
    plan = read_plan(tmp_path / "out" / "sleb_plan.json")
    assert (plan.model.id, plan.calibration.source) == ("model", "prose.txt:2/3,self:1/3")
    # It is still a plan for that model, wherever that is, and nobody looks for "model" on the Hub.
    hub.asked.clear()
    result = run_sleb("apply", "out/sleb_plan.json", "-o", "again")
    assert (result.exit_code, hub.asked) == (3, [])
    assert "was made for model, and does not say where that is" in result.stderr
    assert run_sleb("apply", "out/sleb_plan.json", "-o", "again", "--model", folder).exit_code == 0
    names = {"config.json", "sleb_plan.json", "README.md", *weight_bytes_of(tmp_path / "again")}
    assert all((tmp_path / "again" / name).read_bytes() == hub.files[name] for name in names)


def test_a_recovered_checkpoint_goes_to_the_hub(push, run_sleb, llama_plan, tiny_llama, text_file, tmp_path, hub):
    recover = ["--recover", *calibration(text_file, samples=10)]
    push("--dtype", "bfloat16", of=[llama_plan, *recover])
    assert hub.files == written(tmp_path / "out")
    assert naming(hub, tiny_llama.parent, text_file.parent) == []
    assert json.loads(hub.files["sleb_plan.json"])["recovery"]["closed_form"]["fits"]
    assert b"| recovered in closed form |" in hub.files["README.md"]
    # What was pushed is a model like any other, and no longer the one of its plan.
    assert run_sleb("apply", "out", "--blocks", "1", "--no-verify", "-o", "two").exit_code == 0
    refused = run_sleb("apply", "out/sleb_plan.json", "--model", "out", "-o", "three")
    assert (refused.exit_code, "is a different model (blocks: 4, not 6" in refused.stderr) == (3, True)


@pytest.fixture
def refused(push, tmp_path):
    """Push what is refused before the work, and give what is said."""

    def run(says, *options, code=8, **where):
        said = push(*options, code=code, says=says, **where).stderr
        assert ("Writing weights" in said, os.listdir(tmp_path)) == (False, [])
        return said

    return run


def test_what_the_hub_would_not_take_is_refused_before_the_work(refused, hub, tmp_path, monkeypatch):
    for name in ("", "small", "a/b/c", "acme/sm all", "acme/..", "-/x"):
        refused(f"--push {name}", repo=name, code=2)
    assert hub.asked == []
    for owner in ("nobody", "far"):
        said = refused(f"You are jane on the Hub, but may not write to {owner}.", repo=f"{owner}/small")
        assert "Push to jane/small" in said
    hub.user = JANE | {"auth": {"accessToken": {"role": "read"}}}
    refused("is read-only")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "`hf upload acme/small FOLDER --private`" in refused("The Hub cannot be reached")
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused("does not accept your token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path.parent / "no-token"))
    assert "hf auth login" in refused("You are not logged in to the Hub")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refused("The Hub cannot be reached")


def test_weights_of_another_model_go_in_the_same_commit(push, tmp_path, hub):
    stale = [
        "model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json",
        "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json", "tf_model.h5", "consolidated.00.pth", "adapter_model.safetensors",
        "adapter_config.json", "small-Q4_K_M.gguf", "Q8/small.gguf",
        "onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth",
    ]  # fmt: skip
    kept = [
        ".gitattributes", "LICENSE", "notes.md", "images/a.png", "training_args.bin", "optimizer.pt", "rng_state_0.pth",
        "checkpoint-500/model.safetensors", "vocab.bpe", "onnx", "logs/index.json",
    ]  # fmt: skip
    hub.files = dict.fromkeys([*stale, *kept], b"old")
    result = push("--force", "--max-shard-size", "50KB", repo="acme/old")
    local = written(tmp_path / "out")
    assert len([name for name in local if name.endswith(".safetensors")]) > 1
    assert hub.files == dict.fromkeys(kept, b"old") | local
    assert hub.commits == 1
    told = " ".join(result.stderr.split())
    gone = ", ".join(sorted(name for name in stale if name not in local))
    assert f"Deleted files of another model from acme/old: {gone}." in told


def test_only_force_writes_into_a_repository_and_keeps_its_visibility(push, refused, tmp_path, hub):
    refused("acme/old already exists on the Hub", repo="acme/old")
    told = refused("acme/old is private on the Hub", "--force", "--public", repo="acme/old")
    assert "hint: Leave out --public" in told
    hub.repos["acme/old"] = "public"
    assert "hint: Add --public" in refused("acme/old is public on the Hub", "--force", repo="acme/old")
    assert hub.files == {}
    push("--force", "--public", repo="acme/old")
    assert weight_bytes_of(tmp_path / "out").keys() <= hub.files.keys()


@pytest.mark.parametrize(
    ("step", "status"), [("repos/create", 403), ("/store/", 403), ("/commit/", 403), ("validate-yaml", 400)]
)
def test_a_failed_upload_loses_nothing(push, tmp_path, hub, step, status):
    hub.refuses[step] = status
    result = push(code=8, says="out is complete, but was not uploaded to acme/small")
    assert "`hf upload acme/small out --private`" in result.stderr
    assert weights_of(tmp_path / "out")
    assert hub.files == {}


TOKEN = "hf_" + "Canary" * 5
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("", "Uploading to acme/small"),
        ("/store/", rf"while uploading '{WEIGHTS}' to the Hub\."),
        ("whoami", "The Hub does not accept your token"),
    ],
)
def test_a_token_appears_nowhere(run_sleb, search, text_file, tmp_path, hub, monkeypatch, refused, message):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    search("--remove", 1)
    if refused:
        hub.refuses[refused] = 403
        # Errors of the client name the address.
        monkeypatch.setenv("HF_ENDPOINT", hub.address.replace("://", f"://jane:{TOKEN}@"))
    results = [
        run_sleb("apply", "-o", "out", "--no-verify", "--push", "acme/small"),
        run_sleb("eval", "--perplexity", text_file, "--sequence-length", 32, "--max-windows", 2, "-o", "eval.json"),
        run_sleb("export", "--to", "summary", "-o", "summary.md"),
    ]
    assert [result.exit_code for result in results] == [8 if refused else 0, 0, 0], results[0].stderr
    assert re.search(message, results[0].stderr)
    places = (tmp_path, Path(os.environ["SLEB_CACHE"]))
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"plan.json", "eval.json", "plan.eval.json", "summary.md"}
    # Refused before the work, or once the checkpoint is there.
    assert any(re.fullmatch(WEIGHTS, name) for name in names) == (refused != "whoami")
    shown = [(result.stdout + result.stderr).encode() for result in results]
    held = [path.read_bytes() for path in files]
    assert [text for text in (*shown, *held, *hub.files.values()) if b"Canary" in text] == []

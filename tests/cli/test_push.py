"""`sleb apply --push`, against a hub of a few routes on this machine."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from safetensors.torch import load_file

from conftest import calibration, llama_config, save_model
from sleb_cli.plan import read_plan

JANE = {
    "type": "user",
    "name": "jane",
    "orgs": [{"name": "acme", "roleInOrg": "write"}, {"name": "far", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"role": "write", "displayName": "t"}},
}


class Hub(ThreadingHTTPServer):
    """What was asked of it, and what it holds."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.user, self.created, self.files, self.objects = JANE, [], {}, {}
        self.repos, self.asked, self.refuses, self.commits = {"acme/old": "private"}, [], {}, 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, data, status=200, **headers):
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        routes = {
            "/api/whoami-v2": self.whoami, "/api/repos/create": self.create, "/preupload/": self.modes,
            "/info/lfs/objects/batch": self.batch, "/store/": self.store, "/commit/": self.commit, "/tree/": self.tree,
            "/api/validate-yaml": self.validate,
            "": self.repo,
        }  # fmt: skip
        refused = [status for part, status in hub.refuses.items() if part in path]
        if refused:
            self.reply({"error": "not today"}, refused[0])
        else:
            next(route for part, route in routes.items() if part in path)(hub, path, body)

    def whoami(self, hub, path, body):
        known = self.headers.get("Authorization") == "Bearer good"
        self.reply(hub.user) if known else self.reply({"error": "Invalid token"}, 401)

    def create(self, hub, path, body):
        asked = json.loads(body)
        hub.created.append(asked)
        visibility = asked.get("visibility") or {True: "private", False: "public"}[asked["private"]]
        hub.repos.setdefault(f"{asked['organization']}/{asked['name']}", visibility)
        self.reply({"url": f"{hub.address}/{asked['organization']}/{asked['name']}"})

    def modes(self, hub, path, body):
        paths = [file["path"] for file in json.loads(body)["files"]]
        large = {True: "lfs", False: "regular"}
        modes = [(path, large[path.endswith(".safetensors")]) for path in paths]
        self.reply({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def batch(self, hub, path, body):
        objects = [
            thing | {"actions": {"upload": {"href": f"{hub.address}/store/{thing['oid']}"}}}
            for thing in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, hub, path, body):
        hub.objects[path.removeprefix("/store/")] = body
        self.reply({})

    def validate(self, hub, path, body):
        self.reply({"errors": [], "warnings": []})

    def tree(self, hub, path, body):
        files = [(name, len(content)) for name, content in hub.files.items()]
        self.reply([{"type": "file", "path": name, "oid": "c" * 40, "size": size} for name, size in files])

    def commit(self, hub, path, body):
        hub.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del hub.files[value["path"]]
        url = f"{hub.address}/acme/small/commit/{'a' * 40}"
        self.reply({"success": True, "commitOid": "a" * 40, "commitUrl": url})

    def repo(self, hub, path, body):
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if name in hub.repos:
            self.reply({"id": name, "sha": "b" * 40, "siblings": [], "private": hub.repos[name] == "private"})
        else:
            self.reply({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})


for method in ("GET", "POST", "PUT", "HEAD"):
    setattr(Handler, f"do_{method}", Handler.answer)


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


@pytest.mark.parametrize("options", [(), ("--public",)])
def test_a_proven_checkpoint_goes_to_the_hub_private_unless_told(run_sleb, tiny_llama, tmp_path, hub, options):
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--push", "acme/small", *options)
    assert result.exit_code == 0, result.stderr
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("acme", "small")
    assert hub.repos["acme/small"] == ("public" if options else "private")
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == local
    assert "README.md" in hub.files
    assert hashlib.sha256(local["model.safetensors"]).hexdigest() in hub.objects
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert f"pushed to {hub.address}/acme/small" in result.stdout
    # Whether it may is asked first, and nothing is made before all is done.
    assert hub.asked.index("GET /api/whoami-v2") < hub.asked.index("POST /api/repos/create")
    assert "Uploading to acme/small" in result.stderr
    assert "%|" not in result.stderr


def test_what_is_uploaded_holds_no_path_of_this_machine(run_sleb, tmp_path, text_file, hub):
    folder = save_model(tmp_path / "own" / "model", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(tmp_path / "base"), "vision_config": {"_name_or_path": "org/eyes"}}
    (folder / "config.json").write_text(json.dumps(config | {"text": {"_name_or_path": f"{tmp_path}/base/"}}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": str(tmp_path / "base")}))
    mixture = f"{text_file}:2/3,self:1/3"
    search = run_sleb("search", folder, "--remove", 1, *calibration(mixture, samples=6), "-o", "plan.json")
    assert search.exit_code == 0, search.stderr
    result = run_sleb("apply", "plan.json", "-o", "out", "--push", "acme/small")
    assert result.exit_code == 0, result.stderr
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    secret = [str(place).encode() for place in (tmp_path.parent, text_file.parent, os.environ["SLEB_CACHE"])]
    assert [name for name, content in hub.files.items() if any(part in content for part in secret)] == []
    written = json.loads(hub.files["config.json"])
    assert (written["_name_or_path"], written["text"]["_name_or_path"]) == ("base", "base")
    assert written["vision_config"]["_name_or_path"] == "org/eyes"
    assert json.loads(hub.files["tokenizer_config.json"]) == tokenizer | {"name_or_path": "base"}
    plan = read_plan(tmp_path / "out" / "sleb_plan.json")
    assert (plan.model.id, plan.calibration.source) == ("model", "prose.txt:2/3,self:1/3")
    # It is still a plan for that model, wherever that is, and nobody looks for "model" on the Hub.
    hub.asked.clear()
    result = run_sleb("apply", "out/sleb_plan.json", "-o", "again")
    assert result.exit_code == 3
    assert "was made for model, and does not say where that is" in result.stderr
    assert hub.asked == []
    result = run_sleb("apply", "out/sleb_plan.json", "-o", "again", "--model", folder)
    assert result.exit_code == 0, result.stderr
    names = ("model.safetensors", "config.json", "sleb_plan.json", "README.md")
    assert all((tmp_path / "again" / name).read_bytes() == hub.files[name] for name in names)


def refused(run_sleb, tiny_llama, tmp_path, message, *options, code=8, push="acme/small"):
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--push", push, *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert "Writing weights" not in result.stderr
    assert os.listdir(tmp_path) == []
    return result


def test_who_is_not_logged_in_is_told_before_the_work(run_sleb, tiny_llama, tmp_path, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path.parent / "no-token"))
    result = refused(run_sleb, tiny_llama, tmp_path, "You are not logged in to the Hub")
    assert "hf auth login" in result.stderr


def test_a_token_that_is_wrong_or_only_reads(run_sleb, tiny_llama, tmp_path, hub, monkeypatch):
    hub.user = JANE | {"auth": {"accessToken": {"role": "read"}}}
    refused(run_sleb, tiny_llama, tmp_path, "is read-only")
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused(run_sleb, tiny_llama, tmp_path, "does not accept your token")


@pytest.mark.parametrize("owner", ["nobody", "far"])
def test_an_organization_that_one_may_not_write_to(run_sleb, tiny_llama, tmp_path, hub, owner):
    result = refused(run_sleb, tiny_llama, tmp_path, f"You are jane on the Hub, and may not write to {owner}.",
                     push=f"{owner}/small")  # fmt: skip
    assert "Push to jane/small" in result.stderr


def test_a_repository_that_exists_is_written_into_only_when_forced(run_sleb, tiny_llama, tmp_path, hub):
    refused(run_sleb, tiny_llama, tmp_path, "acme/old already exists on the Hub", push="acme/old")
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--push", "acme/old", "--force")
    assert result.exit_code == 0, result.stderr
    assert "model.safetensors" in hub.files


def test_weights_of_another_model_go_in_the_same_commit(run_sleb, tiny_llama, tmp_path, hub):
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
    options = ["--push", "acme/old", "--force", "--max-shard-size", "50KB"]
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", *options)
    assert result.exit_code == 0, result.stderr
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len([name for name in local if name.endswith(".safetensors")]) > 1
    assert hub.files == dict.fromkeys(kept, b"old") | local
    assert hub.commits == 1
    told = " ".join(result.stderr.split())
    gone = ", ".join(sorted(name for name in stale if name not in local))
    assert f"Deleted from acme/old, as they belong to another model: {gone}." in told


def test_a_repository_keeps_its_visibility_so_another_is_refused(run_sleb, tiny_llama, tmp_path, hub):
    options = ["--push", "acme/old", "--force"]
    message = "acme/old is private on the Hub, and --public does not change that"
    result = refused(run_sleb, tiny_llama, tmp_path, message, "--force", "--public", push="acme/old")
    assert "hint: Leave out --public" in result.stderr
    hub.repos["acme/old"] = "public"
    result = refused(run_sleb, tiny_llama, tmp_path, "acme/old is public on the Hub", "--force", push="acme/old")
    assert "hint: Add --public" in result.stderr
    assert hub.files == {}
    assert run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", *options, "--public").exit_code == 0
    assert "model.safetensors" in hub.files


def test_a_repository_created_meanwhile_with_another_visibility_gets_nothing(
    run_sleb, tiny_llama, tmp_path, hub, monkeypatch
):
    create = Handler.create

    def too_late(handler, hub, path, body):
        hub.repos["acme/small"] = "public"
        create(handler, hub, path, body)

    monkeypatch.setattr(Handler, "create", too_late)
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--push", "acme/small", "--force")
    assert result.exit_code == 8
    assert "out is complete, but acme/small is public on the Hub" in result.stderr
    assert hub.files == {}
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("name", ["", "small", "a/b/c", "acme/sm all", "acme/..", "-/x"])
def test_what_is_no_name_of_a_repository(run_sleb, tiny_llama, tmp_path, hub, name):
    refused(run_sleb, tiny_llama, tmp_path, f"--push {name}", push=name, code=2)
    assert hub.asked == []


def test_public_goes_with_push(run_sleb, tiny_llama):
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "--public")
    assert result.exit_code == 2
    assert "--public requires --push" in result.stderr


def test_a_hub_out_of_reach(run_sleb, tiny_llama, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = refused(run_sleb, tiny_llama, tmp_path, "The Hub is out of reach")
    assert "`hf upload acme/small FOLDER --private`" in result.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refused(run_sleb, tiny_llama, tmp_path, "The Hub is out of reach")


@pytest.mark.parametrize(("step", "status"), [("repos/create", 403), ("/store/", 403), ("/commit/", 403)])
def test_a_failed_upload_loses_nothing(run_sleb, tiny_llama, tmp_path, hub, step, status):
    hub.refuses[step] = status
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--push", "acme/small")
    assert result.exit_code == 8, result.stderr
    assert "out is complete, but was not uploaded to acme/small" in result.stderr
    assert "`hf upload acme/small out --private`" in result.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert hub.files == {}

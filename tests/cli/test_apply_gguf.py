"""`sleb apply` on GGUF files, through `main()`."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import calibration, save_model, slow, tokens_of_test_text
from families import experts_config
from gguf_models import convert_llama, metadata_of, tensors_of, write_gguf, write_llama_gguf
from recovering import plain_losses
from sleb_cli import atomic
from sleb_cli.engine.files import fingerprint
from sleb_cli.engine.files.cache import cache_root
from sleb_cli.engine.gguf import quick
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.gguf.file import write_gguf as write_gguf_again
from sleb_cli.engine.model import gguf, gguf_conversion
from sleb_cli.events import ignore


@pytest.fixture
def source(tmp_path):
    return write_llama_gguf(tmp_path / "tiny.gguf", 6, Type.Q8_0)


@pytest.fixture
def plan(sleb, tmp_path, source, text_file):
    """A plan that was searched on the model in full precision, which is then gone."""
    sleb("search", tmp_path / "origin", "--remove", 2, *calibration(text_file), "-q")
    (tmp_path / "origin").rename(tmp_path / "elsewhere")
    return tmp_path / "plan.json"


@pytest.fixture
def apply(run_sleb):
    """Apply something, and give the result."""

    def run(*options, code=0, says=""):
        result = run_sleb("apply", *options)
        assert (result.exit_code, says in result.stdout + result.stderr) == (code, True), (
            options,
            result.stderr,
        )
        return result

    return run


def logits(path, *, gguf_file=None):
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(2, 40)[None]).logits


@pytest.mark.parametrize("type_", [Type.F32, slow(Type.F16), slow(Type.Q8_0), Type.Q4_0])
def test_a_plan_of_the_full_model_cuts_any_quantisation(apply, tmp_path, plan, type_):
    write_llama_gguf(tmp_path / "q.gguf", 6, type_)
    removals = json.loads(plan.read_text())["removals"]
    result = apply(
        plan, "--source", "q.gguf", "-o", "small.gguf", says="wrote small.gguf: 4 blocks"
    )
    assert "on cpu: matches the original without these blocks" in result.stdout
    assert metadata_of(tmp_path / "small.gguf")["sleb.removed_blocks"] == removals
    apply("q.gguf", "--blocks", ",".join(map(str, removals)), "-o", "folder")
    found, expected = logits(tmp_path, gguf_file="small.gguf"), logits(tmp_path / "folder")
    assert (found - expected).abs().max() <= (
        0 if type_ is Type.F32 else 0.03
    ) * expected.abs().max()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_file_or_transformers_converts_it_again(source, monkeypatch):
    monkeypatch.setattr(fingerprint, "SAMPLES", 1)
    monkeypatch.setattr(fingerprint, "HEAD_BYTES", 64)
    folders = [gguf.gguf_folder(source, ignore), gguf.gguf_folder(source, ignore)]
    head, key, rest = source.read_bytes().partition(b"tokenizer.ggml.eos_token_id")
    assert rest[4] == 1
    source.write_bytes(head + key + rest[:4] + b"\2" + rest[5:])
    folders.append(gguf.gguf_folder(source, ignore))
    monkeypatch.setattr(gguf, "version", lambda package: "99")
    folders.append(gguf.gguf_folder(source, ignore))
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    eos = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in folders
    ]
    assert eos == [1, 1, 2, 2]


@pytest.mark.parametrize("without", ["nothing", "llama.vocab_size"])
def test_a_converted_model_is_the_one_that_transformers_reads(
    source, tmp_path, monkeypatch, without
):
    monkeypatch.setattr(quick, "_MAX_LIST_ITEMS", 3)
    file, path = read_gguf(source), tmp_path / "whole.gguf"
    entries = tuple(entry for entry in file.entries if entry.key != without)
    write_gguf_again(replace(file, entries=entries), path, lambda count: None)
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16
    )
    folder = gguf.gguf_folder(path, ignore)
    AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).save_pretrained(tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    found = AutoModelForCausalLM.from_pretrained(folder)
    of_loading = dict.fromkeys(("_name_or_path", "architectures", "quantization_config"))
    assert found.config.to_dict() | of_loading == whole.config.to_dict() | of_loading
    assert all(
        torch.equal(found.get_parameter(name), values) for name, values in whole.named_parameters()
    )
    assert not list(cache_root().glob(".*"))


@pytest.mark.parametrize(
    ("matrices", "router", "dtype"),
    [
        (Type.F32, Type.F32, torch.float32),
        (Type.F16, Type.F32, torch.float16),
        (Type.Q8_0, Type.F32, torch.bfloat16),
    ],
)
def test_a_converted_model_has_the_type_of_most_of_its_matrices(source, matrices, router, dtype):
    file = read_gguf(source)
    first = next(at for at, tensor in enumerate(file.tensors) if len(tensor.shape) > 1)
    tensors = (
        replace(each, type=router if at == first else matrices)
        for at, each in enumerate(file.tensors)
    )
    assert gguf_conversion._require_convertible(replace(file, tensors=tuple(tensors))) is dtype


def test_fewer_removals_a_default_name_and_json(apply, tmp_path, source, plan):
    data = json.loads(apply("--remove", 1, "--source", source, "--json").stdout)
    assert (data["kind"], data["file"], data["blocks"]) == ("gguf", "tiny-sleb-5-blocks.gguf", 5)
    assert data["removals"] == json.loads(plan.read_text())["removals"][:1]
    assert (data["source"], data["file_bytes"]) == (
        str(source),
        (tmp_path / data["file"]).stat().st_size,
    )
    assert (data["verified"], data["unproven"], data["proof"]["dtype"]) == (True, None, "bfloat16")
    assert data["proof"]["logits_difference"] == 0


def test_a_pruned_file_is_a_model_to_search(run_sleb, apply, tmp_path, source, text_file):
    apply(
        "--blocks",
        "4,1",
        "--source",
        source,
        "-o",
        "a.gguf",
        "--no-verify",
        says="not verified (--no-verify)",
    )
    apply(
        source,
        "--blocks",
        "4,1",
        "--source",
        source,
        "-o",
        "same.gguf",
        says="to run it: llama-cli -m same.gguf",
    )
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()
    assert {name for name in tensors_of(tmp_path / "a.gguf") if "attn_q.weight" in name} == {
        f"blk.{block}.attn_q.weight" for block in range(4)
    }
    result = run_sleb("search", "a.gguf", "--remove", 1, *calibration(text_file), "--json")
    assert json.loads(result.stdout)["model"]["blocks"] == 4
    apply("-o", "b.gguf")
    kept = [block for block in range(6) if block not in (4, 1)]
    removed = kept[json.loads((tmp_path / "plan.json").read_text())["removals"][0]]
    assert metadata_of(tmp_path / "b.gguf")["sleb.removed_blocks"] == [4, 1, removed]
    write_llama_gguf(tmp_path / "a.gguf", 4, Type.F32)
    apply("-o", "again.gguf", code=3, says="fingerprint")


def test_what_transformers_cannot_read_is_proven_in_part(apply, tmp_path, monkeypatch, source):
    write_gguf(tmp_path / "odd.gguf", "granite", 4)
    copied = "every tensor is a byte-for-byte copy from the source"
    result = apply(
        "--blocks",
        "1",
        "--source",
        "odd.gguf",
        says=f"partially proven: {copied}; logits not compared: ",
    )
    assert "transformers does not read GGUF files of the architecture granite" in result.stdout
    data = json.loads(apply("--blocks", "1", "--source", "odd.gguf", "--force", "--json").stdout)
    assert (data["verified"], data["proof"]) == (True, None)
    write_gguf(tmp_path / "bare.gguf", "llama", 4)
    apply(
        "--blocks",
        "1",
        "--source",
        "bare.gguf",
        says="logits not compared: transformers cannot read",
    )
    gpt_oss = save_model(
        tmp_path / "gpt-oss", experts_config("gpt_oss", hidden_size=256, head_dim=64)
    )
    convert_llama(gpt_oss, tmp_path / "gpt-oss.gguf", architecture="gpt-oss")
    no_experts = "transformers does not find model.layers.0.mlp.experts.down_proj in"
    apply("--blocks", "1,2", "--source", "gpt-oss.gguf", says=f"logits not compared: {no_experts}")
    apply("gpt-oss.gguf", "--blocks", "1,2", "-o", "folder", code=4, says=no_experts)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5))
    apply("--blocks", "1", "--source", source, says="B of memory")


def test_a_gguf_model_or_output_is_enough(apply, tmp_path, source):
    apply(source, "--blocks", "4,1", "-o", "small.gguf")
    assert metadata_of(tmp_path / "small.gguf")["llama.block_count"] == 4
    apply(source, "--blocks", "4,1")
    assert (tmp_path / "tiny-sleb-4-blocks.gguf").read_bytes() == (
        tmp_path / "small.gguf"
    ).read_bytes()
    apply(source, "--blocks", "4,1", "-o", "folder")
    apply(source, "--blocks", "4,1", "--max-shard-size", "5GB")  # an option of checkpoints
    assert all(
        (tmp_path / name / "config.json").is_file() for name in ("folder", "tiny-sleb-4-blocks")
    )


def test_a_plan_of_another_model_is_refused(apply, tmp_path, plan):
    write_gguf(tmp_path / "gemma.gguf", "gemma", 6)
    assert (
        "(llama, 6 blocks)"
        in apply(plan, "--source", "gemma.gguf", code=3, says="(gemma, 6 blocks)").stderr
    )
    plan.write_text(
        plan.read_text().replace('"model_type": "llama"', '"model_type": "lama_of_mine"')
    )
    apply(plan, "--source", "tiny.gguf", says="does not know if GGUF files of lama_of_mine")
    apply("nowhere.json", "--source", "tiny.gguf", code=3)


def test_what_cannot_be_is_refused_and_nothing_is_left(apply, tmp_path, source, tiny_opt):
    (tmp_path / "there.gguf").write_text("precious")
    (tmp_path / "link.gguf").symlink_to(source)
    write_gguf(tmp_path / "part.gguf", "llama", 3, {"split.count": 2})
    write_gguf(tmp_path / "g.gguf", "gemma2", 6)
    whole, names = source.read_bytes(), sorted(os.listdir(tmp_path))
    for code, message, *options in (
        (2, "no block 6", "--blocks", "6"),
        (3, "holds another model", tiny_opt, "--blocks", "1"),
        (8, "link.gguf is the source file itself", "--blocks", "1", "-o", "link.gguf", "--force"),
        (8, "there.gguf already exists", "--blocks", "1", "-o", "there.gguf"),
        (4, "llama-gguf-split --merge", "--blocks", "1", "--source", "part.gguf"),
        (4, "the last of every 2 blocks", "--blocks", "1", "--source", "g.gguf"),
    ):
        result = apply("--source", source, *options, code=code, says=message)
        assert ("hint:" in result.stderr, result.stdout) == (True, "")
    assert sorted(os.listdir(tmp_path)) == names
    assert (source.read_bytes(), (tmp_path / "there.gguf").read_text()) == (whole, "precious")
    apply("--blocks", "1", "--source", source, "-o", "there.gguf", "--force")
    assert metadata_of(tmp_path / "there.gguf")["llama.block_count"] == 5


def test_no_room_is_said_before_anything_is_written(apply, monkeypatch, source):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    apply("--blocks", "1", "--source", source, code=8, says="has only 1 kB free")


def test_a_gguf_model_is_recovered_into_a_checkpoint(sleb, tmp_path, source, text_file):
    words = [
        "apply",
        source,
        "--blocks",
        "3,1",
        "--recover",
        *calibration(text_file, samples=10),
        "-o",
    ]
    assert "convert it with llama.cpp" in sleb(*words, "small.gguf", code=2).stderr
    result = json.loads(sleb(*words, "out", "--json").stdout)
    assert (result["proof"]["reference"], result["proof"]["logits_difference"]) == ("recovered", 0)
    record = result["recovery"]
    reported = tokens_of_test_text(tmp_path / "origin", text_file, record)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=source.name, dtype=torch.bfloat16
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    loss, divergence = plain_losses(dense, ours, reported)
    assert record["closed_form_losses"]["loss"] == pytest.approx(loss, rel=1e-3)
    assert record["closed_form_losses"]["divergence"] == pytest.approx(divergence, rel=2e-2)

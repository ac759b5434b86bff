"""`sleb apply` on GGUF files, through `main()`."""

import json
import os
from dataclasses import replace
from functools import partial
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
from sleb_cli.cache import cache_root
from sleb_cli.engine.files import fingerprint
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
    sleb("search", tmp_path / "origin", "--remove 2", *calibration(text_file), "-q")
    (tmp_path / "origin").rename(tmp_path / "elsewhere")
    return tmp_path / "plan.json"


@pytest.fixture
def apply(run_sleb):
    """Apply something, and give the result."""

    def run(*options, code=0, says=""):
        result = run_sleb("apply", *options)
        assert result.exit_code == code, (options, result.stderr)
        assert says in result.stdout + result.stderr, options
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
    shown = apply(plan, "--source q.gguf -o small.gguf", says="wrote small.gguf: 4 blocks").stdout
    assert "on cpu: matches the original without these blocks" in shown
    assert metadata_of(tmp_path / "small.gguf")["sleb.removed_blocks"] == removals
    apply("q.gguf", "--blocks", ",".join(map(str, removals)), "-o folder")
    found, expected = logits(tmp_path, gguf_file="small.gguf"), logits(tmp_path / "folder")
    tolerance = 0 if type_ is Type.F32 else 0.03
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_file_or_transformers_converts_it_again(source, monkeypatch):
    monkeypatch.setattr(fingerprint, "SAMPLES", 1)
    monkeypatch.setattr(fingerprint, "HEAD_BYTES", 64)
    first = gguf.gguf_folder(source, ignore)
    assert gguf.gguf_folder(source, ignore) == first
    head, key, rest = source.read_bytes().partition(b"tokenizer.ggml.eos_token_id")
    assert rest[4] == 1
    source.write_bytes(head + key + rest[:4] + b"\2" + rest[5:])
    changed = gguf.gguf_folder(source, ignore)
    monkeypatch.setattr(gguf, "version", lambda package: "99")
    folders = {first: 1, changed: 2, gguf.gguf_folder(source, ignore): 2}
    assert len(folders) == 3
    for folder, end in folders.items():
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["eos_token_id"] == end


@pytest.mark.parametrize("without", ["nothing", "llama.vocab_size"])
def test_a_converted_model_is_the_one_that_transformers_reads(
    source, tmp_path, monkeypatch, without
):
    monkeypatch.setattr(quick, "_MAX_LIST_ITEMS", 3)
    file = read_gguf(source)
    entries = tuple(entry for entry in file.entries if entry.key != without)
    write_gguf_again(replace(file, entries=entries), tmp_path / "whole.gguf", lambda count: None)
    whole = {"gguf_file": "whole.gguf"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, **whole, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(tmp_path, **whole).save_pretrained(tmp_path)
    folder = gguf.gguf_folder(tmp_path / "whole.gguf", ignore)
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    found = AutoModelForCausalLM.from_pretrained(folder)
    of_loading = dict.fromkeys(("_name_or_path", "architectures", "quantization_config"))
    assert found.config.to_dict() | of_loading == expected.config.to_dict() | of_loading
    for name, values in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), values), name
    assert not list(cache_root().glob(".*"))


@pytest.mark.parametrize(
    ("matrices", "dtype"),
    [(Type.F32, torch.float32), (Type.F16, torch.float16), (Type.Q8_0, torch.bfloat16)],
)
def test_a_converted_model_has_the_type_of_most_of_its_matrices(source, matrices, dtype):
    file = read_gguf(source)
    tensors = [replace(tensor, type=matrices) for tensor in file.tensors]
    first = next(at for at, tensor in enumerate(tensors) if len(tensor.shape) > 1)
    tensors[first] = replace(tensors[first], type=Type.F32)  # such as a router
    assert gguf_conversion._require_convertible(replace(file, tensors=tuple(tensors))) is dtype


def test_fewer_removals_a_default_name_and_json(apply, tmp_path, source, plan):
    data = apply("--remove 1 --json --source", source).data
    expected = {
        "kind": "gguf",
        "file": "tiny-sleb-5-blocks.gguf",
        "blocks": 5,
        "removals": json.loads(plan.read_text())["removals"][:1],
        "source": str(source),
        "file_bytes": (tmp_path / "tiny-sleb-5-blocks.gguf").stat().st_size,
        "verified": True,
        "unproven": None,
    }
    assert {key: data[key] for key in expected} == expected
    assert (data["proof"]["dtype"], data["proof"]["logits_difference"]) == ("bfloat16", 0)


def test_a_pruned_file_is_a_model_to_search(search, apply, tmp_path, source):
    apply(source, "--blocks 4,1 -o a.gguf --no-verify", says="not verified (--no-verify)")
    assert {name for name in tensors_of(tmp_path / "a.gguf") if "attn_q.weight" in name} == {
        f"blk.{block}.attn_q.weight" for block in range(4)
    }
    plan = search("--remove 1 --json", model="a.gguf").data
    assert plan["model"]["blocks"] == 4
    apply("-o b.gguf")
    removed = [0, 2, 3, 5][plan["removals"][0]]
    assert metadata_of(tmp_path / "b.gguf")["sleb.removed_blocks"] == [4, 1, removed]
    write_llama_gguf(tmp_path / "a.gguf", 4, Type.F32)
    apply("-o again.gguf", code=3, says="fingerprint")


def test_what_transformers_cannot_read_is_proven_in_part(apply, tmp_path, monkeypatch, source):
    write_gguf(tmp_path / "odd.gguf", "granite", 4)
    partly = "partially proven: every tensor is a byte-for-byte copy from the source; logits not "
    unread = "transformers does not read GGUF files of the architecture granite"
    assert unread in apply("odd.gguf", "--blocks 1 -o a.gguf", says=partly).stdout
    data = apply("odd.gguf", "--blocks 1 -o b.gguf --json").data
    assert (data["verified"], data["proof"]) == (True, None)
    write_gguf(tmp_path / "bare.gguf", "llama", 4)
    apply("bare.gguf", "--blocks 1", says="logits not compared: transformers cannot read")
    config = experts_config("gpt_oss", hidden_size=256, head_dim=64)
    gpt_oss = save_model(tmp_path / "gpt-oss", config)
    convert_llama(gpt_oss, tmp_path / "gpt-oss.gguf", architecture="gpt-oss")
    no_experts = "transformers does not find model.layers.0.mlp.experts.down_proj in"
    apply("gpt-oss.gguf", "--blocks 1,2", says=f"logits not compared: {no_experts}")
    apply("gpt-oss.gguf", "--blocks 1,2 -o folder", code=4, says=no_experts)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5))
    apply(source, "--blocks 1", says="B of memory")


def test_a_gguf_model_or_output_is_enough(apply, tmp_path, source):
    apply(source, "--blocks 4,1 -o small.gguf", says="to run it: llama-cli -m small.gguf")
    small = (tmp_path / "small.gguf").read_bytes()
    assert metadata_of(tmp_path / "small.gguf")["llama.block_count"] == 4
    apply("--blocks 4,1 --source", source)
    assert (tmp_path / "tiny-sleb-4-blocks.gguf").read_bytes() == small
    for options in ("-o folder", "--max-shard-size 5GB"):  # an option of checkpoints
        apply(source, "--blocks 4,1", options)
    for name in ("folder", "tiny-sleb-4-blocks"):
        assert (tmp_path / name / "config.json").is_file()


def test_a_plan_of_another_model_is_refused(apply, tmp_path, plan):
    write_gguf(tmp_path / "gemma.gguf", "gemma", 6)
    told = apply(plan, "--source gemma.gguf", code=3, says="(gemma, 6 blocks)").stderr
    assert "(llama, 6 blocks)" in told
    text = plan.read_text()
    plan.write_text(text.replace('"model_type": "llama"', '"model_type": "lama_of_mine"'))
    apply(plan, "--source tiny.gguf", says="does not know if GGUF files of lama_of_mine")


@pytest.mark.parametrize(
    ("code", "message", "options"),
    [
        (2, "no block 6", "--blocks 6 --source tiny.gguf"),
        (8, "is the source file itself", "--blocks 1 --source tiny.gguf -o link.gguf --force"),
        (8, "there.gguf already exists", "--blocks 1 --source tiny.gguf -o there.gguf"),
        (4, "llama-gguf-split --merge", "--blocks 1 --source part.gguf"),
        (4, "the last of every 2 blocks", "--blocks 1 --source g.gguf"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    apply, tmp_path, source, code, message, options
):
    (tmp_path / "there.gguf").write_text("precious")
    (tmp_path / "link.gguf").symlink_to(source)
    write_gguf(tmp_path / "part.gguf", "llama", 3, {"split.count": 2})
    write_gguf(tmp_path / "g.gguf", "gemma2", 6)
    whole, names = source.read_bytes(), sorted(os.listdir(tmp_path))
    result = apply(options, code=code, says=message)
    assert ("hint:" in result.stderr, result.stdout) == (True, "")
    assert sorted(os.listdir(tmp_path)) == names
    assert (source.read_bytes(), (tmp_path / "there.gguf").read_text()) == (whole, "precious")


def test_only_force_replaces_a_file_and_it_must_be_of_the_model(apply, tmp_path, source, tiny_opt):
    (tmp_path / "there.gguf").write_text("precious")
    apply("--blocks 1 -o there.gguf --force --source", source)
    assert metadata_of(tmp_path / "there.gguf")["llama.block_count"] == 5
    apply(tiny_opt, "--blocks 1 --source", source, code=3, says="holds another model")


def test_no_room_is_said_before_anything_is_written(apply, monkeypatch, source):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    apply("--blocks 1 --source", source, code=8, says="has only 1 kB free")


def test_a_gguf_model_is_recovered_into_a_checkpoint(sleb, tmp_path, source, text_file):
    words = [
        "apply",
        source,
        "--blocks 3,1 --recover --no-heal",
        *calibration(text_file, samples=10),
    ]
    assert "convert it with llama.cpp" in sleb(*words, "-o small.gguf", code=2).stderr
    result = sleb(*words, "-o out --json").data
    assert (result["proof"]["reference"], result["proof"]["logits_difference"]) == ("recovered", 0)
    record = result["recovery"]
    losses = record["closed_form_losses"]
    reported = tokens_of_test_text(tmp_path / "origin", text_file, record)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)
    dense, ours = load(tmp_path, gguf_file=source.name), load(tmp_path / "out")
    loss, divergence = plain_losses(dense, ours, reported)
    assert losses["loss"] == pytest.approx(loss, rel=1e-3)
    assert losses["divergence"] == pytest.approx(divergence, rel=2e-2)

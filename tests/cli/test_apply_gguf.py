"""`sleb apply` on GGUF files, through `main()`."""

import json
import os
import re
from types import SimpleNamespace

import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import calibration, interrupt_healing, reported_tokens
from gguf_models import metadata_of, tensors_of, write_gguf, write_llama_gguf
from sleb_cli import atomic
from sleb_cli.engine.files import fingerprint
from sleb_cli.engine.model import gguf
from sleb_cli.engine.output import apply_gguf
from sleb_cli.events import ignore
from sleb_plugins import ProofError


@pytest.fixture
def source(tmp_path):
    return write_llama_gguf(tmp_path / "tiny.gguf", 6, Type.Q8_0)


@pytest.fixture
def plan(run_sleb, tmp_path, source, text_file):
    """A plan that was searched on the model in full precision, which is then gone."""
    result = run_sleb("search", tmp_path / "origin", "--remove", 2, *calibration(text_file), "-q")
    assert result.exit_code == 0, result.stderr
    (tmp_path / "origin").rename(tmp_path / "elsewhere")
    return tmp_path / "plan.json"


def logits(path, *, gguf_file=None):
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(2, 40)[None]).logits


@pytest.mark.parametrize("type_", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0])
def test_a_plan_of_the_full_model_cuts_any_quantisation(run_sleb, tmp_path, plan, type_):
    write_llama_gguf(tmp_path / "q.gguf", 6, type_)
    removals = json.loads(plan.read_text())["removals"]
    result = run_sleb("apply", plan, "--source", "q.gguf", "-o", "small.gguf")
    assert result.exit_code == 0, result.stderr
    assert "wrote small.gguf: 4 blocks" in result.stdout
    assert "every tensor is a byte-for-byte copy from the source; transformers reads it" in result.stdout
    assert "bitwise equal" in result.stdout
    assert metadata_of(tmp_path / "small.gguf")["sleb.removed_blocks"] == removals
    blocks = ",".join(map(str, removals))
    result = run_sleb("apply", "q.gguf", "--blocks", blocks, "-o", "folder")
    assert result.exit_code == 0, result.stderr
    found, expected = logits(tmp_path, gguf_file="small.gguf"), logits(tmp_path / "folder")
    assert (found - expected).abs().max() <= (0 if type_ is Type.F32 else 0.03) * expected.abs().max()
    assert not list(tmp_path.glob(".*"))


def test_a_file_is_converted_again_after_a_change(source, monkeypatch):
    monkeypatch.setattr(fingerprint, "SAMPLES", 1)
    monkeypatch.setattr(fingerprint, "HEAD_BYTES", 64)
    folders = [gguf.gguf_folder(source, ignore), gguf.gguf_folder(source, ignore)]
    content = source.read_bytes()
    place = content.index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id") + 4
    assert content[place] == 1
    source.write_bytes(content[:place] + b"\2" + content[place + 1 :])
    folders.append(gguf.gguf_folder(source, ignore))
    monkeypatch.setattr(gguf.transformers, "__version__", "99")
    folders.append(gguf.gguf_folder(source, ignore))
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    eos = [json.loads((folder / "generation_config.json").read_text())["eos_token_id"] for folder in folders]
    assert eos == [1, 1, 2, 2]


def test_fewer_removals_a_default_name_and_json(run_sleb, tmp_path, source, plan):
    removals = json.loads(plan.read_text())["removals"]
    result = run_sleb("apply", "--remove", 1, "--source", source, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["kind"], data["file"], data["blocks"]) == ("gguf", "tiny-sleb-5-blocks.gguf", 5)
    assert data["removals"] == removals[:1]
    assert data["source"] == str(source)
    assert data["file_bytes"] == (tmp_path / data["file"]).stat().st_size
    assert (data["verified"], data["unproven"], data["proof"]["dtype"]) == (True, None, "bfloat16")
    assert data["proof"]["logits_difference"] == 0


def test_blocks_without_a_plan_and_without_a_proof(run_sleb, tmp_path, source):
    for words, said, name in (
        (("--no-verify",), "not verified (--no-verify)", "a.gguf"),
        ((source,), "proven", "b.gguf"),
    ):
        result = run_sleb("apply", *words, "--blocks", "4,1", "--source", source, "-o", name)
        assert (result.exit_code, said in result.stdout) == (0, True), result.stderr
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert "blk.3.attn_q.weight" in tensors_of(tmp_path / "a.gguf")
    assert "blk.4.attn_q.weight" not in tensors_of(tmp_path / "a.gguf")


def test_a_pruned_file_is_a_model_to_search(run_sleb, tmp_path, source, text_file):
    assert run_sleb("apply", "--blocks", "4,1", "--source", source, "-o", "a.gguf").exit_code == 0
    result = run_sleb("search", "a.gguf", "--remove", 1, *calibration(text_file), "--json")
    assert json.loads(result.stdout)["model"]["blocks"] == 4
    result = run_sleb("apply", "--source", "a.gguf", "-o", "b.gguf")
    assert result.exit_code == 0, result.stderr
    kept = [block for block in range(6) if block not in (4, 1)]
    removed = kept[json.loads((tmp_path / "plan.json").read_text())["removals"][0]]
    assert metadata_of(tmp_path / "b.gguf")["sleb.removed_blocks"] == [4, 1, removed]


def test_what_transformers_cannot_read_is_said_to_be_verified_in_part(run_sleb, tmp_path, monkeypatch, source):

    write_gguf(tmp_path / "odd.gguf", "granite", 4)
    result = run_sleb("apply", "--blocks", "1", "--source", "odd.gguf")
    assert result.exit_code == 0, result.stderr
    copied = "every tensor is a byte-for-byte copy from the source"
    assert f"partially proven: {copied}; logits not compared: " in result.stdout
    assert "transformers does not read GGUF files of the architecture granite" in result.stdout
    data = json.loads(run_sleb("apply", "--blocks", "1", "--source", "odd.gguf", "--force", "--json").stdout)
    assert (data["verified"], data["proof"]) == (True, None)
    write_gguf(tmp_path / "bare.gguf", "llama", 4)
    result = run_sleb("apply", "--blocks", "1", "--source", "bare.gguf")
    assert (result.exit_code, "logits not compared: transformers cannot read" in result.stdout) == (0, True), (
        result.stderr
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5))
    result = run_sleb("apply", "--blocks", "1", "--source", source)
    assert (result.exit_code, "B of memory" in result.stdout) == (0, True), result.stderr


def test_a_gguf_model_or_output_is_enough(run_sleb, tmp_path, source, tiny_llama):
    named = run_sleb("apply", source, "--blocks", "4,1", "-o", "small.gguf")
    assert named.exit_code == 0, named.stderr
    assert metadata_of(tmp_path / "small.gguf")["llama.block_count"] == 4
    assert run_sleb("apply", source, "--blocks", "4,1").exit_code == 0
    assert (tmp_path / "tiny-sleb-4-blocks.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()
    as_folder = run_sleb("apply", source, "--blocks", "4,1", "-o", "folder")
    assert as_folder.exit_code == 0, as_folder.stderr
    assert (tmp_path / "folder" / "config.json").is_file()
    sized = run_sleb("apply", source, "--blocks", "4,1", "--max-shard-size", "5GB")  # an option of checkpoints
    assert sized.exit_code == 0, sized.stderr
    assert (tmp_path / "tiny-sleb-4-blocks" / "config.json").is_file()
    result = run_sleb("apply", tiny_llama, "--blocks", "4,1", "-o", "other.gguf")
    assert (result.exit_code, "can only be made from a GGUF file" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "other.gguf").exists()


def test_a_plan_made_for_a_gguf_file_gives_a_gguf_file(run_sleb, tmp_path, source, text_file):
    options = ("--remove", 2, *calibration(text_file), "-o", "own.json", "-q")
    assert run_sleb("search", source, *options).exit_code == 0
    result = run_sleb("apply", "own.json")
    assert result.exit_code == 0, result.stderr
    assert metadata_of(tmp_path / "tiny-sleb-4-blocks.gguf")["llama.block_count"] == 4
    write_llama_gguf(source, 6, Type.F32)
    result = run_sleb("apply", "own.json", "-o", "again.gguf")
    assert (result.exit_code, "fingerprint" in result.stderr) == (3, True), result.stderr


def test_a_plan_of_another_model_is_refused(run_sleb, tmp_path, plan):
    write_gguf(tmp_path / "gemma.gguf", "gemma", 6)
    write_llama_gguf(tmp_path / "short.gguf", 5)
    for name, words in (("gemma.gguf", "(gemma, 6 blocks)"), ("short.gguf", "(llama, 5 blocks)")):
        result = run_sleb("apply", plan, "--source", name)
        assert (result.exit_code, words in result.stderr) == (3, True), result.stderr
        assert "(llama, 6 blocks)" in result.stderr
    result = run_sleb("apply", plan, "--source", "short.gguf", "--any-model")
    assert result.exit_code == 0, result.stderr
    plan.write_text(plan.read_text().replace('"model_type": "llama"', '"model_type": "lama_of_mine"'))
    result = run_sleb("apply", plan, "--source", "tiny.gguf")
    assert (result.exit_code, "does not know if GGUF files of lama_of_mine" in result.stderr) == (0, True)
    assert run_sleb("apply", "nowhere.json", "--source", "tiny.gguf").exit_code == 3


def test_what_cannot_be_is_refused_and_nothing_is_left(run_sleb, tmp_path, source, tiny_opt):
    (tmp_path / "there.gguf").write_text("precious")
    (tmp_path / "link.gguf").symlink_to(source)
    whole, names = source.read_bytes(), sorted(os.listdir(tmp_path))
    for code, message, *options in (
        (2, "no block 6", "--blocks", "6"),
        (2, "named twice", "--blocks", "1,1"),
        (2, "All 6 blocks", "--blocks", "0,1,2,3,4,5"),
        (2, "No blocks given for", source),
        (3, "holds another model", tiny_opt, "--blocks", "1"),
        (2, "--blocks applies to a model", "plan.json", "--blocks", "1"),
        (2, "Cannot remove 3 blocks: --blocks names 2", "--blocks", "1,2", "--remove", 3),
        (2, "--dtype does not apply to a GGUF file", "--blocks", "1", "--dtype", "float16"),
        (2, "--recover writes new values into the GGUF file of the model", "--blocks", "1", "--recover"),
        (2, "--heal writes new values into the GGUF file of the model", "--blocks", "1", "--heal"),
        (2, "--model does not apply with --source", "--blocks", "1", "--model", tiny_opt),
        (3, "no plan plan.json"),
        (8, "tiny.gguf is the source file itself", "--blocks", "1", "-o", "tiny.gguf", "--force"),
        (8, "link.gguf is the source file itself", "--blocks", "1", "-o", "link.gguf", "--force"),
        (8, "there.gguf already exists", "--blocks", "1", "-o", "there.gguf"),
        (8, "folder does not exist", "--blocks", "1", "-o", "nowhere/small.gguf"),
        (2, "does not end in .gguf", "--blocks", "1", "-o", tmp_path),
    ):
        result = run_sleb("apply", *options, "--source", source)
        assert (result.exit_code, message in result.stderr) == (code, True), (options, result.stderr)
        assert "hint:" in result.stderr
        assert result.stdout == ""
    assert sorted(os.listdir(tmp_path)) == names
    assert (source.read_bytes(), (tmp_path / "there.gguf").read_text()) == (whole, "precious")
    result = run_sleb("apply", "--blocks", "1", "--source", source, "-o", "there.gguf", "--force")
    assert result.exit_code == 0, result.stderr
    assert metadata_of(tmp_path / "there.gguf")["llama.block_count"] == 5


def test_files_that_are_no_whole_model(run_sleb, tmp_path, source):
    whole = source.read_bytes()
    broken = "is truncated, or is not a GGUF file"
    cases = []
    for keep in (0, 3, 100, 5000, len(whole) - 4000):
        (tmp_path / f"{keep}.gguf").write_bytes(whole[:keep])
        cases.append((f"{keep}.gguf", broken))
    write_gguf(tmp_path / "part-00001-of-00002.gguf", "llama", 3, {"split.count": 2})
    write_gguf(tmp_path / "g.gguf", "gemma2", 6)
    cases += [
        ("nowhere.gguf", "no file nowhere.gguf"),
        ("part-00001-of-00002.gguf", "llama-gguf-split --merge"),
        ("g.gguf", "the last of every 2 blocks"),
    ]
    for name, message in cases:
        result = run_sleb("apply", "--blocks", "1", "--source", name)
        assert (result.exit_code, message in result.stderr) == (4, True), (name, result.stderr)
    assert [name for name in os.listdir(tmp_path) if "sleb" in name or name.startswith(".")] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-200] + bytes(200), "differs from the expected"),
        (lambda data: data[:-3000], "the gguf package cannot read it"),
        (lambda data: data.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"), "metadata"),
        (
            lambda data: data.replace(b"blk.0.attn_q", b"blk.0.attn_x"),
            "blk.0.attn_x.weight differs from the expected blk.0.attn_q",
        ),
    ],
)
def test_a_file_that_went_wrong_is_not_delivered(run_sleb, tmp_path, monkeypatch, source, damage, message):
    def write_badly(pruned, aside, copied, write=apply_gguf.write_gguf):
        write(pruned, aside, copied)
        aside.write_bytes(damage(aside.read_bytes()))

    monkeypatch.setattr(apply_gguf, "write_gguf", write_badly)
    names = sorted(os.listdir(tmp_path))
    result = run_sleb("apply", "--blocks", "1", "--source", source)
    assert (result.exit_code, message in result.stderr) == (9, True), result.stderr
    assert sorted(os.listdir(tmp_path)) == names


def test_a_file_that_computes_something_else_is_not_delivered(run_sleb, tmp_path, monkeypatch, source):
    def convert_badly(path, folder, notify, convert=apply_gguf.convert_gguf):
        convert(path, folder, notify)
        weights = folder / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.layers.0.mlp.up_proj.weight"] *= -1
        save_file(tensors, weights, metadata={"format": "pt"})

    monkeypatch.setattr(apply_gguf, "convert_gguf", convert_badly)
    result = run_sleb("apply", "--blocks", "1", "--source", source)
    assert (result.exit_code, "bytes of model.layers.0.mlp.up_proj" in result.stderr) == (9, True), result.stderr
    assert not list(tmp_path.glob("*blocks*"))


def test_no_room_is_said_before_anything_is_written(run_sleb, tmp_path, monkeypatch, source):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = run_sleb("apply", "--blocks", "1", "--source", source)
    assert (result.exit_code, "has only 1 kB free" in result.stderr) == (8, True), result.stderr


@pytest.fixture
def recovered(run_sleb, tmp_path, source, text_file):
    """Recover the tiny GGUF file without two blocks into `small.gguf`."""

    def run(*options, code=0):
        command = ("apply", source, "--blocks", "3,1", *calibration(text_file, samples=10), "-o", "small.gguf")
        result = run_sleb(*command, *options)
        assert result.exit_code == code, result.stderr
        assert sorted(tmp_path.glob(".small*")) == ([] if not code else [tmp_path / ".small.gguf.recovery"])
        return result

    return run


def test_a_recovered_file_that_fails_its_proof_is_kept(recovered, tmp_path, monkeypatch):
    def fail(*arguments):
        raise ProofError("It failed.", hint="Try again.")

    with monkeypatch.context() as patch:
        patch.setattr(apply_gguf, "prove", fail)
        result = recovered("--recover", "--keep-failed", "kept", code=9)
    assert "The fits so far are kept in" in result.stderr
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["small.gguf"]
    assert "fits of an interrupted run" in recovered("--recover").stderr


@pytest.mark.parametrize("type_", [Type.F32, Type.Q8_0, Type.Q4_1])
@pytest.mark.parametrize("options", [["--recover"], ["--recover", "--heal", "--heal-tokens", 512]])
def test_a_recovered_file_keeps_bytes_and_packs_new_values(recovered, tmp_path, source, type_, options):
    write_llama_gguf(source, 6, type_)
    result = json.loads(recovered(*options, "--json").stdout)
    assert result["recovery"]["pruned"]["divergence"] > 0
    before, after = tensors_of(source), tensors_of(tmp_path / "small.gguf")
    numbers = {new: old for new, old in enumerate((0, 2, 4, 5))}
    was = {name: re.sub(r"blk\.(\d+)", lambda found: f"blk.{numbers[int(found[1])]}", name) for name in after}
    new = [name for name in after if after[name] != before[was[name]]]
    assert 0 < len(new) <= sum(kind["tensors"] for kind in result["repacked"])
    packed = {(kind["before"], kind["type"]) for kind in result["repacked"]}
    assert {(before[was[name]][0].name, after[name][0].name) for name in new} <= packed
    assert packed <= {(type_.name, "Q8_0" if type_ is Type.Q4_1 else type_.name), ("F32", "F32")}
    assert after["token_embd.weight"] == before["token_embd.weight"]
    proof = result["proof"]
    assert (proof["reference"], proof["logits_difference"]) == ("recovered", 0)


def test_losses_are_those_of_what_the_file_gives_back(recovered, source, text_file, tmp_path):
    write_llama_gguf(source, 6, Type.Q4_0)
    record = json.loads(recovered("--recover", "--json").stdout)["recovery"]
    reported = reported_tokens(tmp_path / "origin", text_file, record)
    dense, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.bfloat16)(reported)
        .logits[:, :-1]
        .float()
        .log_softmax(-1)
        for name in (source.name, "small.gguf")
    )
    loss = -ours.gather(-1, reported[:, 1:, None]).mean()
    divergence = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert record["closed_form_losses"]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert record["closed_form_losses"]["divergence"] == pytest.approx(divergence.item(), rel=2e-2)


def test_an_interrupted_healing_of_a_file_goes_on_to_the_same_bytes(recovered, tmp_path, monkeypatch):
    healing_options = ("--heal", "--heal-tokens", 4096)
    recovered(*healing_options)
    whole = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "small.gguf").unlink()
    with monkeypatch.context() as patches:
        interrupt_healing(patches, 3)
        recovered(*healing_options, code=130)
    assert not (tmp_path / "small.gguf").exists()
    recovered(*healing_options, "--resume", "--source", tmp_path / "tiny.gguf")
    assert (tmp_path / "small.gguf").read_bytes() == whole


def test_the_screen_tells_new_values_from_copied_bytes(recovered):
    told = " ".join(recovered("--recover").stdout.split())
    assert re.search(
        r"proven in .*: tensors with new values: \d+ Q8_0.*; every other one is a byte-for-byte copy", told
    )

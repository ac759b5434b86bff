"""`sleb apply`, through `main()`."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conftest import beside_weights, llama_config, save_model, train_tokenizer, weights_of
from sleb_cli import atomic
from sleb_cli.engine.files import copying, shards
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.output import apply as engine
from sleb_cli.engine.output import proof
from sleb_cli.plan import read_plan

CHECKS = ("complete", "same bytes", "loads", "same logits", "generates", "saves again")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def apply(run_sleb):
    """Apply something to the folder `out`, and give the result."""

    def run(*options, code=0, output="out"):
        result = run_sleb("apply", *options, "-o", output)
        assert result.exit_code == code, result.stderr
        return result

    return run


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", llama_config(3))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def test_the_plan_in_this_folder_is_applied(run_sleb, llama_plan, tiny_llama, tmp_path):
    llama_plan.rename(tmp_path / "plan.json")
    result = run_sleb("apply")
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "tiny-llama-sleb-4-blocks"
    assert f"wrote {folder.name}: 4 blocks" in result.stdout
    assert "bitwise equal" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(folder)("river").input_ids
    others = beside_weights(os.listdir(tiny_llama))
    assert beside_weights(os.listdir(folder)) == others | {"README.md", "sleb_plan.json"}
    assert result.stderr.count("proven: ") == len(CHECKS)
    plan = read_plan(folder / "sleb_plan.json")
    recorded = plan.proof.to_data()
    found = [recorded[key] for key in ("partial", "dtype", "logits_difference", "prompt_tokens")]
    assert (tuple(recorded["checks"]), found) == (CHECKS, [None, "float32", 0.0, 64])
    assert plan.model_copy(update={"proof": None}) == read_plan(tmp_path / "plan.json").published()
    card = (folder / "README.md").read_text()
    for words in (
        ", ".join(map(str, plan.removals)),
        f"{plan.dense.perplexity:.2f}",
        "equal to those of the base model",
        "- transformers saves it again",
    ):
        assert words in card
    assert "partial" not in card
    assert json.loads(run_sleb("apply", "--force", "--json").stdout)["proof"] == recorded
    # With its proof the plan is still a plan.
    again = run_sleb("apply", folder / "sleb_plan.json", "--model", tiny_llama, "--remove", 1, "--no-verify")
    assert again.exit_code == 0, again.stderr
    assert read_plan(tmp_path / "tiny-llama-sleb-5-blocks" / "sleb_plan.json").proof is None


def test_other_files_come_along_but_not_other_formats(apply, model, tmp_path):
    kept = [
        "LICENSE", "templates/chat.jinja", "tekken.json", "modeling_x.py", "chat_template.jinja", "USE_POLICY.md",
        "odd näme [1].txt",
    ]  # fmt: skip
    left = [
        "original/params.json", "original/consolidated.00.pth", "consolidated.safetensors", "params.json",
        "tf_model.h5", "onnx/model.onnx", "onnx/model.json", "model.Q4_K_M.gguf", "pytorch_model.bin.index.json",
        "old.bin",
    ]  # fmt: skip
    for name in [*kept, *left, "README.md"]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    write_config(model, time_step_limit=[0.0, float("inf")])
    result, out = apply(model, "--blocks", "1"), tmp_path / "out"
    assert config_of(out)["time_step_limit"] == [0.0, float("inf")]
    assert all((out / name).read_text() == name for name in kept)
    assert not any((out / name).exists() for name in left)
    names = "consolidated.safetensors, model.Q4_K_M.gguf, old.bin, onnx/, original/, params.json, tf_model.h5"
    assert f"Not copied, because they hold the model in other formats: {names}." in result.stderr
    assert "chosen by hand" in (out / "README.md").read_text()


def test_links_out_of_the_folder_are_not_followed(apply, model, tmp_path):
    (tmp_path / "private" / "sub").mkdir(parents=True)
    (tmp_path / "private" / "key").write_text('{"token": "secret"}')
    (model / "templates").mkdir()
    (model / "templates" / "chat.jinja").write_text("x")
    for name, target in {
        "LICENSE": "../private/key", "data": "../private",
        "templates/more": "../../private/sub", "templates/key": "../../private/key",
        "again.jinja": "templates/chat.jinja",
    }.items():  # fmt: skip
        (model / name).symlink_to(target)
    result, out = apply(model, "--blocks", "1", "-q"), tmp_path / "out"
    assert not any(b"secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    names = "LICENSE, data, templates/key, templates/more"
    assert f"because they are links out of the model's folder: {names}." in " ".join(result.stderr.split())
    assert (out / "templates" / "chat.jinja").read_text() == (out / "again.jinja").read_text() == "x"


def test_without_room_nothing_is_written(apply, tiny_llama, tmp_path, monkeypatch):
    half = (tiny_llama / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=half))
    monkeypatch.setattr(shards, "_write_shard", None)
    told = apply(tiny_llama, "--blocks", "1", code=8).stderr
    assert re.search(r"\S+ kB must be written, but the disk of /\S+ has only \S+ kB free", told)
    assert os.listdir(tmp_path) == []


def test_inside_the_models_own_folder(run_sleb, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", llama_config(4))
    monkeypatch.chdir(folder)
    before = set(os.listdir())
    for blocks, name in (("1", "model-sleb-3-blocks"), ("1,2", "model-sleb-2-blocks")):
        assert run_sleb("apply", ".", "--blocks", blocks).exit_code == 0
        assert beside_weights(os.listdir(name)) == beside_weights(before) | {"README.md"}


def shards_of(folder):
    return sorted(folder.glob("model*.safetensors"))


@pytest.mark.parametrize(
    ("stored", "cast"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_a_tied_head_stays_tied_in_another_data_type(apply, tmp_path, stored, cast):
    """Whether or not the files hold it besides the embeddings."""
    config = llama_config(4, tie_word_embeddings=True, dtype=getattr(torch, stored))
    folder = save_model(tmp_path / "model", config)
    alone = load_file(folder / "model.safetensors")
    embeddings = alone["model.embed_tokens.weight"]
    assert (embeddings.dtype, "lm_head.weight" in alone) == (getattr(torch, stored), False)
    for number, tensors in enumerate((alone, {**alone, "lm_head.weight": embeddings.clone()})):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        result = apply(folder, "--blocks", "1", "--dtype", cast, "--json", output=f"out{number}")
        found = json.loads(result.stdout)
        assert (found["dtype"], found["proof"]["logits_difference"]) == (cast, 0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}", dtype="auto")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embeddings.to(getattr(torch, cast)))


@pytest.mark.parametrize(
    ("before", "spelling"),
    [
        ({}, None),
        ({"torch_dtype": "float32"}, "torch_dtype"),
        ({"torch_dtype": None, "dtype": "float32"}, "dtype"),
        ({"torch_dtype": "float32", "dtype": None}, "dtype"),
        ({"torch_dtype": "float16", "dtype": "float32"}, "dtype"),
    ],
    ids=str,
)
def test_a_config_names_one_data_type_in_one_spelling(apply, model, tmp_path, before, spelling):
    config = config_of(model)
    del config["dtype"]
    nested = {"audio_config": before | {"inner": before}, "vision_config": before}
    (model / "config.json").write_text(json.dumps(config | before | nested))
    for dtype, *options in (("float32",), ("bfloat16", "--dtype", "bf16")):
        apply(model, "--blocks", "1", "--force", "--no-verify", *options)
        written = config_of(tmp_path / "out")
        places = (written, written["audio_config"]["inner"], written["vision_config"])
        found = [{key: place[key] for key in ("dtype", "torch_dtype") if key in place} for place in places]
        inner = {spelling: dtype} if spelling else {}
        assert found == [inner or ({"dtype": dtype} if options else {}), inner, inner]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
        assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {getattr(torch, dtype)}


def test_unchanged_weight_files_are_hard_links(apply, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "_reflink", lambda *arguments: False)  # as where the file system has none
    folder = save_model(tmp_path / "sharded", llama_config(), max_shard_size="60KB")
    result = apply(folder, "--blocks", "4,5", "--max-shard-size", "60KB")
    before, after = shards_of(folder), shards_of(tmp_path / "out")
    unchanged = {path.read_bytes() for path in before} & {path.read_bytes() for path in after}
    assert len(before) > len(after) > len(unchanged) > 1
    links = [path for path in after if path.stat().st_nlink == 2]
    assert len(links) == len(unchanged)
    assert f"{len(links)} of {len(after)} weight files are unchanged and are hard links" in result.stderr


def packed_contents(place):
    """Return data type, shape and bytes of every tensor of a folder."""
    return {
        tensor.name: (tensor.dtype, tensor.shape, header.path.read_bytes()[tensor.start : tensor.start + tensor.size])
        for header in find_weights(place).headers
        for tensor in header.tensors
    }


def test_a_quantized_checkpoint_keeps_its_packed_tensors(apply, tmp_path):
    """As GPTQ, fine-grained fp8 and compressed-tensors write them, all in one, which nothing could load."""
    folder = save_model(tmp_path / "model", llama_config(6))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        module = name.removesuffix(".weight")
        tensors |= {
            name: tensors[name].to(torch.float8_e4m3fn),
            f"{module}.qweight": torch.randint(-(2**31), 2**31, (4, 3), dtype=torch.int32),
            f"{module}.scales": torch.rand(5).half(),
            f"{module}.weight_scale_inv": torch.rand(()),
            f"{module}.weight_packed": torch.randint(0, 255, (3, 5), dtype=torch.uint8),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "dynamic": {r"-:model\.layers\.2\..*": {}, r"+:model\.layers\.4\.mlp\..*": {"bits": 8}},
        "ignore": ["lm_head", "model.layers.5.mlp.down_proj"],
    }
    write_config(folder, quantization_config=settings)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"):
        (folder / name).write_text(json.dumps(settings))
    apply(folder, "--blocks", "2,0", "--no-verify")

    new_number = {1: 0, 3: 1, 4: 2, 5: 3}
    expected = {}
    for name, tensor in packed_contents(folder).items():
        block = re.match(r"model\.layers\.(\d+)\.", name)
        if block is None:
            expected[name] = tensor
        elif int(block[1]) in new_number:
            expected[f"model.layers.{new_number[int(block[1])]}.{name[block.end() :]}"] = tensor
    assert len(expected) > 150
    assert packed_contents(tmp_path / "out") == expected
    renumbered = settings | {
        "dynamic": {r"+:model\.layers\.2\.mlp\..*": {"bits": 8}},
        "ignore": ["lm_head", "model.layers.3.mlp.down_proj"],
    }
    assert config_of(tmp_path / "out")["quantization_config"] == renumbered
    written = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*quant*.json")]
    assert written == [renumbered] * 4


def test_a_snapshot_in_a_hub_cache_is_left_alone(apply, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for path in save_model(tmp_path / "model", llama_config(), max_shard_size="60KB").iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (folder / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    apply(folder, "--blocks", "5")
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_checkpoint_of_pickles_becomes_safetensors(apply, tiny_llama, tmp_path):
    apply(tiny_llama, "--blocks", "2", "--no-verify", output="other")
    folder, expected = tmp_path / "pickled", weights_of(tmp_path / "other")
    AutoModelForCausalLM.from_pretrained(tiny_llama).config.save_pretrained(folder)
    train_tokenizer(bos=False).save_pretrained(folder)
    for legacy in (False, True):
        torch.save(weights_of(tiny_llama), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        apply(folder, "--blocks", "2", "--force")
        assert not (tmp_path / "out" / "pytorch_model.bin").exists()
        found = weights_of(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_broken_weights_are_refused(apply, model):
    path = model / "model.safetensors"
    tensors = weights_of(model)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "missing, such as model.norm.weight" in apply(model, "--blocks", "1", code=4).stderr
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in apply(model, "--blocks", "1", code=4).stderr
    path.unlink()
    os.mkfifo(path)
    assert "model.safetensors is a pipe or a device" in apply(model, "--blocks", "1", code=4).stderr


def test_a_model_without_tokenizer_is_proven_on_random_tokens(apply, model):
    for path in model.glob("token*"):
        path.unlink()
    assert json.loads(apply(model, "--blocks", "1", "--json").stdout)["proof"]["prompt"] == "random tokens"


def test_a_plan_for_another_model_is_refused_unless_told(apply, llama_plan, tiny_opt, tiny_llama, tmp_path):
    told = apply(llama_plan, "--model", tiny_opt, code=3).stderr
    assert "was made for" in told
    assert "model_type: opt, not llama" in told
    other = save_model(tmp_path / "other", llama_config(), seed=1)
    assert "fingerprint" in apply(llama_plan, "--model", other, code=3).stderr
    assert not (tmp_path / "out").exists()
    apply(llama_plan, "--model", other, "--any-model")
    shutil.copytree(tiny_llama, tmp_path / "moved")
    apply(llama_plan, "--model", tmp_path / "moved", output="same model")


def test_only_force_replaces_a_checkpoint_and_nothing_else(apply, model, tmp_path):
    apply(model, "--blocks", "1")
    mark = tmp_path / "out" / "mark"
    mark.touch()
    assert "out already exists" in apply(model, "--blocks", "1", code=8).stderr
    assert mark.exists()
    apply(model, "--blocks", "1", "--force")
    assert not mark.exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    apply(model, "--blocks", "1", "--force", code=8, output="thesis")
    assert (tmp_path / "thesis" / "thesis.tex").exists()
    for output in (model, tmp_path):
        assert "contains the source model" in apply(model, "--blocks", "1", "--force", code=8, output=output).stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "No blocks given"),
        (("--blocks", "1,1"), 2, "named twice"),
        (("--blocks", "6"), 2, "no block 6"),
        (("--blocks", "-1"), 2, "no block -1"),
        (("--blocks", "a"), 2, "not a list of numbers"),
        (("--blocks", ""), 2, "not a list of numbers"),
        (("--blocks", "0,1,2,3,4,5"), 2, "All 6 blocks"),
        (("--blocks", "1,2", "--remove", 3), 2, "Cannot remove 3 blocks: --blocks names 2"),
        (("--blocks", "1", "--model", "x"), 2, "--model applies to a plan"),
        (("--blocks", "1", "--max-shard-size", "big"), 2, "not a size"),
        (("--blocks", "1", "--dtype", "int3"), 2, "no data type"),
        (("--blocks", "1", "--keep-failed", "kept", "--no-verify"), 2, "--keep-failed requires the proof"),
        (("--blocks", "1", "-o", "no/out"), 8, "folder does not exist"),
        (("--blocks", "1", "-o", "/proc/out"), 8, "Cannot write /proc/out"),
    ],
)
def test_what_cannot_be_is_refused(run_sleb, tiny_llama, tmp_path, options, code, message):
    result = run_sleb("apply", tiny_llama, *options)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert os.listdir(tmp_path) == []


def test_no_plan_and_no_model(run_sleb):
    result = run_sleb("apply")
    assert (result.exit_code, "There is no plan plan.json" in result.stderr) == (3, True)
    assert run_sleb("apply", "plan.json", "--blocks", "1").exit_code == 2


def spoil(monkeypatch, change):
    """Let the weights go wrong before the proof."""

    def prove_wrong(reference, folder, *arguments, prove=engine.prove):
        wrong = change(weights_of(folder))
        for path in shards_of(folder):
            own = {name: wrong[name] for name in load_file(path)}
            path.unlink()  # it may be the source's, linked
            save_file(own, path, metadata={"format": "pt"})
        return prove(reference, folder, *arguments)

    monkeypatch.setattr(engine, "prove", prove_wrong)


def too_little_memory(monkeypatch):
    monkeypatch.setattr(proof, "free_bytes", lambda device: 1000)


def test_a_partial_proof_that_fails_leaves_nothing(apply, tiny_llama, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda t: t | {UP: torch.nextafter(t[UP], torch.tensor(9.0))})
    too_little_memory(monkeypatch)
    told = apply(tiny_llama, "--blocks", "1", code=9).stderr
    assert f"the bytes of {UP} are not those of model.layers.2.mlp.up_proj.weight in the dense model" in told
    assert os.listdir(tmp_path) == []
    assert "not verified" in apply(tiny_llama, "--blocks", "1", "--no-verify").stdout


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "what enters the first block differs already"),
        (UP, "its block 1, which is block 2 of the dense model, is the first whose output differs, by"),
        ("model.norm.weight", "every block's output is the same, so the final norm or the head differs"),
    ],
)
def test_a_failed_proof_says_where_and_keeps_the_evidence(apply, tiny_llama, tmp_path, monkeypatch, name, where):
    spoil(monkeypatch, lambda t: t | {name: t[name] * 1.1})
    monkeypatch.setattr(proof, "_as_planned", lambda *arguments: iter(()))  # as if it had been planned so
    command = [tiny_llama, "--blocks", "1", "--keep-failed", "kept/here"]
    told = apply(*command, code=9).stderr
    assert where in told
    assert "What was written is in kept/here." in told
    assert os.listdir(tmp_path) == ["kept"]
    assert not torch.equal(weights_of(tmp_path / "kept/here")[name], weights_of(tiny_llama)[name])
    assert "kept/here already exists." in apply(*command, code=8).stderr


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")])
def test_a_proof_without_memory_is_partial_and_says_so(apply, llama_plan, tmp_path, monkeypatch, options):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(proof, "open_dense", None)
    result = apply(llama_plan, *options)
    reason = r"two of its blocks at a time need \d+ kB of memory, and 10 kB are free"
    assert re.search(rf"partially proven in \w+ on cpu: every .*; {reason}", result.stdout)
    assert "The proof is partial" in result.stderr
    recorded = read_plan(tmp_path / "out" / "sleb_plan.json").proof
    assert (recorded.checks, recorded.logits_difference) == (CHECKS[:3], None)
    assert re.fullmatch(reason, recorded.partial)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**The proof is partial**: {recorded.partial}." in card
    assert "logits" not in card


def test_without_room_to_save_it_again_the_proof_is_partial(apply, tiny_llama, tmp_path, monkeypatch):
    free = [10**9, 10**9, 1000]  # twice before the weights are written, and after
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free.pop(0)))
    result = apply(tiny_llama, "--blocks", "1")
    reason = r"saving it again needs \d+ kB on the disk, and 1 kB are free"
    assert re.search(f"partially proven .* are bitwise equal .*; {reason}", result.stdout)
    assert re.search(rf"\*\*The proof is partial\*\*: {reason}", (tmp_path / "out" / "README.md").read_text())


def refuse(self, *arguments, **options):
    raise ValueError("layer_types has 6 entries")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("save_pretrained", "does not save it again: layer_types has 6 entries"),
        ("generate", "does not generate with the KV cache: layer_types has 6 entries"),
    ],
)
def test_a_model_that_transformers_refuses_fails_the_proof(apply, tiny_llama, tmp_path, monkeypatch, method, message):
    monkeypatch.setattr(LlamaForCausalLM, method, refuse)
    assert message in apply(tiny_llama, "--blocks", "1", code=9).stderr
    assert os.listdir(tmp_path) == []


def test_a_data_type_too_small_for_the_model_is_named(apply, model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 60_000
    save_file(tensors, path, metadata={"format": "pt"})
    result = apply(model, "--blocks", 1, "--dtype", "float16", code=4)
    assert "computes NaN or infinity in float16" in result.stderr
    apply(model, "--blocks", 1, "--dtype", "bfloat16")

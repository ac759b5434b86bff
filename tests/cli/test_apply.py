"""`sleb apply`, through `main()`."""

import dataclasses
import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import beside_weights, llama_config, save_model, train_tokenizer, weights_of
from sleb_cli.engine.files import copying
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.output import apply as engine
from sleb_cli.engine.output import proof
from sleb_cli.plan import read_plan


def test_the_plan_beside_you_is_applied(run_sleb, llama_plan, tiny_llama, tmp_path):
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
    plan = read_plan(folder / "sleb_plan.json")
    assert plan.proof
    assert plan.model_copy(update={"proof": None}) == read_plan(tmp_path / "plan.json").published()
    card = (folder / "README.md").read_text()
    assert ", ".join(map(str, plan.removals)) in card
    assert f"{plan.dense.perplexity:.2f}" in card
    assert "equal to those of the base model" in card


def test_fewer_removals_of_the_same_plan(run_sleb, llama_plan, tmp_path):
    assert run_sleb("apply", llama_plan, "--remove", 1, "-o", "out").exit_code == 0
    plan = read_plan(llama_plan)
    written = read_plan(tmp_path / "out" / "sleb_plan.json")
    assert written == plan.first(1).model_copy(update={"proof": written.proof}).published()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 5


def test_small_files_come_along_and_weights_do_not(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(3))
    (folder / "LICENSE").write_text("licence")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("x")
    (folder / "old.bin").write_text("x")
    (folder / "README.md").write_text("the base model's own")
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "LICENSE").read_text() == "licence"
    assert (tmp_path / "out" / "templates" / "chat.jinja").exists()
    assert not (tmp_path / "out" / "old.bin").exists()
    assert "Not copied, because they hold the model in other formats: old.bin." in result.stderr
    assert "chosen by hand" in (tmp_path / "out" / "README.md").read_text()


def test_the_model_in_other_formats_is_left_out_with_a_word(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(3))
    kept = ["tekken.json", "modeling_x.py", "chat_template.jinja", "USE_POLICY.md", "odd näme [1].txt"]
    left = [
        "original/params.json", "original/consolidated.00.pth", "consolidated.safetensors", "params.json",
        "tf_model.h5", "onnx/model.onnx", "onnx/model.json", "model.Q4_K_M.gguf", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert all((out / name).read_text() == name for name in kept)
    assert not any((out / name).exists() for name in left)
    names = "consolidated.safetensors, model.Q4_K_M.gguf, onnx/, original/, params.json, tf_model.h5"
    assert f"in other formats: {names}." in result.stderr


def test_weights_that_are_no_file_of_the_folder_are_named(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(3))
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 4
    assert "model.safetensors links to a file outside the model's folder" in result.stderr
    path.unlink()
    os.mkfifo(path)
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 4
    assert "model.safetensors is a pipe or a device, not a file" in result.stderr


def test_without_room_nothing_is_written(run_sleb, tiny_llama, tmp_path, monkeypatch):
    from sleb_cli import atomic
    from sleb_cli.engine.files import shards

    sizes = tiny_llama / "model.safetensors"
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=sizes.stat().st_size // 2))
    monkeypatch.setattr(shards, "_write_shard", None)
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 8
    assert re.search(r"\S+ kB must be written, but the disk of /\S+ has only \S+ kB free", result.stderr)
    assert os.listdir(tmp_path) == []


def test_inside_the_models_own_folder(run_sleb, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", llama_config(4))
    monkeypatch.chdir(folder)
    before = set(os.listdir())
    for blocks, name in (("1", "model-sleb-3-blocks"), ("1,2", "model-sleb-2-blocks")):
        assert run_sleb("apply", ".", "--blocks", blocks).exit_code == 0
        assert beside_weights(os.listdir(name)) == beside_weights(before) | {"README.md"}


def test_a_config_may_hold_infinity(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(3))
    config = json.loads((folder / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_sleb("apply", folder, "--blocks", "1", "-o", "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


def shards_of(folder):
    return sorted(path for path in folder.glob("model*.safetensors"))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("cast", ["float32", "bfloat16", "float16"])
def test_a_tied_head_stays_tied_in_another_data_type(run_sleb, tmp_path, stored, cast):
    """Whether or not the files hold it beside the embeddings."""
    config = llama_config(4, tie_word_embeddings=True, dtype=getattr(torch, stored))
    folder = save_model(tmp_path / "model", config)
    alone = load_file(folder / "model.safetensors")
    embeddings = alone["model.embed_tokens.weight"]
    assert (embeddings.dtype, "lm_head.weight" in alone) == (getattr(torch, stored), False)
    for number, tensors in enumerate((alone, {**alone, "lm_head.weight": embeddings.clone()})):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        output = tmp_path / f"out{number}"
        result = run_sleb("apply", folder, "--blocks", "1", "--dtype", cast, "-o", output, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["proof"]["logits_difference"] == 0
        model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embeddings.to(getattr(torch, cast)))


def test_shards(run_sleb, tiny_llama, tmp_path):
    folder = save_model(tmp_path / "sharded", llama_config(), max_shard_size="60KB")
    assert len(shards_of(folder)) > 2
    assert run_sleb("apply", folder, "--blocks", "1,3", "-o", "out", "--max-shard-size", "50KB").exit_code == 0
    assert run_sleb("apply", tiny_llama, "--blocks", "1,3", "-o", "single").exit_code == 0
    assert len(shards_of(tmp_path / "out")) > 2
    assert max(path.stat().st_size for path in shards_of(tmp_path / "out")) < 60_000
    single = weights_of(tmp_path / "single")
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert single
    assert all(torch.equal(sharded[name], tensor) for name, tensor in single.items())


def test_weight_files_that_do_not_change_are_the_models_own(run_sleb, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "_reflink", lambda *arguments: False)  # as where the file system has none
    folder = save_model(tmp_path / "sharded", llama_config(), max_shard_size="60KB")
    result = run_sleb("apply", folder, "--blocks", "4,5", "-o", "out", "--max-shard-size", "60KB")
    assert result.exit_code == 0, result.stderr
    before, after = shards_of(folder), shards_of(tmp_path / "out")
    unchanged = {path.read_bytes() for path in before} & {path.read_bytes() for path in after}
    assert len(before) > len(after) > len(unchanged) > 1
    links = [path for path in after if path.stat().st_nlink == 2]
    assert len(links) == len(unchanged)
    assert f"{len(links)} of {len(after)} weight files are unchanged and are hard links" in result.stderr


def packed_contents(place):
    """Return data type, shape and bytes of every tensor of a folder."""
    found = {}
    for header in find_weights(place).headers:
        content = header.path.read_bytes()
        for tensor in header.tensors:
            data = content[tensor.start : tensor.start + tensor.size]
            found[tensor.name] = (tensor.dtype, tensor.shape, data)
    return found


def test_a_quantized_checkpoint_keeps_its_packed_tensors(run_sleb, tmp_path):
    """As GPTQ, fine-grained fp8 and compressed-tensors write them, all in one, which nothing could load."""
    folder = save_model(tmp_path / "model", llama_config(6), max_shard_size="30KB")
    paths = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in paths:
        tensors = {}
        for name, tensor in load_file(path).items():
            if "_proj" not in name:
                tensors[name] = tensor
                continue
            module = name.removesuffix(".weight")
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{module}.qweight"] = torch.randint(-(2**31), 2**31, (4, 3), dtype=torch.int32)
            tensors[f"{module}.g_idx"] = torch.arange(4, dtype=torch.int32)
            tensors[f"{module}.scales"] = torch.rand(5).half()
            tensors[f"{module}.weight_scale_inv"] = torch.rand(())
            tensors[f"{module}.weight_packed"] = torch.randint(0, 255, (3, 5), dtype=torch.uint8)
        save_file(tensors, path, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "dynamic": {r"-:model\.layers\.2\..*": {}, r"+:model\.layers\.4\.mlp\..*": {"bits": 8}},
        "ignore": ["lm_head", "model.layers.5.mlp.down_proj"],
    }
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"):
        (folder / name).write_text(json.dumps(settings))
    result = run_sleb("apply", folder, "--blocks", "2,0", "-o", "out", "--no-verify")
    assert result.exit_code == 0, result.stderr

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
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == renumbered
    written = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*quant*.json")]
    assert written == [renumbered] * 4


def test_quantization_settings_that_cannot_be_renumbered_leave_nothing(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(6))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "ignore": [r"re:.*[45]\.mlp.*"]}
    (folder / "config.json").write_text(json.dumps(config))
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 4
    assert "cannot be renumbered exactly" in result.stderr
    assert os.listdir(tmp_path) == ["model"]


def test_a_snapshot_in_a_hub_cache_is_left_alone(run_sleb, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for path in save_model(tmp_path / "model", llama_config(), max_shard_size="60KB").iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (folder / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    assert run_sleb("apply", folder, "--blocks", "5", "-o", "out").exit_code == 0
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_link_out_of_the_folder_is_not_followed(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(3))
    (tmp_path / "private" / "sub").mkdir(parents=True)
    (tmp_path / "private" / "key").write_text('{"token": "secret"}')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("x")
    for name, target in {
        "LICENSE": "../private/key", "data": "../private",
        "templates/more": "../../private/sub", "templates/key": "../../private/key",
        "again.jinja": "templates/chat.jinja",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out", "-q")
    assert result.exit_code == 0, result.stderr
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    names = "LICENSE, data, templates/key, templates/more"
    assert f"because they are links out of the model's folder: {names}." in " ".join(result.stderr.split())
    assert (tmp_path / "out" / "templates" / "chat.jinja").read_text() == "x"
    assert (tmp_path / "out" / "again.jinja").read_text() == "x"


def test_a_cast(run_sleb, tiny_llama, tmp_path):
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--dtype", "bf16", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["dtype"] == "bfloat16"
    assert {t.dtype for t in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("before", "kept", "cast"),
    [
        ({}, {}, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": None, "dtype": "float32"}, {"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": None}, {"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16", "dtype": "float32"}, {"dtype": "float32"}, {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_config_names_one_data_type_in_one_spelling(run_sleb, tmp_path, before, kept, cast):
    folder = save_model(tmp_path / "model", llama_config(3))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    nested = {"audio_config": before | {"inner": before}, "vision_config": before}
    (folder / "config.json").write_text(json.dumps(config | before | nested))
    for after, options, dtype in ((kept, (), torch.float32), (cast, ("--dtype", "bf16"), torch.bfloat16)):
        result = run_sleb("apply", folder, "--blocks", "1", "-o", "out", "--force", *options)
        assert result.exit_code == 0, result.stderr
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        places = (written, written["audio_config"]["inner"], written["vision_config"])
        found = [{key: place[key] for key in ("dtype", "torch_dtype") if key in place} for place in places]
        nested = after if before else {}
        assert found == [after, nested, nested]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_pickles_becomes_safetensors(run_sleb, tiny_llama, tmp_path, legacy):
    folder = tmp_path / "pickled"
    AutoModelForCausalLM.from_pretrained(tiny_llama).config.save_pretrained(folder)
    train_tokenizer(bos=False).save_pretrained(folder)
    tensors = weights_of(tiny_llama)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    result = run_sleb("apply", folder, "--blocks", "2", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert run_sleb("apply", tiny_llama, "--blocks", "2", "-o", "other").exit_code == 0
    ours, theirs = (weights_of(tmp_path / name) for name in ("out", "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pickle_that_is_not_safe_is_refused(run_sleb, tiny_llama, tmp_path):
    folder = save_model(tmp_path / "evil", llama_config(3))
    (folder / "model.safetensors").unlink()
    torch.save({"a": os.system}, folder / "pytorch_model.bin")
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 4
    assert "not safe to read" in result.stderr


def test_a_model_without_tokenizer_is_proven_on_random_tokens(run_sleb, tmp_path):
    folder = save_model(tmp_path / "bare", llama_config(3))
    for path in folder.glob("token*"):
        path.unlink()
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out", "--json")
    assert json.loads(result.stdout)["proof"]["prompt"] == "random tokens"


def test_a_plan_for_another_model_is_refused_unless_told(run_sleb, llama_plan, tiny_opt, tmp_path):
    result = run_sleb("apply", llama_plan, "--model", tiny_opt, "-o", "out")
    assert result.exit_code == 3
    assert "was made for" in result.stderr
    assert "model_type: opt, not llama" in result.stderr
    assert not (tmp_path / "out").exists()
    other = save_model(tmp_path / "other", llama_config(), seed=1)
    result = run_sleb("apply", llama_plan, "--model", other, "-o", "out")
    assert result.exit_code == 3
    assert "fingerprint" in result.stderr
    assert run_sleb("apply", llama_plan, "--model", other, "-o", "out", "--any-model").exit_code == 0


def test_a_model_that_moved_is_the_same_model(run_sleb, llama_plan, tiny_llama, tmp_path):
    import shutil

    shutil.copytree(tiny_llama, tmp_path / "moved")
    assert run_sleb("apply", llama_plan, "--model", tmp_path / "moved", "-o", "out").exit_code == 0


def test_an_output_that_exists(run_sleb, tiny_llama, tmp_path):
    def apply(*options):
        return run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", *options)

    assert apply().exit_code == 0
    (tmp_path / "out" / "mark").touch()
    result = apply()
    assert result.exit_code == 8
    assert "out already exists" in result.stderr
    assert (tmp_path / "out" / "mark").exists()
    assert apply("--force").exit_code == 0
    assert not (tmp_path / "out" / "mark").exists()


def test_force_replaces_no_folder_of_other_things(run_sleb, tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--force")
    assert result.exit_code == 8
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_the_model_itself_is_never_the_output(run_sleb, tmp_path):
    folder = save_model(tmp_path / "model", llama_config(3))
    before = (folder / "model.safetensors").read_bytes()
    for output in (folder, tmp_path):
        result = run_sleb("apply", folder, "--blocks", "1", "-o", output, "--force")
        assert result.exit_code == 8
        assert "contains the source model" in result.stderr
    assert (folder / "model.safetensors").read_bytes() == before


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
        (("--blocks", "1", "-o", "no/out"), 8, "folder does not exist"),
        (("--blocks", "1", "-o", "/proc/out"), 8, "Cannot write /proc/out"),
    ],
)
def test_what_cannot_be_is_refused(run_sleb, tiny_llama, tmp_path, options, code, message):
    result = run_sleb("apply", tiny_llama, *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert os.listdir(tmp_path) == []


def test_no_plan_and_no_model(run_sleb):
    result = run_sleb("apply")
    assert result.exit_code == 3
    assert "There is no plan plan.json" in result.stderr
    result = run_sleb("apply", "plan.json", "--blocks", "1")
    assert result.exit_code == 2


def spoil(monkeypatch, change):
    """Let the weights go wrong on their way to the disk."""
    write = engine.write_weights

    def write_wrong(folder, *arguments):
        size = write(folder, *arguments)
        right = weights_of(folder)
        wrong = change(right)
        added = {name: tensor for name, tensor in wrong.items() if name not in right}
        for path in sorted(folder.glob("model*.safetensors")):
            own = {name: wrong[name] for name in load_file(path) if name in wrong}
            save_file(own | added, path, metadata={"format": "pt"})
            added = {}
        return size

    monkeypatch.setattr(engine, "write_weights", write_wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"model.layers.1.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"] + 1e-3},
            "the bytes of model.layers.1.mlp.up_proj.weight are not those of model.layers.2.mlp.up_proj.weight in the",
        ),
        (lambda t: {n: x for n, x in t.items() if n != "model.norm.weight"}, "missing, such as model.norm.weight"),
        (lambda t: t | {"model.layers.5.mlp.up_proj.weight": torch.ones(1)}, "unexpected, such as model.layers.5"),
        (lambda t: t | {"model.norm.weight": torch.ones(3)}, "another type or shape, such as model.norm.weight"),
    ],
)
def test_a_failed_proof_leaves_nothing_and_says_which_check(
    run_sleb, tiny_llama, tmp_path, monkeypatch, change, message
):
    spoil(monkeypatch, change)
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9, result.stderr
    assert message in result.stderr
    assert os.listdir(tmp_path) == []
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out", "--no-verify")
    assert result.exit_code == 0
    assert "not verified" in result.stdout


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "what enters the first block differs already"),
        ("model.layers.1.mlp.up_proj.weight",
         "its block 1, which is block 2 of the dense model, is the first whose output differs, by"),
        ("model.norm.weight", "every block's output is the same, so the final norm or the head differs"),
    ],
)  # fmt: skip
def test_a_failed_proof_says_where_it_differs_first_and_keeps_the_evidence(
    run_sleb, tiny_llama, tmp_path, monkeypatch, name, where
):
    spoil(monkeypatch, lambda t: t | {name: t[name] * 1.1})
    monkeypatch.setattr(proof, "_as_planned", lambda *arguments: iter(()))  # as if it had been planned so
    command = ["apply", tiny_llama, "--blocks", "1", "-o", "out", "--keep-failed", "kept/here"]
    result = run_sleb(*command)
    assert result.exit_code == 9, result.stderr
    assert where in result.stderr
    assert "What was written is in kept/here." in result.stderr
    assert os.listdir(tmp_path) == ["kept"]
    assert not torch.equal(weights_of(tmp_path / "kept/here")[name], weights_of(tiny_llama)[name])
    assert "kept/here already exists." in run_sleb(*command).stderr
    assert run_sleb(*command[:-1], "other", "--no-verify").exit_code == 2


@pytest.mark.parametrize("too_large", [False, True])
def test_a_tokenizer_that_was_forgotten_fails_the_proof(run_sleb, tiny_llama, tmp_path, monkeypatch, too_large):
    if too_large:
        monkeypatch.setattr(proof, "free_bytes", lambda device: 1000)
    find = engine._find_other_files

    def forget(*arguments, **options):
        found = find(*arguments, **options)
        return replace(found, files=tuple(file for file in found.files if file.name != "tokenizer.json"))

    monkeypatch.setattr(engine, "_find_other_files", forget)
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9, result.stderr
    assert "its tokenizer " in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("too_large", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: None if name == "model.norm.weight" else name, "missing, such as model.norm.weight"),
        (lambda name: name.replace("layers.4.", "layers.5."), "missing, such as model.layers.4"),
        (lambda name: "model.layers.4.mlp.x.weight" if name == "lm_head.weight" else name, "missing, such as lm_head"),
        (lambda name: {"lm_head.weight": "model.norm.weight", "model.norm.weight": "lm_head.weight"}.get(name, name),
         "mismatched"),
    ],
)  # fmt: skip
def test_weights_under_wrong_names_fail_the_proof(
    run_sleb, tiny_llama, tmp_path, monkeypatch, change, message, too_large
):
    """The surgery itself goes wrong, so that the files are what was planned, and only transformers can tell."""
    if too_large:
        monkeypatch.setattr(proof, "free_bytes", lambda device: 1000)
    kept = engine.kept_tensors
    monkeypatch.setattr(
        engine,
        "kept_tensors",
        lambda *args: [dataclasses.replace(t, name=change(t.name)) for t in kept(*args) if change(t.name)],
    )
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9, result.stderr
    assert message in result.stderr
    assert "proven: complete" in result.stderr
    assert os.listdir(tmp_path) == []


def test_an_index_that_names_another_file_fails_the_proof(run_sleb, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "sharded", llama_config(), max_shard_size="60KB")
    write = engine.write_weights

    def write_wrong(folder, *arguments):
        size = write(folder, *arguments)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
        path.write_text(json.dumps(index))
        return size

    monkeypatch.setattr(engine, "write_weights", write_wrong)
    result = run_sleb("apply", folder, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9, result.stderr
    assert "index.json is not what was written: weight_map.model.norm.weight: model-0" in result.stderr


def test_each_check_is_told_and_recorded(run_sleb, llama_plan, tiny_llama, tmp_path):
    result = run_sleb("apply", llama_plan, "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["proof"]
    assert told["checks"] == ["complete", "same bytes", "loads", "same logits", "generates", "saves again"]
    assert told["partial"] is None
    assert (told["dtype"], told["logits_difference"], told["prompt_tokens"]) == ("float32", 0.0, 64)
    assert result.stderr.count("proven: ") == 6
    assert "proven: complete: 39 tensors in " in result.stderr
    assert read_plan(tmp_path / "out" / "sleb_plan.json").proof.to_data() == told
    card = (tmp_path / "out" / "README.md").read_text()
    assert "partial" not in card
    assert "- transformers saves it again" in card
    # With its proof the plan is still a plan.
    options = ["--model", tiny_llama, "--remove", 1, "-o", "again", "--no-verify"]
    assert run_sleb("apply", "out/sleb_plan.json", *options).exit_code == 0
    assert read_plan(tmp_path / "again" / "sleb_plan.json").proof is None


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")])
def test_the_proof_of_a_model_whose_blocks_are_larger_than_memory_is_partial_and_says_so(
    run_sleb, llama_plan, tmp_path, monkeypatch, options
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(proof, "open_dense", None)
    result = run_sleb("apply", llama_plan, "-o", "out", *options)
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r"partially proven: two of its blocks at a time need \d+ kB of memory, and 10 kB are free", result.stdout
    )
    assert "The proof is partial" in result.stderr
    recorded = read_plan(tmp_path / "out" / "sleb_plan.json").proof
    assert recorded.checks == ("complete", "same bytes", "loads")
    assert recorded.partial.startswith("two of its blocks")
    assert recorded.logits_difference is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**The proof is partial**: {recorded.partial}." in card
    assert "logits" not in card


def test_other_bytes_fail_the_partial_proof(run_sleb, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "free_bytes", lambda device: 1000)
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(monkeypatch, lambda t: t | {name: torch.nextafter(t[name], torch.tensor(9.0))})
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9, result.stderr
    assert f"the bytes of {name} are not those of model.layers.2.mlp.up_proj.weight" in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_model_that_does_not_save_again_fails_the_proof(run_sleb, tiny_llama, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def refuse(self, place, **options):
        raise ValueError("layer_types has 6 entries")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", refuse)
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9
    assert "does not save it again: layer_types has 6 entries" in result.stderr
    assert os.listdir(tmp_path) == []


def test_without_room_to_save_it_again_the_proof_is_partial(run_sleb, tiny_llama, tmp_path, monkeypatch):
    free = [10**9, 1000]  # before the weights are written, and after
    monkeypatch.setattr(proof.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free.pop(0)))
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 0, result.stderr
    reason = r"saving it again needs \d+ kB on the disk, and 1 kB are free"
    assert re.search(f"are bitwise equal .* not proven that it can be saved again: {reason}", result.stdout)
    assert re.search(rf"\*\*The proof is partial\*\*: {reason}", (tmp_path / "out" / "README.md").read_text())


def test_a_cache_that_goes_wrong_fails_the_proof(run_sleb, tiny_llama, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda self, ids, **options: (_ for _ in ()).throw(IndexError("hole"))
    )
    result = run_sleb("apply", tiny_llama, "--blocks", "1", "-o", "out")
    assert result.exit_code == 9
    assert "does not generate with the KV cache: IndexError hole" in result.stderr


def test_a_corrupt_weight_file_is_said_to_be_so(run_sleb, tmp_path):
    folder = save_model(tmp_path / "cut", llama_config(3))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    for command in (["apply", folder, "--blocks", "1"], ["search", folder, "--remove", 1, "--calibration", "self"]):
        result = run_sleb(*command)
        assert result.exit_code == 4
        assert "truncated" in result.stderr


def test_missing_weights_are_not_made_up(run_sleb, tmp_path):
    folder = save_model(tmp_path / "gap", llama_config(3))
    tensors = weights_of(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run_sleb("search", folder, "--remove", 1, "--calibration", "self", "--sequence-length", 16)
    assert result.exit_code == 4
    assert "missing, such as model.norm.weight" in result.stderr

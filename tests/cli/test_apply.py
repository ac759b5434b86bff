"""`sleb apply`, through `main()`."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from checkpoint_files import change_weights, config_of, write_config
from conftest import beside_weights, calibration, llama_config, save_model, shortage_at, weights_of
from sleb_cli import atomic
from sleb_cli.engine.files import shards
from sleb_cli.engine.forward import placement as forward_placement
from sleb_cli.engine.output import checkpoint as engine
from sleb_cli.engine.output import proof, proof_placement
from sleb_cli.plan import read_plan

CHECKS = ("complete", "same bytes", "loads", "same logits", "generates")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", llama_config(3))


def test_the_plan_in_this_folder_is_applied(sleb, apply, llama_plan, tiny_llama, tmp_path):
    llama_plan.rename(tmp_path / "plan.json")
    result = sleb("apply")
    folder = tmp_path / "tiny-llama-sleb-4-blocks"
    assert f"wrote {folder.name}: 4 blocks" in result.stdout
    assert "proven in float32 on cpu: matches the original without these blocks\n" in result.stdout
    assert f"&& transformers serve {folder.name}" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(folder)("river").input_ids
    others = beside_weights(os.listdir(tiny_llama))
    assert beside_weights(os.listdir(folder)) == others | {"README.md", "sleb_plan.json"}
    assert "proven" not in result.stderr
    plan = read_plan(folder / "sleb_plan.json")
    recorded = plan.proof.to_data()
    found = [recorded[key] for key in ("partial", "dtype", "logits_difference", "prompt_tokens")]
    assert (tuple(recorded["checks"]), found) == (CHECKS, [None, "float32", 0.0, 64])
    searched = read_plan(tmp_path / "plan.json").published()
    assert plan.model_copy(update={"proof": None, "checkpoint": None}) == searched
    card = (folder / "README.md").read_text()
    measured = (", ".join(map(str, plan.removals)), f"{plan.dense.perplexity:.2f}")
    assert all(words in card for words in (*measured, "equal to those of the base model"))
    assert "partial" not in card
    assert apply("--json").data["proof"] == recorded
    # With its proof the plan is still a plan.
    apply(
        folder / "sleb_plan.json",
        "--model",
        tiny_llama,
        "--remove 1 --no-verify",
        output="again",
    )
    assert read_plan(tmp_path / "again" / "sleb_plan.json").proof is None


def test_other_files_come_along_but_not_other_formats(apply, model, tmp_path):
    kept = ["LICENSE", "templates/chat.jinja", "tekken.json", "modeling_x.py", "odd näme [1].txt"]
    left = (
        "original/params.json original/consolidated.00.pth consolidated.safetensors params.json "
        "tf_model.h5 old.bin onnx/model.onnx model.Q4_K_M.gguf pytorch_model.bin.index.json"
    ).split()
    for name in [*kept, *left, "README.md"]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    write_config(model, time_step_limit=[0.0, float("inf")])
    result, out = apply(model, "--blocks 1"), tmp_path / "out"
    assert config_of(out)["time_step_limit"] == [0.0, float("inf")]
    assert all((out / name).read_text() == name for name in kept)
    assert not any((out / name).exists() for name in left)
    names = (
        "consolidated.safetensors, model.Q4_K_M.gguf, old.bin, onnx/, original/, params.json, "
        "tf_model.h5"
    )
    said = f"Did not copy files with weights in other formats or of an adapter: {names}."
    assert said in result.stderr
    assert "chosen by hand" in (out / "README.md").read_text()


def test_links_out_of_the_folder_are_not_followed(apply, model, tmp_path):
    (tmp_path / "private" / "sub").mkdir(parents=True)
    (tmp_path / "private" / "key").write_text("---\nlicense: secret\n---\n")
    (model / "templates").mkdir()
    (model / "templates" / "chat.jinja").write_text("x")
    for name, target in {
        "LICENSE": "../private/key",
        "README.md": "../private/key",
        "data": "../private",
        "templates/more": "../../private/sub",
        "templates/key": "../../private/key",
        "again.jinja": "templates/chat.jinja",
    }.items():
        (model / name).symlink_to(target)
    result, out = apply(model, "--blocks 1 -q"), tmp_path / "out"
    assert not any(b"secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    names = "LICENSE, data, templates/key, templates/more"
    assert f"Did not copy links that lead outside the model's folder: {names}." in " ".join(
        result.stderr.split()
    )
    assert (
        (out / "templates" / "chat.jinja").read_text() == (out / "again.jinja").read_text() == "x"
    )


def test_without_room_nothing_is_written(apply, tiny_llama, tmp_path, monkeypatch):
    half = (tiny_llama / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=half))
    monkeypatch.setattr(shards, "_write_tensors", None)
    told = apply(tiny_llama, "--blocks 1", code=8).stderr
    assert re.search(r"\S+ kB must be written, but the disk of /\S+ has only \S+ kB free", told)
    assert os.listdir(tmp_path) == []


def test_inside_the_models_own_folder(sleb, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", llama_config(4))
    monkeypatch.chdir(folder)
    before = set(os.listdir())
    for blocks, name in (("1", "model-sleb-3-blocks"), ("1,2", "model-sleb-2-blocks")):
        sleb("apply", ".", "--blocks", blocks)
        assert beside_weights(os.listdir(name)) == beside_weights(before) | {"README.md"}


@pytest.mark.parametrize(("stored", "cast"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_tied_head_stays_tied_in_another_data_type(apply, tmp_path, stored, cast):
    """Whether or not the files hold it besides the embeddings."""
    config = llama_config(4, tie_word_embeddings=True, dtype=getattr(torch, stored))
    folder = save_model(tmp_path / "model", config)
    alone = weights_of(folder)
    embeddings = alone["model.embed_tokens.weight"]
    assert (embeddings.dtype, "lm_head.weight" in alone) == (getattr(torch, stored), False)
    for number, tensors in enumerate((alone, {**alone, "lm_head.weight": embeddings.clone()})):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        result = apply(folder, "--blocks 1 --dtype", cast, "--json", output=f"out{number}")
        found = result.data
        assert (found["proof"]["dtype"], found["proof"]["logits_difference"]) == (cast, 0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}", dtype="auto")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embeddings.to(getattr(torch, cast)))


@pytest.mark.parametrize(
    ("before", "spelling"),
    [
        ({}, None),
        ({"torch_dtype": "float32"}, "torch_dtype"),
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
        apply(model, "--blocks 1 --force --no-verify", *options)
        written = config_of(tmp_path / "out")
        places = (written, written["audio_config"]["inner"], written["vision_config"])
        found = [
            {key: place[key] for key in ("dtype", "torch_dtype") if key in place}
            for place in places
        ]
        inner = {spelling: dtype} if spelling else {}
        assert found == [inner or ({"dtype": dtype} if options else {}), inner, inner]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
        assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {
            getattr(torch, dtype)
        }


def test_a_quantized_checkpoint_keeps_its_packed_tensors(apply, tmp_path):
    folder, out = save_model(tmp_path / "model", llama_config(6)), tmp_path / "out"
    name = "model.layers.{}.mlp.up_proj.qweight".format
    change_weights(
        folder,
        lambda dense: dense | {name(n): torch.tensor([n], dtype=torch.int32) for n in range(6)},
    )

    def settings(eighth, down):
        extra = {f"model.layers.{eighth}.mlp.up_proj": {"bits": 8}}
        ignore = ["lm_head", f"model.layers.{down}.mlp.down_proj"]
        return {"quant_method": "gptq", "bits": 4, "extra_config": extra, "ignore": ignore}

    before = settings(4, 5)
    before["extra_config"]["model.layers.2"] = {}
    write_config(folder, quantization_config=before)
    for file in (
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        "quantization_config.json",
    ):
        (folder / file).write_text(json.dumps(before))
    apply(folder, "--blocks 2,0 --no-verify")
    assert [weights_of(out)[name(n)].tolist() for n in range(4)] == [[1], [3], [4], [5]]
    assert config_of(out)["quantization_config"] == settings(2, 3)
    assert [json.loads(path.read_text()) for path in out.glob("*quant*.json")] == [
        settings(2, 3)
    ] * 4


def test_a_checkpoint_of_pickles_becomes_safetensors(apply, model, tmp_path):
    tensors = weights_of(model)
    (model / "model.safetensors").unlink()
    for legacy in (False, True):
        torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        apply(model, "--blocks 2 --force")
        assert not (tmp_path / "out" / "pytorch_model.bin").exists()
        found = weights_of(
            tmp_path / "out"
        )  # the last block is gone, so the others keep their names
        assert found.keys() == {name for name in tensors if "layers.2." not in name}
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


def test_a_missing_tensor_is_named(apply, model):
    change_weights(
        model,
        lambda tensors: {name: tensors[name] for name in tensors if name != "model.norm.weight"},
    )
    assert "missing, such as model.norm.weight" in apply(model, "--blocks 1", code=4).stderr


def test_a_model_without_tokenizer_is_proven_on_random_tokens(apply, model):
    for path in model.glob("token*"):
        path.unlink()
    assert apply(model, "--blocks 1 --json").data["proof"]["prompt"] == "random tokens"


def test_a_plan_for_another_model_is_refused_unless_told(
    apply, search, llama_plan, tiny_opt, tiny_llama, tmp_path
):
    told = apply(llama_plan, "--model", tiny_opt, code=3).stderr
    assert "was made for" in told
    assert "model_type: opt, not llama" in told
    other = save_model(tmp_path / "other", llama_config(), seed=1)
    assert "fingerprint" in apply(llama_plan, "--model", other, code=3).stderr
    assert not (tmp_path / "out").exists()
    apply(llama_plan, "--model", other, "--any-model")
    moved, made = (
        shutil.copytree(tiny_llama, tmp_path / "moved"),
        tmp_path / "out" / "sleb_plan.json",
    )
    apply(llama_plan, "--model", moved, output="same model")
    # From here on, the plan in the checkpoint is for the other model, but its scores are not that
    # model's.
    apply(made, "--model", other, output="again")
    assert "of another model" in (tmp_path / "again" / "README.md").read_text()
    assert "was made for other, but" in apply(made, "--model", moved, output="third", code=3).stderr
    assert (
        "was made for tiny-llama, but"
        in search("--extend", made, "--remove 3", model=other, code=3).stderr
    )


def test_only_force_replaces_a_checkpoint_and_nothing_else(apply, model, tmp_path):
    again = (model, "--blocks", "1")
    apply(*again)
    mark, thesis = tmp_path / "out" / "mark", tmp_path / "thesis" / "thesis.tex"
    mark.touch()
    assert "out already exists" in apply(*again, code=8).stderr
    assert mark.exists()
    apply(*again, "--force")
    assert not mark.exists()
    thesis.parent.mkdir()
    thesis.touch()
    apply(*again, "--force", code=8, output="thesis")
    assert thesis.exists()
    for output, why in ((model, "contains the source model"), (tmp_path, "is not a checkpoint")):
        assert why in apply(*again, "--force", code=8, output=output).stderr


def spoil(monkeypatch, change):
    """Let the weights go wrong before the proof."""

    def prove_wrong(reference, folder, *arguments, prove=engine.prove):
        change_weights(folder, change)
        return prove(reference, folder, *arguments)

    monkeypatch.setattr(engine, "prove", prove_wrong)


def test_a_partial_proof_that_fails_leaves_nothing(apply, tiny_llama, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda t: t | {UP: torch.nextafter(t[UP], torch.tensor(9.0))})
    monkeypatch.setattr(proof_placement, "memory_shortage", shortage_at(1000))
    told = apply(tiny_llama, "--blocks 1", code=9).stderr
    assert (
        f"the bytes of {UP} are not those of model.layers.2.mlp.up_proj.weight in the dense model"
        in told
    )
    assert os.listdir(tmp_path) == []
    assert "not verified" in apply(tiny_llama, "--blocks 1 --no-verify").stdout


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "the input of the first block already differs"),
        (
            UP,
            "its block 1, which is block 2 of the dense model, is the first whose output differs, "
            "by",
        ),
        (
            "model.norm.weight",
            "every block's output is the same, so the final norm or the head differs",
        ),
    ],
)
def test_a_failed_proof_says_where_and_keeps_the_evidence(
    apply, tiny_llama, tmp_path, monkeypatch, name, where
):
    spoil(monkeypatch, lambda t: t | {name: t[name] * 1.1})
    monkeypatch.setattr(proof, "check_files", lambda *arguments: [])  # as if it had been planned so
    command = [tiny_llama, "--blocks 1 --keep-failed kept/here"]
    told = apply(*command, code=9).stderr
    assert where in told
    assert "What was written is in kept/here." in told
    assert os.listdir(tmp_path) == ["kept"]
    assert not torch.equal(weights_of(tmp_path / "kept/here")[name], weights_of(tiny_llama)[name])
    assert "kept/here already exists." in apply(*command, code=8).stderr


@pytest.fixture
def other_rounding(monkeypatch):
    """Have the checkpoint's logits differ in some data types, as if kernels rounded otherwise."""

    def arrange(*dtypes):
        compute = proof._logits

        def rounded(model, ids):
            logits = compute(model, ids)
            return logits + 0.1 * logits.abs().max() if logits.dtype in dtypes else logits

        monkeypatch.setattr(proof, "_logits", rounded)

    return arrange


@pytest.fixture
def processor_for_all(monkeypatch):
    """Let the CPU compute in any data type, whether or not it has the units."""
    every = frozenset({torch.float32, torch.bfloat16, torch.float16})
    monkeypatch.setattr(forward_placement, "cpu_dtypes", lambda: every)


@pytest.mark.parametrize(
    ("dtype", "wider", "where"),
    [
        ("bfloat16", "float32", "--no-stream"),
        ("float16", "float32", "--stream"),
        ("bfloat16", "float32", "--device-map"),
        ("float32", "float64", "--no-stream"),
    ],
)
def test_a_wider_data_type_decides_if_logits_differ(
    apply, spread, tmp_path, monkeypatch, other_rounding, processor_for_all, dtype, wider, where
):
    model = save_model(tmp_path / "model", llama_config(4, dtype=getattr(torch, dtype)))
    place = spread(model, 0) if where == "--device-map" else [where]
    other_rounding(getattr(torch, dtype))
    result = apply(model, "--blocks 1", *place, "--json")
    assert f"{wider} decides, in a second comparison" in result.stderr
    found = result.data["proof"]
    assert (found["dtype"], found["logits_difference"]) == (wider, 0)
    monkeypatch.setattr(proof, "check_files", lambda *arguments: [])  # as if it had been planned
    spoil(monkeypatch, lambda t: t | {UP: t[UP] * 1.01})
    told = apply(model, "--blocks 1", *place, "--force", code=9).stderr
    assert re.search(r"differ .*float\d\d allows 0\).* its block 1, .* block 2 of the dense", told)


def test_without_memory_for_a_wider_data_type_a_difference_fails(
    apply, tiny_llama, monkeypatch, other_rounding
):
    other_rounding(torch.float32)
    monkeypatch.setattr(proof_placement, "has_float64", lambda device: False)
    told = apply(tiny_llama, "--blocks 1", code=9).stderr
    said = "float64, which would tell rounding from a fault, is out of reach: cpu does not compute"
    assert said in told


@pytest.mark.parametrize("cast", [(), ("--dtype", "bfloat16")], ids=["as stored", "cast"])
def test_a_recovery_is_compared_in_a_wider_data_type(
    apply, tmp_path, text_file, other_rounding, processor_for_all, cast
):
    config = llama_config(4, dtype=torch.float32 if cast else torch.bfloat16)
    model = save_model(tmp_path / "model", config)
    other_rounding(torch.bfloat16)
    recover = ("--recover --no-heal", *calibration(text_file, samples=20), *cast)
    found = apply(model, "--blocks 1", *recover, "--json").data["proof"]
    assert (found["dtype"], found["logits_difference"]) == ("float32", 0)


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")])
def test_a_proof_without_memory_is_partial_and_says_so(
    apply, llama_plan, tmp_path, monkeypatch, options
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(proof, "open_model", None)
    result = apply(llama_plan, *options)
    reason = r"two of its blocks at a time need \d+ kB of memory, but only 10 kB is free"
    assert re.search(rf"partially proven in \w+ on cpu: every .*; {reason}", result.stdout)
    assert "The proof is partial" in result.stderr
    recorded = read_plan(tmp_path / "out" / "sleb_plan.json").proof
    assert (recorded.checks, recorded.logits_difference) == (CHECKS[:3], None)
    assert re.fullmatch(reason, recorded.partial)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**The proof is partial**: {recorded.partial}." in card
    assert "logits" not in card


def test_a_model_that_does_not_generate_is_not_delivered(apply, tiny_llama, tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise ValueError("layer_types has 6 entries")

    monkeypatch.setattr(LlamaForCausalLM, "generate", refuse)
    told = apply(tiny_llama, "--blocks 1", code=4).stderr
    assert "does not generate with the KV cache: layer_types has 6 entries" in told
    assert os.listdir(tmp_path) == []


def test_a_broken_kv_cache_is_the_dense_model_s_fault(
    apply, search, tiny_llama, tmp_path, monkeypatch
):
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer,
        "update",
        lambda *given, **options: tuple(2 * x for x in update(*given, **options)),
    )
    said = "does not work with a KV cache"
    assert (
        f"warning: {tiny_llama} {said}: with the KV cache its logits differ"
        in search("--remove 1").stderr
    )
    told = apply(tmp_path / "plan.json", code=4).stderr
    assert f"{tiny_llama} {said}, whatever is removed" in told
    assert "Try again" not in told


def test_a_data_type_too_small_for_the_model_is_named(apply, model):
    change_weights(
        model,
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] * 60_000},
    )
    assert (
        "computes NaN or infinity in float16"
        in apply(model, "--blocks 1 --dtype float16", code=4).stderr
    )
    apply(model, "--blocks 1 --dtype bfloat16")

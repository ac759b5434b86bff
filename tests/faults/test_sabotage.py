"""Whatever is wrong with a checkpoint when `sleb apply` has written it, its proof refuses it, and nothing is delivered.

Each kind of damage (sabotage.py) is done to the finished folder or file, between writing and proof. It must be refused
twice: because it is not what was planned, and, where the model then computes something else, by transformers alone, as
if the plan itself had been wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from itertools import product

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

import gguf_models
from conftest import calibration, llama_config, opt_config, save_model
from families import tiny_config
from faults import sabotage
from faults.sabotage import BF16, F32, GEMMA, GGUF, HF, LISTS, LLAMA, OPT, Q8, RECOVERED, SHARDED, Made, MadeGguf
from sleb_cli.engine.gguf.file import Entry
from sleb_cli.engine.output import apply, apply_gguf, proof

REMOVED = (1, 4)
MODES = {"in memory": "--no-stream", "streamed": "--stream"}

CONFIGS = {
    LLAMA: llama_config,
    SHARDED: llama_config,
    BF16: lambda: llama_config(dtype=torch.bfloat16),
    GEMMA: lambda: tiny_config("gemma3_text"),
    OPT: lambda: opt_config(6),
}


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Make the dense model of a name and a seed, once."""
    made = {}

    def make(name, seed):
        if (name, seed) not in made:
            options = {"max_shard_size": "60KB"} if name == SHARDED else {}
            folder = tmp_path_factory.mktemp("dense") / "model"
            save_model(folder, CONFIGS[name](), seed=seed, bos=name == OPT, **options)
            made[name, seed] = with_everything(folder, quantize_config=name in (LLAMA, SHARDED))
        return made[name, seed]

    return make


def with_everything(folder, *, quantize_config):
    """Give a model biases that are not zero, and the files that a model may have beside its weights."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        torch.manual_seed(1)
        tensors |= {n: torch.randn_like(t) * 0.1 for n, t in tensors.items() if n.endswith("bias") and not t.any()}
        sabotage.save_file(tensors, path, metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    (folder / "LICENSE").write_text("Anyone may use this.\n")
    if quantize_config:
        settings = {"quant_method": "gptq", "bits": 4, "ignore": ["lm_head", "model.layers.5.mlp.down_proj"]}
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another model: other weights and another tokenizer."""
    folder = save_model(tmp_path_factory.mktemp("other") / "model", llama_config(), seed=99)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    sabotage.exchange_tokens(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache for all of these tests, so that a GGUF file is converted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def dense_gguf(tmp_path_factory):
    """Make the GGUF file of a kind and a seed, once."""
    made = {}

    def make(name, seed):
        if (name, seed) not in made:
            folder = tmp_path_factory.mktemp("gguf")
            made[name, seed] = make_gguf(folder / "tiny.gguf", name, seed)
        return made[name, seed]

    return make


def make_gguf(path, name, seed):
    if name == LISTS:
        values = {"attention.head_count_kv": [1, 2, 0, 3, 5, 4], "general.file_type": 0}
        return gguf_models.write_gguf(path, "llama", 6, values, alignment=32)
    torch.manual_seed(seed)
    gguf_models.write_llama_gguf(path, 6, {F32: Type.F32, Q8: Type.Q8_0}[name])
    template = b"{{ messages }}"
    more = [
        Entry("general.file_type", 4, sabotage.u32({F32: 0, Q8: 7}[name])),
        Entry("tokenizer.chat_template", 8, len(template).to_bytes(8, "little") + template),
    ]
    MadeGguf(path, path, ()).entries(lambda entries: [*entries, *more])
    return path


def content(path):
    """Return a hash of a folder or a file."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    parts = [file.name.encode() + b"\0" + file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@pytest.fixture
def damaged(monkeypatch):
    """Damage the next checkpoint or GGUF file between its writing and its proof."""

    def arrange(damage, dense, other=None, *, seed=0, as_planned=False):
        done = []

        def spoil(made, place):
            before, of_dense = content(place), content(dense)
            damage(made)
            assert content(place) != before, "nothing was damaged"
            assert content(dense) == of_dense, "the dense model was damaged too"
            done.append(place)

        def prove_damaged(reference, folder, *arguments, prove=apply.prove):
            spoil(Made(folder, dense, other, REMOVED, random.Random(seed)), folder)
            return prove(reference, folder, *arguments)

        def write_damaged(pruned, aside, notify, write=apply_gguf._write):
            write(pruned, aside, notify)
            spoil(MadeGguf(aside, dense, REMOVED, random.Random(seed)), aside)

        monkeypatch.setattr(apply, "prove", prove_damaged)
        monkeypatch.setattr(apply_gguf, "_write", write_damaged)
        if as_planned:
            nothing_planned(monkeypatch)
        return done

    return arrange


def nothing_planned(monkeypatch):
    """Leave the proof to transformers alone, as if what is in the files had been planned."""
    monkeypatch.setattr(proof, "_as_planned", lambda *arguments: iter(()))
    monkeypatch.setattr(apply_gguf, "_require_as_planned", lambda *arguments: None)


def require_refused(run_sleb, done, says, *command):
    """Check that a command damages its checkpoint, refuses it, says what is wrong, and leaves nothing."""
    before = sorted(os.listdir())
    result = run_sleb(*command, "-o", "out.gguf" if "--source" in command else "out")
    assert len(done) == 1, result.stderr
    assert result.exit_code == 9, (result.stdout, result.stderr)
    assert "failed its proof: " in result.stderr
    assert re.search(says, result.stderr), result.stderr
    assert "Nothing was written." in result.stderr
    assert result.stdout == ""
    kept = {".out.recovery"} if {"--recover", "--heal"} & set(command) else set()
    assert set(os.listdir()) - {"cache", "hub"} == set(before) - {"cache", "hub"} | kept


QUICK = ("in memory", 0)


def cases(kinds, ways, *, models=5, only_computing=False, every=1):
    """Return the cases of a test: each kind once in every run, and in all ways with `pytest -m faults`.

    `ways` are a mode and a seed each. In every run, the best model of each kind is tried, or of every so manieth.
    """
    chosen = [kind for kind in kinds if kind.computes or not only_computing]
    for place, kind in enumerate(chosen):
        for name, (mode, seed) in product(kind.models[:models], dict.fromkeys([QUICK, *ways])):
            is_best = name == kind.models[0] and (mode, seed) == QUICK
            if is_best or (mode, seed) in ways:
                marks = () if is_best and place % every == 0 else pytest.mark.faults
                yield pytest.param(kind, name, mode, seed, id=f"{kind.name}, {name}, {mode}, {seed}", marks=marks)


@pytest.mark.parametrize(("kind", "name", "mode", "seed"), cases(HF, [("streamed", 0), ("in memory", 1)], every=3))
def test_what_is_not_as_planned_is_refused(run_sleb, damaged, dense, other, kind, name, mode, seed, tried):
    model = dense(name, seed)
    done = damaged(kind.do, model, other, seed=seed)
    # What changes the tensors of several shards changes their index, too, which may be seen first.
    says = f"{kind.says}|index.json is not what was written" if name == SHARDED else kind.says
    require_refused(run_sleb, done, says, "apply", model, "--blocks", "1,4", MODES[mode])
    tried("wrong checkpoints")


@pytest.mark.parametrize(
    ("kind", "name", "mode", "seed"), cases(HF, [QUICK, ("streamed", 1)], models=2, only_computing=True, every=8)
)
def test_what_computes_something_else_is_refused_by_transformers_alone(
    run_sleb, damaged, dense, other, kind, name, mode, seed, tried
):
    model = dense(name, seed)
    done = damaged(kind.do, model, other, seed=seed, as_planned=True)
    require_refused(run_sleb, done, "", "apply", model, "--blocks", "1,4", MODES[mode])
    tried("wrong checkpoints")


@pytest.mark.parametrize(("kind", "name", "mode", "seed"), cases(GGUF, [("in memory", 1)], every=3))
def test_a_gguf_file_that_is_not_as_planned_is_refused(run_sleb, damaged, dense_gguf, kind, name, mode, seed, tried):
    model = dense_gguf(name, seed)
    done = damaged(kind.do, model, seed=seed)
    require_refused(run_sleb, done, kind.says, "apply", "--source", model, "--blocks", "1,4")
    tried("wrong checkpoints")


@pytest.mark.parametrize(("kind", "name", "mode", "seed"), cases(GGUF, [QUICK], only_computing=True, every=8))
def test_a_gguf_file_that_computes_something_else_is_refused_by_transformers_alone(
    run_sleb, damaged, dense_gguf, kind, name, mode, seed, cache, monkeypatch, tried
):
    monkeypatch.setenv("SLEB_CACHE", str(cache))
    model = dense_gguf(name, seed)
    done = damaged(kind.do, model, seed=seed, as_planned=True)
    require_refused(run_sleb, done, "", "apply", "--source", model, "--blocks", "1,4")
    tried("wrong checkpoints")


WAYS = {
    "recovered": ["--recover"],
    "recovered, streamed": ["--recover", "--stream"],
    "healed": ["--heal", "--heal-tokens", 2048],
}


def recovered_cases():
    """Return the cases of recovered checkpoints: two in every run."""
    for place, (way, kind, as_planned) in enumerate(product(WAYS, RECOVERED, (False, True))):
        label = f"{way}, {kind.name}{', as planned' if as_planned else ''}"
        marks = () if way == "recovered" and place < 2 else pytest.mark.faults
        yield pytest.param(way, kind, as_planned, id=label, marks=marks)


@pytest.mark.parametrize(("way", "kind", "as_planned"), recovered_cases())
def test_new_values_that_are_not_as_planned_are_refused(
    run_sleb, damaged, dense, other, text_file, way, kind, as_planned, tried
):
    model = dense(LLAMA, 0)
    done = damaged(kind.do, model, other, as_planned=as_planned)
    says = "" if as_planned else kind.says
    options = [*WAYS[way], *calibration(text_file, samples=10)]
    require_refused(run_sleb, done, says, "apply", model, "--blocks", "1,4", *options)
    tried("wrong checkpoints")


@pytest.mark.parametrize("only_transformers", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [LLAMA, *(pytest.param(name, marks=pytest.mark.faults) for name in CONFIGS if name != LLAMA)]
)
def test_what_is_undamaged_is_delivered(run_sleb, dense, monkeypatch, name, mode, only_transformers):
    if only_transformers:
        nothing_planned(monkeypatch)
    result = run_sleb("apply", dense(name, 0), "--blocks", "1,4", MODES[mode], "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    checks = json.loads(result.stdout)["proof"]["checks"]
    assert ("same bytes" in checks) == (not only_transformers)
    assert checks[-4:] == ["loads", "same logits", "generates", "saves again"]


@pytest.mark.parametrize("name", [F32, pytest.param(Q8, marks=pytest.mark.faults), LISTS])
def test_a_gguf_file_that_is_undamaged_is_delivered(run_sleb, dense_gguf, name):
    result = run_sleb("apply", "--source", dense_gguf(name, 0), "--blocks", "1,4", "-o", "out.gguf", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verified"]


NORMS = [
    f"model.layers.{block}.{name}.weight"
    for block in range(4)
    for name in ("input_layernorm", "post_attention_layernorm")
]


@pytest.mark.faults
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "larger"), [(LLAMA, 2**-20), (BF16, 2**-4)])
def test_what_rounding_cannot_hide(run_sleb, damaged, dense, name, larger, norm, tried):
    """As docs/reference/commands.md says of logits, when the plan itself is wrong."""
    model = dense(name, 0)
    done = damaged(lambda made: made.edit(norm, lambda values: values * (1 + larger)), model, as_planned=True)
    block = int(norm.split(".")[2])
    where = (
        f"its logits differ.*; its block {block}, which is block {(0, 2, 3, 5)[block]} of the dense model, is the first"
    )
    require_refused(run_sleb, done, where, "apply", model, "--blocks", "1,4")
    tried("wrong checkpoints")


def test_what_rounding_hides_from_logits_but_not_from_bytes(run_sleb, damaged, dense, monkeypatch):
    model = dense(BF16, 0)

    def last_bits(made):
        made.edit("model.layers.3.input_layernorm.weight", lambda values: values * (1 + 2**-7))

    done = damaged(last_bits, model)
    require_refused(run_sleb, done, "bytes of model.layers.3.input_layernorm", "apply", model, "--blocks", "1,4")
    nothing_planned(monkeypatch)
    assert run_sleb("apply", model, "--blocks", "1,4", "-o", "out").exit_code == 0
    assert len(done) == 2


def test_there_are_more_than_forty_kinds_and_each_has_a_name_of_its_own():
    for kinds, least in ((HF, 100), (GGUF, 40), (RECOVERED, 5)):
        names = [kind.name for kind in kinds]
        assert len(set(names)) == len(names) >= least

"""A vocabulary and an MLP as large as those of a billion parameters, in few narrow blocks: what only size can break.

All is checked with safetensors, gguf, torch and transformers, and nothing of sleb.
"""

import json
import math
import shutil
from contextlib import ExitStack

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import calibration, llama_config, prose, train_tokenizer
from gguf_models import convert_llama
from reference import plain_loss
from sleb_cli.engine.output import proof

BLOCKS = 3
REMOVED = 1
PERIOD = 1_000_003
"""After how many values they repeat: a prime, so that no two rows, and no two parts of a tensor that are read at a
time, are alike."""


def save_large(folder, intermediate_size):
    """Save a model of this size, with its embedding of 66 MB in a file of its own."""
    config = llama_config(
        BLOCKS, vocab_size=128_256, hidden_size=256, intermediate_size=intermediate_size, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    values = torch.randn(PERIOD)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Numbers repeat, since drawing all of them takes longer than any command.
    tensors = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        mean, deviation = (1, 0.1) if parameter.dim() == 1 else (0, 0.02)
        own = (mean + deviation * values.roll(1009 * number)).to(torch.bfloat16)
        count = parameter.numel()
        tensors[name] = own.repeat(math.ceil(count / PERIOD))[:count].view(parameter.shape)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="66MB")
    train_tokenizer(bos=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 105 MB."""
    folder = save_large(tmp_path_factory.mktemp("large") / "large-llama", 8192)
    assert [round(path.stat().st_size / 1e6) for path in sorted(folder.glob("*.safetensors"))] == [66, 26, 13]
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _short_proofs_and_one_large_folder_at_a_time(tmp_path, monkeypatch):
    """A proof reads all weights, however few tokens it computes."""
    monkeypatch.setattr(proof, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(proof, "NEW_TOKENS", 2)
    yield
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()


def opened(folder, until):
    """Return what reads each tensor of a checkpoint by its name."""
    files = [until.enter_context(safe_open(path, "pt")) for path in folder.glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def renumbered(name, blocks="layers", place=1):
    """Return a tensor's name without the block that was removed, or None if it goes with it."""
    parts = name.split(".")
    if parts[place] != blocks:
        return name
    number = int(parts[place + 1])
    parts[place + 1] = str(number - (number > REMOVED))
    return None if number == REMOVED else ".".join(parts)


def check_tensors(folder, large, dtype, refitted=()):
    """Check that a checkpoint holds the dense model's tensors, but for a block and for new values of the same shape."""
    with ExitStack() as until:
        before, after = opened(large, until), opened(folder, until)
        sources = {renumbered(name): name for name in before}
        sources.pop(None)
        assert after.keys() == sources.keys()
        for name, source in sources.items():
            found, expected = after[name].get_tensor(name), before[source].get_tensor(source).to(dtype)
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            assert found.isfinite().all(), name
            assert torch.equal(found, expected) == (name not in refitted), name


@pytest.mark.parametrize(("options", "dtype"), [("", torch.bfloat16), ("--dtype float16 --stream", torch.float16)])
def test_every_tensor_is_whole(sleb, large, tmp_path, options, dtype):
    command = ["apply", large, "--blocks", REMOVED, *options.split(), "--max-shard-size", "20MB", "-o", "out", "--json"]
    result = sleb(*command)
    assert json.loads(result.stdout)["proof"]["logits_difference"] == 0
    check_tensors(tmp_path / "out", large, dtype)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2
    assert sum(size > 20_100_000 for size in sizes) == 1, "a tensor that is larger has a file of its own"


def test_what_is_recovered_is_whole(sleb, tmp_path):
    model = save_large(tmp_path / "narrow-llama", 256)  # fits take the third power of the MLP's width
    (tmp_path / "text.txt").write_text(prose(120))
    recover = ["--recover", *calibration("text.txt", samples=20, length=16), "--dtype", "float32", "--json"]
    result = sleb("apply", model, "--blocks", REMOVED, *recover, "-o", "out")
    applied = json.loads(result.stdout)
    assert (applied["proof"]["reference"], applied["proof"]["logits_difference"]) == ("recovered", 0)
    refitted = {
        renumbered(f"{name}.weight" if fit["block"] is None else f"model.layers.{fit['block']}.{name}.weight")
        for fit in applied["recovery"]["closed_form"]["fits"]
        if fit["kept"]
        for name in fit["weights"]
    }
    assert refitted
    check_tensors(tmp_path / "out", model, torch.float32, refitted)


def test_what_eval_says_of_it_is_what_transformers_computes(sleb, large, tmp_path):
    (tmp_path / "test.txt").write_text(prose(20, seed=1))
    options = ["--perplexity", "test.txt", "--sequence-length", 16, "--max-windows", 2, "--dtype", "float32", "--json"]
    model = AutoModelForCausalLM.from_pretrained(large, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(large)((tmp_path / "test.txt").read_text(), return_tensors="pt").input_ids
    windows = ids[0, :32].view(2, 16)
    expected = [plain_loss(model, model.model.layers, windows, skipped) for skipped in (set(), {REMOVED})]
    del model
    for how in ("--no-stream", "--stream"):
        result = sleb("eval", large, "--blocks", REMOVED, *options, how)
        (text,) = json.loads(result.stdout)["texts"]
        found = [scores["perplexity"] for scores in (text["dense"], *text["pruned"])]
        assert [math.log(perplexity) for perplexity in found] == pytest.approx(expected, rel=1e-5)


def test_a_gguf_file_keeps_every_byte_of_what_stays(sleb, large, tmp_path):
    source = convert_llama(large, tmp_path / "large.gguf", Type.F16)
    # transformers takes a minute for a tokenizer of this size.
    sleb("apply", source, "--blocks", REMOVED, "-o", "cut.gguf", "--no-verify")
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, tmp_path / "cut.gguf"))
    sources = {renumbered(name, "blk", 0): name for name in before}
    sources.pop(None)
    assert after.keys() == sources.keys()
    for name, old in sources.items():
        assert after[name].tensor_type is before[old].tensor_type
        assert np.array_equal(after[name].data, before[old].data), name

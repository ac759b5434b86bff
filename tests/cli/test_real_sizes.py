"""A vocabulary and an MLP as large as those of a billion parameters, in few narrow blocks: what only size can break.

All is checked with safetensors and torch, and nothing of sleb.
"""

import json
import math
import shutil
from contextlib import ExitStack

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from conftest import llama_config, train_tokenizer
from sleb_cli.engine.output import proof

BLOCKS = 3
REMOVED = 1
PERIOD = 1_000_003
"""After how many values they repeat: a prime, so that no two rows, and no two parts of a tensor that are read at a
time, are alike."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 105 MB."""
    config = llama_config(
        BLOCKS, vocab_size=128_256, hidden_size=256, intermediate_size=8192, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    values = torch.randn(PERIOD)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Numbers repeat, since drawing all of them takes longer than any command.
    tensors = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        own = (float(parameter.dim() == 1) + 0.02 * values.roll(1009 * number)).to(torch.bfloat16)
        count = parameter.numel()
        tensors[name] = own.repeat(math.ceil(count / PERIOD))[:count].view(parameter.shape)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    folder = tmp_path_factory.mktemp("large") / "large-llama"
    model.save_pretrained(folder, max_shard_size="66MB")
    train_tokenizer(bos=False).save_pretrained(folder)
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


def renumbered(name):
    """Return a tensor's name without the block that was removed, or None if it goes with it."""
    parts = name.split(".")
    if parts[1] != "layers":
        return name
    number = int(parts[2])
    parts[2] = str(number - (number > REMOVED))
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


def test_every_tensor_is_whole(sleb, large, tmp_path):
    command = ["apply", large, "--blocks", REMOVED, "--max-shard-size", "20MB", "-o", "out", "--json"]
    result = sleb(*command)
    assert json.loads(result.stdout)["proof"]["logits_difference"] == 0
    with ExitStack() as until:
        before, after = opened(large, until), opened(tmp_path / "out", until)
        sources = {renumbered(name): name for name in before}
        sources.pop(None)
        assert after.keys() == sources.keys()
        for name, source in sources.items():
            assert torch.equal(after[name].get_tensor(name), before[source].get_tensor(source)), name
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2
    assert sum(size > 20_100_000 for size in sizes) == 1, "a tensor that is larger has a file of its own"

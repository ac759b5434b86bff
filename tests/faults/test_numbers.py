"""Numbers that are not finite, and threads: sequences and candidates are named, left out, or
counted as worst.

Most models here carry a flag through the network: hidden dimension 0, which no block writes and
only the embedding of one rare token sets, so that what happens to it happens on the sequences that
hold this token, and nowhere else.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoTokenizer

from conftest import calibration, calibration_sequences, llama_config, prose, save_model
from sleb_cli.plan import read_plan

RARE, LENGTH, SAMPLES = "~", 16, 24
OVERFLOW = ("--dtype", "float16", "--remove", 1)


def changed(folder, do, config=None):
    """Save a Llama, and change the tensors of its only file."""
    path = (
        save_model(folder, config or llama_config(tie_word_embeddings=False)) / "model.safetensors"
    )
    tensors = load(path.read_bytes())
    do(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def flagged(folder, flag=1000.0, more=lambda tensors: None):
    """Save a Llama whose hidden dimension 0 is `flag` for the rare token, and 0 for all others, at
    every depth.
    """

    def do(tensors):
        (token,) = AutoTokenizer.from_pretrained(folder)(RARE).input_ids
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[0] = 0
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][token, 0] = flag
        more(tensors)

    return changed(folder, do)


def adds_300_000(tensors):
    """Have block 3 add about 300,000 where the flag is set: float16 ends at 65,504."""
    for name, weight in (("gate", 10.0), ("up", 10.0), ("down", 100.0)):
        tensor = tensors[f"model.layers.3.mlp.{name}_proj.weight"]
        tensor[:, 0] = 0
        tensor[0, :] = 0
        tensor[0, 0] = weight


def large_head(tensors):
    """Have the head multiply the flag by so much that a logit overflows float16."""
    tensors["lm_head.weight"][5, 0] = 6e4


def needed(tensors):
    """Have block 2 keep float16 in range: its neighbours add 40,000 each, and it subtracts it."""
    for number in (1, 2, 3):
        tensors[f"model.layers.{number}.mlp.down_proj.bias"][0] = (
            -40_000.0 if number == 2 else 40_000.0
        )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that holds the rare token in about one of five sequences."""
    sentences = prose(260, seed=3).split(". ")
    sentences[2::4] = [f"{RARE} {sentence}" for sentence in sentences[2::4]]
    path = tmp_path_factory.mktemp("text") / "rare.txt"
    path.write_text(". ".join(sentences))
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model whose embedding of the rare token is NaN."""
    return flagged(tmp_path_factory.mktemp("models") / "broken", math.nan)


@pytest.fixture(scope="module")
def needing(tmp_path_factory):
    """A model that overflows without block 2."""
    return changed(
        tmp_path_factory.mktemp("models") / "needing", needed, llama_config(mlp_bias=True)
    )


def bad_sequences(model, text):
    """The numbers, from 1, of the drawn sequences with the rare token."""
    rows = calibration_sequences(model, text, SAMPLES, LENGTH)
    (token,) = AutoTokenizer.from_pretrained(model)(RARE).input_ids
    bad = ((rows == token).any(1).nonzero().flatten() + 1).tolist()
    assert 0 < len(bad) < len(rows)
    return bad


def words_of(model, text, *options):
    return (
        "search",
        model,
        "--remove",
        2,
        *calibration(text, SAMPLES, LENGTH),
        "--sample-tokens",
        0,
        *options,
    )


@pytest.fixture
def search(sleb):
    return lambda model, text, *options, code=0: sleb(*words_of(model, text, *options), code=code)


def plan_of(path="plan.json"):
    """A plan without what differs between two runs; NaN and infinity are not JSON."""
    data = json.loads(
        Path(path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    return data | {"environment": None}


BAD = {
    "nan": (partial(flagged, flag=math.nan), "float32", "the embeddings", ("--stream",)),
    "block": (partial(flagged, more=adds_300_000), "float16", "block 3", ("--fast",)),
    "head": (partial(flagged, more=large_head), "float16", "the head", ("--metric", "kl")),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sequence_is_named_with_its_text_and_the_block(search, tmp_path, text, kind):
    make, dtype, place, options = BAD[kind]
    model = make(tmp_path / "model")
    bad = bad_sequences(model, text)
    said = search(model, text, "--dtype", dtype, *options, code=4).stderr
    for part in (
        dtype,
        place,
        f"sequence {bad[0]} of {SAMPLES}",
        str(text),
        f"{len(bad) - 1} more",
    ):
        assert part in said
    assert ("bfloat16" in said) == (dtype != "float32")
    assert set(os.listdir()) == {"model"}, (
        "what was measured on bad sequences is of no use, and was kept"
    )
    if kind == "block":
        search(model, text, "--dtype", "bfloat16", "-o", "better.json")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--recover", "--no-heal"), 4, "hidden states that are not finite numbers"),
        (("--heal", "--heal-tokens", 4096), 0, "Skipping steps whose gradient is not finite"),
    ],
)
def test_recovery_says_that_a_part_of_the_text_overflows(
    sleb, tmp_path, broken, options, code, said
):
    path = tmp_path / "text.txt"
    path.write_text(f"{prose(3)} {RARE} " * 100 + prose(700, seed=1))
    text = calibration(path, 24, LENGTH)
    command = ("apply", broken, "--blocks", 2, *options, *text, "-o", tmp_path / "out")
    assert said in sleb(*command, code=code).stderr
    assert (tmp_path / "out").exists() is (code == 0)


@pytest.mark.parametrize("options", [(), ("--fast",), ("--stream",)], ids=str)
def test_a_block_without_which_numbers_overflow_is_never_removed(
    sleb, search, needing, text, options
):
    assert "Without block 2" in search(needing, text, *OVERFLOW, *options).stderr
    (step,) = plan_of()["steps"]
    assert step["block"] != 2
    assert [block for block, score in step["scores"].items() if score is None] == ["2"]
    sleb("export", "plan.json", "--to", "table")


@pytest.mark.faults
def test_scores_of_one_thread_and_two_agree(search, tiny_llama, text):
    for threads in (2, 1):
        torch.set_num_threads(threads)
        search(
            tiny_llama,
            text,
            *calibration(text, 16, 32),
            "--dtype",
            "float32",
            "-o",
            f"{threads}.json",
        )
    one, two = (read_plan(Path(f"{threads}.json")) for threads in (1, 2))
    assert one.removals == two.removals
    for left, right in zip(one.steps, two.steps, strict=True):
        assert left.scores == pytest.approx(right.scores, rel=1e-5, abs=1e-5)

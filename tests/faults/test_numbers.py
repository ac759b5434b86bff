"""Numbers that are not finite, ties, and threads: sequences and candidates are named, left out, or counted as worst.

Most models here carry a flag through the network: hidden dimension 0, which no block writes and only the embedding of
one rare token sets, so that what happens to it happens on the sequences that hold this token, and nowhere else.
"""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import calibration, calibration_sequences, llama_config, prose, save_model
from faults.conftest import counts
from faults.program import KILL, Calls, Fault
from sleb_cli.engine.text.windows import tokens_sha256
from sleb_cli.plan import read_plan

RARE, LENGTH, SAMPLES = "~", 16, 24
SLOWER = ("one by one", "spans", "kl", "weights", "gradients", "beam", "refine")
"""Ways to search that only the full run tries."""
WAYS = {
    "exact": (),
    "held out": ("--holdout", 0.3),
    "fast": ("--fast",),
    "streamed": ("--stream",),
    "cosine": ("--metric", "cosine"),
    "spans": ("--metric", "angular", "--strategy", "contiguous"),
    "kl": ("--metric", "kl"),
    "weights": ("--metric", "magnitude"),
    "gradients": ("--metric", "taylor"),
    "beam": ("--strategy", "beam"),
    "refine": ("--strategy", "refine"),
}
BATCHES = {"batches of three": ("--batch-size", 3), "one by one": ("--batch-size", 1)}
STRATEGIES = [("--strategy", name) for name in ("beam", "refine", "oneshot", "contiguous")]
SKIP = "--skip-bad-sequences"


def of(options):
    return " ".join(map(str, options)) or "exact"


def changed(folder, do, config=None):
    """Save a Llama, and change the tensors of its only file."""
    path = save_model(folder, config or llama_config(tie_word_embeddings=False)) / "model.safetensors"
    tensors = load_file(path)
    do(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def block(number, name):
    return f"model.layers.{number}.{name}.weight"


def flagged(folder, flag=1000.0, more=lambda tensors: None):
    """Save a Llama whose hidden dimension 0 is `flag` for the rare token, and 0 for all others, at every depth."""

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
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        tensors[block(3, name)][0] = 0
        tensors[block(3, name)][0, 0] = 10.0
    tensors[block(3, "mlp.down_proj")][:, 0] = 0
    tensors[block(3, "mlp.down_proj")][0, 0] = 100.0


def large_head(tensors):
    """Have the head multiply the flag by so much that a logit overflows float16."""
    tensors["lm_head.weight"][5, 0] = 6e4


overflowing = partial(flagged, more=adds_300_000)


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
def needed(tmp_path_factory):
    """A model with a block that keeps float16 in range: its neighbours add 40,000 each, and it subtracts it."""

    def do(tensors):
        for number in (1, 2, 3):
            tensors[f"model.layers.{number}.mlp.down_proj.bias"][0] = -40_000.0 if number == 2 else 40_000.0

    return changed(tmp_path_factory.mktemp("models") / "needed", do, llama_config(mlp_bias=True))


def bad_sequences(model, text):
    """The numbers, from 1, of the drawn sequences with the rare token; and the hash of those without."""
    rows = calibration_sequences(model, text, SAMPLES, LENGTH)
    (token,) = AutoTokenizer.from_pretrained(model)(RARE).input_ids
    bad = (rows == token).any(1)
    assert 0 < int(bad.sum()) < len(rows)
    return [number + 1 for number in bad.nonzero().flatten().tolist()], tokens_sha256(rows[~bad])


def words_of(model, text, *options):
    return ("search", model, "--remove", 2, *calibration(text, SAMPLES, LENGTH), "--sample-tokens", 0, *options)


@pytest.fixture
def search(run_sleb):
    def run(model, text, *options, code=0):
        result = run_sleb(*words_of(model, text, *options))
        assert result.exit_code == code, result.stderr
        return result

    return run


def plan_at(path="plan.json"):
    return read_plan(Path(path))


def plan_of(path="plan.json"):
    """A plan without what differs between two runs; NaN and infinity are not JSON."""
    data = json.loads(Path(path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return data | {"environment": None}


MODELS = {
    "nan": (partial(flagged, flag=math.nan), "float32", "the embeddings"),
    "infinity": (partial(flagged, flag=-math.inf), "bfloat16", "the embeddings"),
    "cast": (partial(flagged, flag=1e5), "float16", "the embeddings"),
    "block": (overflowing, "float16", "block 3"),
    "head": (partial(flagged, more=large_head), "float16", "the head"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_bad_sequence_is_named_with_its_text_and_the_block(search, tmp_path, text, kind):
    make, dtype, place = MODELS[kind]
    model = make(tmp_path / "model")
    bad, _ = bad_sequences(model, text)
    said = search(model, text, "--dtype", dtype, code=4).stderr
    for part in (dtype, place, f"sequence {bad[0]} of {SAMPLES}", str(text), f"{len(bad) - 1} more", SKIP):
        assert part in said
    assert ("bfloat16" in said) == (dtype != "float32")
    assert set(os.listdir()) == {"model"}, "what was measured on bad sequences is of no use, and was kept"
    if dtype == "float16" and kind != "head":  # whose logits are finite in bfloat16, but as large
        search(model, text, "--dtype", "bfloat16")


def ways(table):
    """The names of a table, the slower ones only with `-m faults`."""
    return [pytest.param(name, marks=[pytest.mark.faults] if name in SLOWER else []) for name in table]


@pytest.mark.parametrize("kind", ways(WAYS))
def test_without_the_option_every_way_refuses_a_bad_sequence(search, broken, text, kind):
    assert "in the embeddings" in search(broken, text, *WAYS[kind], code=4).stderr


@pytest.mark.parametrize("kind", ways(WAYS | BATCHES))
def test_bad_sequences_are_left_out_and_recorded_in_every_way(search, broken, text, kind):
    bad, used = bad_sequences(broken, text)
    result = search(broken, text, SKIP, *(WAYS | BATCHES)[kind])
    found = plan_at().calibration
    assert [each.sequence for each in found.skipped] == bad
    assert {each.first for each in found.skipped} == {"the embeddings"}
    assert (found.sequences, found.tokens_sha256) == (SAMPLES - len(bad), used)
    assert f"{bad[0]} (first in the embeddings)" in result.stderr
    assert f"{len(bad)} left out" in result.stdout


def test_where_no_sequence_is_bad_the_option_changes_nothing(search, tiny_llama, text):
    plans = []
    for options in ((), (SKIP, "--force")):
        search(tiny_llama, text, *options)
        plans.append(plan_of())
    assert plans[0] == plans[1]
    assert plans[0]["calibration"]["skipped"] is None


def test_the_block_that_overflows_is_in_the_plan(search, tmp_path, text):
    model = overflowing(tmp_path / "model")
    search(model, text, "--dtype", "float16", SKIP, "--batch-size", 5)
    skipped = plan_at().calibration.skipped
    assert [each.sequence for each in skipped] == bad_sequences(model, text)[0]
    assert {each.first for each in skipped} == {"block 3"}


@pytest.mark.parametrize(("good", "options", "code"), [(0, (), 5), (1, (), 0), (1, ("--holdout", "0.5"), 5)])
def test_too_few_sequences_that_are_left_are_an_error(search, tmp_path, broken, good, options, code):
    tokenizer, path = AutoTokenizer.from_pretrained(broken), tmp_path / "bad.txt"
    (token,) = tokenizer(RARE).input_ids
    (good_tokens,) = tokenizer([prose(10)]).input_ids
    windows = [[token] * LENGTH] * 4 + [good_tokens[: LENGTH + 4]] * good
    path.write_text(tokenizer.decode([token for window in windows for token in window]))
    result = search(broken, path, "--samples", len(windows), SKIP, *options, code=code)
    if code:
        assert f"{good or 'none'} of the {len(windows)}" in result.stderr
    else:
        assert len(plan_at().calibration.skipped) == len(windows) - 1


@counts(2, 12)
def test_a_search_without_bad_sequences_goes_on_after_a_kill(program, search, tmp_path, broken, text, count):
    words = words_of(broken, text, SKIP, "--batch-size", 4)
    undisturbed = program.run(*words, cwd=tmp_path, fault=Fault(tmp_path, calls=Calls.CHANGES))
    whole, calls = plan_of(), len(undisturbed.calls)
    for number in range(count):
        (tmp_path / "plan.json").unlink()
        fault = Fault(tmp_path, 2 + number * (calls - 2) // count, KILL, Calls.CHANGES)
        program.run(*words, "--force", cwd=tmp_path, fault=fault, codes=[-9])
        search(broken, text, SKIP, "--batch-size", 4, "--resume")
        assert plan_of() == whole, f"killed at call {fault.at} of {calls}"


def test_a_plan_without_bad_sequences_is_extended_and_applied(run_sleb, search, broken, text):
    search(broken, text, SKIP, "-o", "two.json")
    search(broken, text, SKIP, "-o", "one.json", "--remove", 1)
    extended = run_sleb("search", broken, "--extend", "one.json", "--remove", 2, "--sample-tokens", 0)
    assert extended.exit_code == 0, extended.stderr
    ours, other = plan_at("one.json"), plan_at("two.json")
    assert (ours.calibration, ours.steps) == (other.calibration, other.steps)
    assert run_sleb("apply", "one.json", "-o", "small", "--no-verify").exit_code == 0
    assert plan_at("small/sleb_plan.json").calibration.skipped == ours.calibration.skipped


@pytest.mark.parametrize("options", [(), ("--stream",), ("--fast", "--holdout", 0.2)], ids=of)
def test_processes_leave_out_the_same_sequences(program, search, tmp_path, broken, text, options):
    search(broken, text, *options, SKIP, "-o", "alone.json")
    words = words_of(broken, text, *options)
    together = [each.wait() for each in program.launch(2, *words, SKIP, "-o", "both.json", cwd=tmp_path)]
    assert [each.exit_code for each in together] == [0, 0], together[0].stderr
    assert plan_of("both.json") == plan_of("alone.json")
    refused = [each.wait() for each in program.launch(2, *words, "-o", "neither.json", cwd=tmp_path)]
    assert "in the embeddings" in refused[0].require((4,)).stderr
    assert not (tmp_path / "neither.json").exists()


OVERFLOW = ("--dtype", "float16", "--remove", 1)


@pytest.mark.parametrize("options", [(), ("--fast",), ("--stream",), ("--batch-size", 5), *STRATEGIES], ids=of)
def test_a_block_without_which_numbers_overflow_is_never_removed(run_sleb, search, needed, text, options):
    said = search(needed, text, *OVERFLOW, *options).stderr
    plan_of()
    step = plan_at().steps[0]
    assert step.scores.pop(2, "absent") is None
    assert step.block != 2
    assert all(score is not None and math.isfinite(score) for score in step.scores.values())
    assert "Without block 2" in said
    assert run_sleb("export", "plan.json", "--to", "summary").exit_code == 0


def test_a_score_that_is_not_finite_is_null_in_the_journal(program, search, tmp_path, needed, text):
    search(needed, text, *OVERFLOW, "-o", "whole.json")
    killed = Fault(tmp_path, 1, KILL, Calls.RENAME)  # as the plan was about to take its name
    program.run(*words_of(needed, text, *OVERFLOW), cwd=tmp_path, fault=killed, codes=[-9])
    journal = (tmp_path / "plan.json.journal").read_text()
    assert "null" in journal
    assert "NaN" not in journal
    assert "Infinity" not in journal
    search(needed, text, *OVERFLOW, "--resume")
    assert plan_of() == plan_of("whole.json")


def test_where_every_candidate_overflows_nothing_is_chosen(search, needed, text):
    said = search(needed, text, *OVERFLOW, "--protect", "1,3,4", code=4).stderr
    assert "Without block 2" in said
    assert "bfloat16" in said
    assert not os.path.lexists("plan.json")


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """A Llama whose blocks 2 to 5 add nothing, and one whose blocks 2 and 3 are the same."""
    folder = tmp_path_factory.mktemp("models")

    def idle(tensors):
        for number in (2, 3, 4, 5):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                tensors[block(number, name)].zero_()

    def twins(tensors):
        for name in [name for name in tensors if ".layers.2." in name]:
            tensors[name.replace(".2.", ".3.")] = tensors[name].clone()

    return changed(folder / "idle", idle, llama_config(8)), changed(folder / "twins", twins, llama_config(6))


@pytest.mark.parametrize(
    "options", [(), ("--fast",), ("--stream",), ("--fast", "--strategy", "beam"), *STRATEGIES], ids=of
)
def test_of_blocks_that_score_alike_the_lowest_goes(search, alike, text, options):
    search(alike[0], text, "--protect", "1,6", *options)
    plan = plan_at()
    assert plan.removals == (2, 3)
    assert plan.steps[0].scores == dict.fromkeys((2, 3, 4, 5), plan.dense.loss)


@pytest.mark.parametrize("options", [(), ("--metric", "cosine"), ("--metric", "magnitude")], ids=of)
def test_of_two_blocks_that_are_the_same_the_lower_goes(search, alike, text, options):
    search(alike[1], text, "--protect", "1,4", "--remove", 1, *options)
    step = plan_at().steps[0]
    assert set(step.scores) == {2, 3}
    if "cosine" not in options:  # which sees them at different depths
        assert step.scores[2] == step.scores[3]
        assert step.block == 2


def plans_with_threads(tmp_path, searches):
    """Run these searches in one process with one thread and in one with two; yield the plans of both."""
    program = (
        "import json, sys, torch; from sleb_cli.__main__ import main\n"
        "assert torch.get_num_threads() == int(sys.argv[1])\n"
        "assert all(main(words) == 0 for words in json.loads(sys.argv[2]))"
    )
    named = [[*map(str, words), "-o", f"{number}.json"] for number, words in enumerate(searches)]
    for threads in ("1", "2"):
        (tmp_path / threads).mkdir()
        variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [sys.executable, "-c", program, threads, json.dumps(named)]
        subprocess.run(words, cwd=tmp_path / threads, env=environment, check=True, capture_output=True)
    for words in named:
        yield read_plan(tmp_path / "1" / words[-1]), read_plan(tmp_path / "2" / words[-1])


@pytest.mark.faults
@pytest.mark.parametrize("trained", [False, True])
def test_one_thread_and_two_make_the_same_plan(tmp_path, tiny_llama, text, request, trained):
    """The same blocks go in the same order, by scores that agree to 1e-5."""
    model, options = tiny_llama, [(), ("--fast",)]
    if trained:
        model = request.getfixturevalue("shared_data") / "models" / "stories260K"
        options += STRATEGIES
    more = ("--remove", 2, "--sample-tokens", 0, "--dtype", "float32", "-q")
    searches = [("search", model, *calibration(text, 16, 128 if trained else 32), *more, *each) for each in options]
    for one, two in plans_with_threads(tmp_path, searches):
        assert (one.removals, [step.block for step in one.steps]) == (two.removals, [step.block for step in two.steps])
        for left, right in zip(one.steps, two.steps, strict=True):
            assert left.scores == pytest.approx(right.scores, rel=1e-5, abs=1e-5)
        assert one.dense.loss == pytest.approx(two.dense.loss, rel=1e-5)

"""Numbers that are not finite, ties, and threads: sequences and candidates are named, left out, or counted as worst.

Most models here carry a flag through the network: hidden dimension 0, which no block writes and only the embedding of
one rare token sets, so that what happens to it happens on the sequences that hold this token, and nowhere else.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import zlib

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import calibration, calibration_sequences, llama_config, prose, save_model
from faults.conftest import counts
from faults.program import KILL, Calls, Fault
from sleb_cli.engine.text.windows import tokens_sha256
from sleb_cli.plan import read_plan

RARE = "~"
LENGTH = 16
SAMPLES = 24

SLOWER = ("one by one", "spans", "kl", "weights", "gradients", "beam", "refine")
"""Ways to search that only the full run tries."""

PLANS = {
    "exact": (),
    "one by one": ("--batch-size", 1),
    "batches of three": ("--batch-size", 3),
    "fast": ("--fast",),
    "held out": ("--holdout", 0.3),
    "streamed": ("--stream",),
    "cosine": ("--metric", "cosine"),
    "spans": ("--metric", "angular", "--strategy", "contiguous"),
    "kl": ("--metric", "kl"),
    "weights": ("--metric", "magnitude"),
    "gradients": ("--metric", "taylor"),
    "beam": ("--strategy", "beam"),
    "refine": ("--strategy", "refine"),
}


def change(folder, do):
    """Change the tensors of a model's only file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    do(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def block(number, name):
    return f"model.layers.{number}.{name}.weight"


def flagged(folder, flag=1000.0, config=None):
    """Save a Llama whose hidden dimension 0 is `flag` for the rare token, and 0 for all others, at every depth."""
    save_model(folder, config or llama_config(tie_word_embeddings=False))
    (token,) = AutoTokenizer.from_pretrained(folder)(RARE).input_ids

    def do(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[0] = 0
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][token, 0] = flag

    return change(folder, do)


def overflowing(folder, number=3):
    """Save a flagged Llama in which one block adds about 300,000 where the flag is set: float16 ends at 65,504."""

    def do(tensors):
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            tensors[block(number, name)][0] = 0
            tensors[block(number, name)][0, 0] = 10.0
        tensors[block(number, "mlp.down_proj")][:, 0] = 0
        tensors[block(number, "mlp.down_proj")][0, 0] = 100.0

    return change(flagged(folder), do)


def with_head(folder, weight=6e4):
    """Save a flagged Llama whose head multiplies the flag by so much that a logit overflows float16."""
    return change(flagged(folder), lambda tensors: tensors["lm_head.weight"].__setitem__((5, 0), weight))


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
    return flagged(tmp_path_factory.mktemp("models") / "broken", flag=math.nan)


def sequences_with_the_rare_token(model, text, samples=SAMPLES, length=LENGTH):
    """The numbers, from 1, of the drawn sequences that hold it; and the hash of those that do not."""
    rows = calibration_sequences(model, text, samples, length)
    (token,) = AutoTokenizer.from_pretrained(model)(RARE).input_ids
    bad = (rows == token).any(1)
    assert 0 < int(bad.sum()) < len(rows)
    return [number + 1 for number in bad.nonzero().flatten().tolist()], tokens_sha256(rows[~bad])


def search(program, tmp_path, model, text, *options, **more):
    words = ("search", model, "--remove", 2, *calibration(text, SAMPLES, LENGTH), "--sample-tokens", 0, *options)
    result = program.run(*words, cwd=tmp_path, **more)
    assert "Traceback" not in result.stderr, result.stderr
    return result


MODELS = {
    "nan": (lambda folder: flagged(folder, flag=math.nan), "float32", "the embeddings"),
    "infinity": (lambda folder: flagged(folder, flag=-math.inf), "bfloat16", "the embeddings"),
    "cast": (lambda folder: flagged(folder, flag=1e5), "float16", "the embeddings"),
    "block": (overflowing, "float16", "block 3"),
    "head": (with_head, "float16", "the head"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_bad_sequence_is_named_with_its_text_and_the_block(program, tmp_path, text, kind):
    make, dtype, place = MODELS[kind]
    model = make(tmp_path / "model")
    bad, _ = sequences_with_the_rare_token(model, text)
    result = search(program, tmp_path, model, text, "--dtype", dtype)
    assert result.exit_code == 4, result.stderr
    assert f"computes NaN or infinity in {dtype}, before any removal: in {place}, on" in result.stderr
    assert f"sequence {bad[0]} of {SAMPLES}, which is from {text} and begins" in result.stderr
    assert f"{len(bad) - 1} more of the {SAMPLES} sequences are like this" in result.stderr
    assert "leave out such sequences: --skip-bad-sequences" in result.stderr
    assert ("use --dtype bfloat16" in result.stderr) == (dtype == "float16")
    assert os.listdir(tmp_path) == ["model"], "what was measured on bad sequences is of no use, and was kept"
    if dtype == "float16" and kind != "head":  # whose logits are finite in bfloat16, but as large
        wider = search(program, tmp_path, model, text, "--dtype", "bfloat16")
        assert wider.exit_code == 0, wider.stderr


def ways(*left_out):
    """The names in PLANS, the slower ones only with `-m faults`."""
    return [
        pytest.param(name, marks=pytest.mark.faults) if name in SLOWER else name
        for name in PLANS
        if name not in left_out
    ]


@pytest.mark.parametrize("kind", ways("one by one", "batches of three"))
def test_without_the_option_every_way_to_search_refuses_a_bad_sequence(program, tmp_path, broken, text, kind):
    result = search(program, tmp_path, broken, text, *PLANS[kind])
    assert result.exit_code == 4
    assert "in the embeddings, on calibration sequence" in result.stderr


@pytest.mark.parametrize("kind", ways())
def test_bad_sequences_are_left_out_and_recorded_in_every_way_to_search(program, tmp_path, broken, text, kind):
    bad, used = sequences_with_the_rare_token(broken, text)
    result = search(program, tmp_path, broken, text, "--skip-bad-sequences", *PLANS[kind])
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "plan.json")
    assert [each.sequence for each in plan.calibration.skipped] == bad
    assert {each.first for each in plan.calibration.skipped} == {"the embeddings"}
    assert (plan.calibration.sequences, plan.calibration.tokens_sha256) == (SAMPLES - len(bad), used)
    assert f"Left out {len(bad)} of {SAMPLES} calibration sequences" in result.stderr
    assert f"{bad[0]} (first in the embeddings)" in result.stderr
    assert f"{SAMPLES - len(bad)} x {LENGTH} tokens, {len(bad)} left out" in result.stdout


def test_where_no_sequence_is_bad_the_option_changes_nothing(program, tmp_path, tiny_llama, text):
    plans = []
    for options in ((), ("--skip-bad-sequences", "--force")):
        assert search(program, tmp_path, tiny_llama, text, *options).exit_code == 0
        plans.append({**json.loads((tmp_path / "plan.json").read_text()), "environment": None})
    assert plans[0] == plans[1]
    assert plans[0]["calibration"]["skipped"] is None


def test_the_block_that_overflows_is_in_the_plan(program, tmp_path, text):
    model = overflowing(tmp_path / "model")
    result = search(program, tmp_path, model, text, "--dtype", "float16", "--skip-bad-sequences", "--batch-size", 5)
    assert result.exit_code == 0, result.stderr
    skipped = read_plan(tmp_path / "plan.json").calibration.skipped
    assert [each.sequence for each in skipped] == sequences_with_the_rare_token(model, text)[0]
    assert {each.first for each in skipped} == {"block 3"}


@pytest.mark.parametrize(("good", "options", "code"), [(0, (), 5), (1, (), 0), (1, ("--holdout", "0.5"), 5)])
def test_too_few_sequences_that_are_left_are_an_error(program, tmp_path, broken, text, good, options, code):
    rare = " ".join([RARE] * (4 * LENGTH))
    (tmp_path / "bad.txt").write_text(rare + prose(3) if good else rare)
    ids = AutoTokenizer.from_pretrained(broken)((tmp_path / "bad.txt").read_text()).input_ids
    token = AutoTokenizer.from_pretrained(broken)(RARE).input_ids[0]
    windows = [token not in ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    while sum(windows) > good:  # cut the text so that this many are good
        ids = ids[:-LENGTH]
        windows.pop()
    (tmp_path / "bad.txt").write_text(AutoTokenizer.from_pretrained(broken).decode(ids))
    words = ("--samples", len(windows), "--skip-bad-sequences", *options)
    result = search(program, tmp_path, broken, tmp_path / "bad.txt", *words)
    assert result.exit_code == code, result.stderr
    if code:
        assert f"finite numbers on {good or 'none'} of the {len(windows)} calibration sequences" in result.stderr
    else:
        assert len(read_plan(tmp_path / "plan.json").calibration.skipped) == len(windows) - 1


def stripped(path):
    """A plan without what differs between two runs."""
    return {**json.loads(path.read_text()), "environment": None}


@counts(2, 12)
def test_a_search_without_bad_sequences_goes_on_after_a_kill(program, tmp_path, broken, text, count):
    words = ("--skip-bad-sequences", "--batch-size", 4)
    whole = search(program, tmp_path, broken, text, *words, "-o", "whole.json")
    assert whole.exit_code == 0
    calls = program.count(
        "search", broken, "--remove", 2, *calibration(text, SAMPLES, LENGTH), "--sample-tokens", 0, *words,
        cwd=tmp_path, fault=Fault(tmp_path, calls=Calls.CHANGES), environment={},
    ).calls  # fmt: skip
    (tmp_path / "plan.json").unlink()
    for number in range(count):
        at = 2 + number * (len(calls) - 2) // count
        fault = Fault(tmp_path, at=at, what=KILL, calls=Calls.CHANGES)
        killed = search(program, tmp_path, broken, text, *words, "--force", fault=fault)
        assert killed.was_killed, f"call {at} of {len(calls)}"
        again = search(program, tmp_path, broken, text, *words, "--resume")
        assert again.exit_code == 0, f"killed at call {at}: {again.stderr}"
        assert stripped(tmp_path / "plan.json") == stripped(tmp_path / "whole.json"), f"killed at call {at}"
        (tmp_path / "plan.json").unlink()


def test_a_plan_without_bad_sequences_is_extended_and_applied(program, tmp_path, broken, text):
    two = search(program, tmp_path, broken, text, "--skip-bad-sequences", "-o", "two.json")
    one = search(program, tmp_path, broken, text, "--skip-bad-sequences", "-o", "one.json", "--remove", 1)
    assert (one.exit_code, two.exit_code) == (0, 0)
    extended = program.run("search", broken, "--extend", "one.json", "--remove", 2, "--sample-tokens", 0, cwd=tmp_path)
    assert extended.exit_code == 0, extended.stderr
    ours, other = read_plan(tmp_path / "one.json"), read_plan(tmp_path / "two.json")
    assert (ours.calibration, ours.steps) == (other.calibration, other.steps)
    applied = program.run("apply", "one.json", "-o", "small", "--no-verify", cwd=tmp_path)
    assert applied.exit_code == 0, applied.stderr
    assert read_plan(tmp_path / "small" / "sleb_plan.json").calibration.skipped == ours.calibration.skipped


def test_a_plan_from_before_the_option_is_read(program, tmp_path, tiny_llama, text):
    assert search(program, tmp_path, tiny_llama, text).exit_code == 0
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["calibration"]["skipped"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert read_plan(tmp_path / "plan.json").calibration.drawn == SAMPLES
    extended = program.run("search", tiny_llama, "--extend", "plan.json", "--remove", 3, cwd=tmp_path)
    assert extended.exit_code == 0, extended.stderr


def in_two_processes(program, tmp_path, *words):
    """Run the program twice at once, as a launcher does, and return how both ended."""
    with socket.socket() as place:
        place.bind(("localhost", 0))
        port = place.getsockname()[1]
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    running = [
        program.start(*words, cwd=tmp_path, environment={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    return [each.wait() for each in running]


@pytest.mark.parametrize("options", [(), ("--stream",), ("--fast", "--holdout", 0.2)], ids=str)
def test_processes_leave_out_the_same_sequences(program, tmp_path, broken, text, options):
    words = ("search", broken, "--remove", 2, *calibration(text, SAMPLES, LENGTH), "--sample-tokens", 0, *options)
    alone = program.run(*words, "--skip-bad-sequences", "-o", "alone.json", cwd=tmp_path)
    assert alone.exit_code == 0, alone.stderr
    ended = in_two_processes(program, tmp_path, *words, "--skip-bad-sequences", "-o", "both.json")
    assert [each.exit_code for each in ended] == [0, 0], ended[0].stderr
    assert stripped(tmp_path / "both.json") == stripped(tmp_path / "alone.json")
    refused = in_two_processes(program, tmp_path, *words, "-o", "neither.json")
    assert refused[0].exit_code == 4
    assert "in the embeddings, on calibration sequence" in refused[0].stderr
    assert not (tmp_path / "neither.json").exists()


def needed(folder, number=2):
    """Save a model with one block that keeps float16 in range: its neighbours add 40,000 each, and it subtracts it."""
    save_model(folder, llama_config(mlp_bias=True))

    def do(tensors):
        for other in (number - 1, number, number + 1):
            bias = tensors[f"model.layers.{other}.mlp.down_proj.bias"]
            bias[0] = -40_000.0 if other == number else 40_000.0

    return change(folder, do)


@pytest.mark.parametrize(
    "options",
    [(), ("--fast",), ("--stream",), ("--strategy", "beam"), ("--strategy", "refine"), ("--strategy", "contiguous"),
     ("--strategy", "oneshot"), ("--batch-size", 5)],
    ids=lambda options: " ".join(map(str, options)) or "exact",
)  # fmt: skip
def test_a_block_without_which_numbers_overflow_is_never_removed(program, tmp_path, text, options):
    model = needed(tmp_path / "model")
    result = search(program, tmp_path, model, text, "--dtype", "float16", "--remove", 1, *options)
    assert result.exit_code == 0, result.stderr
    content = (tmp_path / "plan.json").read_text()
    json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    step = read_plan(tmp_path / "plan.json").steps[0]
    assert step.scores.pop(2, "absent") is None
    assert step.block != 2
    assert all(score is not None and math.isfinite(score) for score in step.scores.values())
    assert "Without block 2, scores are not finite numbers, which count as the worst" in result.stderr
    page = program.run("export", "plan.json", "--to", "report", "-o", "report.html", cwd=tmp_path)
    assert page.exit_code == 0, page.stderr


def test_a_score_that_is_not_finite_is_null_in_the_journal_and_remembered(program, tmp_path, text):
    model = needed(tmp_path / "model")
    words = ("--dtype", "float16", "--remove", 1)
    whole = search(program, tmp_path, model, text, *words, "-o", "whole.json")
    assert whole.exit_code == 0
    running = program.start(
        "search", model, *calibration(text, SAMPLES, LENGTH), "--sample-tokens", 0, *words, cwd=tmp_path,
        fault=Fault(tmp_path, at=1, what=KILL, calls=Calls.RENAME),
    )  # fmt: skip
    assert running.wait().exit_code == -signal.SIGKILL  # as the plan was about to take its name
    lines = (tmp_path / "plan.json.journal").read_bytes().splitlines()
    documents = []
    for line in lines:
        checksum, _, document = line.partition(b" ")
        assert int(checksum, 16) == zlib.crc32(document)
        documents.append(json.loads(document, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))
    without = [each for each in documents[1:] if each["block"] == 2]
    assert without
    assert any(score is None for each in without for score in each["scores"])
    again = search(program, tmp_path, model, text, *words, "--resume")
    assert again.exit_code == 0, again.stderr
    assert stripped(tmp_path / "plan.json") == stripped(tmp_path / "whole.json")


def test_where_every_candidate_overflows_nothing_is_chosen(program, tmp_path, text):
    model = needed(tmp_path / "model")
    result = search(program, tmp_path, model, text, "--dtype", "float16", "--remove", 1, "--protect", "1,3,4")
    assert result.exit_code == 4
    assert "Without block 2, the model computes numbers that are not finite" in result.stderr
    assert "--dtype bfloat16" in result.stderr
    assert not (tmp_path / "plan.json").exists()


def with_idle_blocks(folder, idle=(2, 3, 4, 5)):
    """Save a Llama of 8 blocks in which these add nothing: the model without one is bit for bit the model with it."""

    def do(tensors):
        for number in idle:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                tensors[block(number, name)].zero_()

    return change(save_model(folder, llama_config(8)), do)


def with_twins(folder):
    """Save a Llama whose blocks 2 and 3 are the same, so that it is one model without either."""

    def do(tensors):
        for name in [name for name in tensors if ".layers.2." in name]:
            tensors[name.replace(".2.", ".3.")] = tensors[name].clone()

    return change(save_model(folder, llama_config(6)), do)


@pytest.mark.parametrize(
    "options",
    [*[("--strategy", name) for name in ("greedy", "beam", "refine", "oneshot", "contiguous")],
     ("--fast",), ("--stream",), ("--fast", "--strategy", "beam")],
    ids=" ".join,
)  # fmt: skip
def test_of_blocks_that_score_alike_the_lowest_goes(program, tmp_path, text, options):
    model = with_idle_blocks(tmp_path / "model")
    options = ("--protect", "1,6", *options)
    assert search(program, tmp_path, model, text, *options).exit_code == 0
    plan = read_plan(tmp_path / "plan.json")
    assert plan.removals == (2, 3)
    scores = plan.steps[0].scores
    assert set(scores) == {2, 3, 4, 5}
    assert set(scores.values()) == {plan.dense.loss}


@pytest.mark.parametrize("options", [(), ("--metric", "cosine"), ("--metric", "magnitude")], ids=str)
def test_of_two_blocks_that_are_the_same_the_lower_goes(program, tmp_path, text, options):
    model = with_twins(tmp_path / "model")
    words = ("--protect", "1,4", "--remove", 1, *options)
    assert search(program, tmp_path, model, text, *words).exit_code == 0
    step = read_plan(tmp_path / "plan.json").steps[0]
    assert set(step.scores) == {2, 3}
    if "cosine" not in options:  # which sees them at different depths
        assert step.scores[2] == step.scores[3]
        assert step.block == 2


def plans_with_threads(tmp_path, searches):
    """Run these searches in one process with one thread and in one with two; return the plans of both."""
    program = (
        "import json, sys, torch; from sleb_cli.__main__ import main\n"
        "threads, searches = int(sys.argv[1]), json.loads(sys.argv[2])\n"
        "assert torch.get_num_threads() == threads\n"
        "assert all(main(words) == 0 for words in searches)"
    )
    folders = []
    for threads in (1, 2):
        folder = tmp_path / f"{threads} threads"
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["OMP_WAIT_POLICY"] = "passive"  # other tests run on the same cores
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        words = [sys.executable, "-c", program, str(threads), json.dumps(searches)]
        subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
        folders.append(folder)
    return [[read_plan(path) for path in sorted(folder.glob("*.json"))] for folder in folders]


def same_but_for_rounding(one, two):
    """Whether two plans remove the same blocks in the same order, by scores that agree to 1e-5."""
    assert (one.removals, [step.block for step in one.steps]) == (two.removals, [step.block for step in two.steps])
    for left, right in zip(one.steps, two.steps, strict=True):
        assert left.scores.keys() == right.scores.keys()
        assert all(math.isclose(left.scores[b], right.scores[b], rel_tol=1e-5, abs_tol=1e-5) for b in left.scores)
    assert math.isclose(one.dense.loss, two.dense.loss, rel_tol=1e-5)


def options_of(model, text, remove, samples, length):
    words = ("search", model, "--remove", remove, *calibration(text, samples, length), "--sample-tokens", 0)
    return [str(word) for word in (*words, "--dtype", "float32", "-q")]


@pytest.mark.faults
def test_one_thread_and_two_make_the_same_plan(tmp_path, tiny_llama, text):
    searches = [
        [*options_of(tiny_llama, text, 2, 12, 32), "-o", "exact.json"],
        [*options_of(tiny_llama, text, 2, 12, 32), "--fast", "-o", "fast.json"],
    ]
    one, two = plans_with_threads(tmp_path, searches)
    assert len(one) == len(two) == len(searches)
    for left, right in zip(one, two, strict=True):
        same_but_for_rounding(left, right)


@pytest.mark.faults
def test_one_thread_and_two_make_the_same_plan_of_a_trained_model(tmp_path, shared_data, text):
    model = shared_data / "models" / "stories260K"
    names = ("greedy", "beam", "refine", "oneshot", "contiguous")
    searches = [[*options_of(model, text, 2, 16, 128), "--strategy", name, "-o", f"{name}.json"] for name in names]
    one, two = plans_with_threads(tmp_path, [*searches, [*searches[0][:-1], "fast.json", "--fast"]])
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        same_but_for_rounding(left, right)

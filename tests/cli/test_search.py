"""`sleb search`, through `main()`."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from conftest import calibration, gpt2_config, llama_config, save_model, weights_of
from sleb_cli.plan import read_plan
from sleb_cli.units import format_perplexity


def search(run_sleb, model, text_file, *options):
    return run_sleb("search", model, *calibration(text_file), *options)


def test_a_search_writes_a_plan_and_shows_it(run_sleb, tiny_llama, text_file, tmp_path):
    result = search(run_sleb, tiny_llama, text_file, "--ratio", "0.3")
    assert result.exit_code == 0, result.stderr
    plan = read_plan(tmp_path / "plan.json")
    assert len(plan.removals) == 2
    assert plan.model.id == str(tiny_llama)
    assert plan.model.family == "llama"
    assert plan.search.ratio == "0.3"
    assert [step.scores[step.block] for step in plan.steps] == [step.score for step in plan.steps]
    for block in plan.removals:
        assert re.search(rf"│\s+{block}\s+│", result.stdout)
    strip = next(line for line in result.stdout.splitlines() if "█" in line)
    assert [index for index, mark in enumerate(strip.strip()) if mark == "·"] == sorted(plan.removals)
    assert "step 2 of 2: block" in result.stderr
    assert "4 x 32 tokens" in result.stdout


def test_three_steps_or_more_are_drawn_as_a_chart(run_sleb, tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = search(run_sleb, tiny_llama, text_file, "--remove", 3, "--holdout", 0.5)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    start = lines.index("perplexity by blocks removed   ● searched on   ○ held out")
    chart = lines[start + 1 : start + 9]
    plan = read_plan(tmp_path / "plan.json")
    values = [plan.dense.perplexity, *(step.perplexity for step in plan.steps)]
    values += [plan.dense.held_out.perplexity, *(step.held_out.perplexity for step in plan.steps)]
    assert chart[0].split(" ┤")[0].strip() == format_perplexity(max(values))
    assert chart[-2].split(" ┤")[0].strip() == format_perplexity(min(values))
    assert chart[-1].split() == ["0", "1", "2", "3"]
    assert "".join(chart).count("●") == 4
    assert "  █ kept   · removed" in lines
    assert "\x1b" not in result.stdout
    assert max(len(line) for line in lines if line[:1] in "┏┃┡│└ ") <= 80
    two = search(run_sleb, tiny_llama, text_file, "--remove", 2, "--force")
    assert "perplexity by blocks removed" not in two.stdout


def test_the_same_search_writes_the_same_plan(run_sleb, tiny_llama, text_file, tmp_path):
    for name in ("a.json", "b.json"):
        assert search(run_sleb, tiny_llama, text_file, "--remove", 2, "-o", name).exit_code == 0
    plans = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    for plan in plans:
        del plan["environment"]
    assert plans[0] == plans[1]


def test_batches_do_not_change_the_result(run_sleb, tiny_llama, text_file):
    plans = [
        json.loads(
            search(
                run_sleb, tiny_llama, text_file, "--remove", 2, "--batch-size", n, "--json", "-o", f"{n}.json"
            ).stdout
        )
        for n in (1, 3, 4)
    ]
    for plan in plans[1:]:
        assert plan["removals"] == plans[0]["removals"]
        assert plan["steps"][1]["scores"] == pytest.approx(plans[0]["steps"][1]["scores"], abs=1e-5)


def test_only_json_on_stdout_and_nothing_on_stderr_when_quiet(run_sleb, tiny_llama, text_file):
    result = search(run_sleb, tiny_llama, text_file, "--remove", 1, "--json", "-q")
    assert json.loads(result.stdout)["schema_version"] == 1
    assert result.stderr == ""


def test_the_model_writes_its_own_calibration_text(run_sleb, tiny_opt, tiny_llama):
    for model, bos in ((tiny_llama, False), (tiny_opt, True)):
        options = ["--calibration", "self", "--samples", 3, "--sequence-length", 16, "--remove", 1, "--json", "--force"]
        plans = [json.loads(run_sleb("search", model, *options, "--seed", seed).stdout) for seed in (0, 0, 1)]
        hashes = [plan["calibration"]["tokens_sha256"] for plan in plans]
        assert hashes[0] == hashes[1] != hashes[2]
        expected = {"source": "self", "seed": 0, "sequences": 3, "sequence_length": 16, "bos": bos, "chat": None}
        assert plans[0]["calibration"] == expected | {"tokens_sha256": hashes[0], "skipped": None}


def test_a_jsonl_file_calibrates_like_the_text_in_it(run_sleb, tiny_llama, text_file, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text_file.read_text()}) + "\n\n")
    plans = [
        json.loads(search(run_sleb, tiny_llama, source, "--remove", 1, "--json", "--force").stdout)
        for source in (text_file, "t.jsonl")
    ]
    assert plans[0]["calibration"]["tokens_sha256"] == plans[1]["calibration"]["tokens_sha256"]


def test_a_mixture_is_named_in_the_plan_and_gone_on_with(run_sleb, tiny_llama, text_file, tmp_path):
    mixture = calibration(f"self:0.25,{text_file}:0.75")
    result = run_sleb("search", tiny_llama, "--remove", 1, *mixture, "-o", "one.json")
    assert result.exit_code == 0, result.stderr
    assert f"calibrated on self:0.25,{text_file.name}:0.75: 4 x 32 tokens" in result.stdout
    assert run_sleb("search", tiny_llama, "--remove", 2, *mixture).exit_code == 0
    assert run_sleb("search", tiny_llama, "--extend", "one.json", "--remove", 2).exit_code == 0
    two, extended = (read_plan(tmp_path / name) for name in ("plan.json", "one.json"))
    assert (extended.steps, extended.calibration) == (two.steps, two.calibration)


def test_conversations_are_scored_on_their_answers(run_sleb, tmp_path):
    folder = save_model(tmp_path / "chatty", llama_config())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    turns = [{"role": "user", "content": "river mountain"}, {"role": "assistant", "content": "snow water stone"}]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 80))
    options = ["--remove", 2, *calibration("chat.jsonl"), "--force"]
    plans = {}
    for chat in ("all", "answers"):
        result = run_sleb("search", folder, *options, "--chat", chat)
        assert result.exit_code == 0, result.stderr
        plans[chat] = read_plan(tmp_path / "plan.json")
        assert plans[chat].calibration.chat == chat
    assert "chat.jsonl: 4 x 32 tokens, the answers of conversations" in result.stdout
    assert plans["all"].dense.loss != plans["answers"].dense.loss
    extended = run_sleb("search", folder, "--extend", "plan.json", "--remove", 3, "--json")
    assert extended.exit_code == 0, extended.stderr
    assert json.loads(extended.stdout)["steps"][:2] == [step.to_data() for step in plans["answers"].steps]
    plain = run_sleb("search", folder, "--remove", 1, *calibration("chat.jsonl"), "--force")
    assert plain.exit_code == 5
    assert "with --chat" in plain.stderr


def test_cosine_needs_one_pass_and_still_gives_the_perplexity(run_sleb, tiny_llama, text_file):
    result = search(run_sleb, tiny_llama, text_file, "--remove", 2, "--metric", "cosine", "--json")
    plan = json.loads(result.stdout)
    assert plan["search"]["engine"] == "fork"
    assert all(0 <= score <= 2 for step in plan["steps"] for score in step["scores"].values())
    nll = search(run_sleb, tiny_llama, text_file, "--remove", 1, "--json", "--force")
    by_nll = json.loads(nll.stdout)["steps"][0]["scores"]
    import math

    block = str(plan["removals"][0])
    assert plan["steps"][0]["perplexity"] == pytest.approx(math.exp(by_nll[block]), rel=1e-5)


def test_a_family_nobody_claims_is_read_by_structure(run_sleb, tiny_gpt2, text_file):
    result = search(run_sleb, tiny_gpt2, text_file, "--remove", 1, "--json")
    assert "never tested" not in result.stderr
    assert json.loads(result.stdout)["model"]["family"] == "structure"


def test_bfloat16_is_recorded_and_its_losses_are_near(run_sleb, tiny_llama, text_file):
    plans = [
        json.loads(search(run_sleb, tiny_llama, text_file, "--remove", 1, "--json", "--force", "--dtype", d).stdout)
        for d in ("float32", "bf16")
    ]
    assert [plan["search"]["dtype"] for plan in plans] == ["float32", "bfloat16"]
    assert plans[0]["dense"]["loss"] == pytest.approx(plans[1]["dense"]["loss"], abs=0.05)


def test_without_protection_the_ends_are_candidates(run_sleb, tiny_llama, text_file):
    ends = ["--protect-first", 0, "--protect-last", 0]
    plan = json.loads(search(run_sleb, tiny_llama, text_file, "--remove", 1, *ends, "--json").stdout)
    assert (plan["search"]["protect_first"], plan["search"]["protect_last"]) == (0, 0)
    assert set(plan["steps"][0]["scores"]) == set("012345")


def test_a_race_is_told_in_the_plan_and_on_the_screen(run_sleb, tiny_llama, text_file, tmp_path):
    settings = [*calibration(text_file, samples=32, length=32), "--remove", 2]
    exact = run_sleb("search", tiny_llama, *settings, "--json", "-o", "exact.json")
    result = run_sleb("search", tiny_llama, *settings, "--fast", "--batch-size", 1)
    assert result.exit_code == 0, result.stderr
    plan, exact = read_plan(tmp_path / "plan.json"), json.loads(exact.stdout)
    assert plan.search.fast
    assert list(plan.removals) == exact["removals"]
    dropped = 0
    for step, other in zip(plan.steps, exact["steps"], strict=True):
        assert set(step.scores) | set(step.race.dropped) == set(map(int, other["scores"]))
        for block, score in step.scores.items():  # over all sequences, as without a race
            assert score == pytest.approx(other["scores"][str(block)], abs=1e-5)
        for drop in step.race.dropped.values():
            assert 2 <= drop.sequences < 32
            assert drop.behind > 0
        dropped += len(step.race.dropped)
    assert dropped > 0
    assert re.search(r"raced: \d+% of the evaluations; the closest lead was \d\.\d{4}, in step [12]", result.stdout)


def test_an_existing_plan_is_not_overwritten(run_sleb, tiny_llama, text_file, tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    result = search(run_sleb, tiny_llama, text_file, "--remove", 1)
    assert result.exit_code == 8
    assert "plan.json already exists" in result.stderr
    assert (tmp_path / "plan.json").read_text() == "mine"
    assert search(run_sleb, tiny_llama, text_file, "--remove", 1, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "No target given: one of --ratio, --remove, --target-params"),
        (("--ratio", "0.2", "--remove", 1), 2, "--ratio and --remove are different targets"),
        (("--ratio", "0"), 2, "ratio 0 is not between"),
        (("--ratio", "1"), 2, "ratio 1 is not between"),
        (("--ratio", "1.2"), 2, "ratio 1.2 is not between"),
        (("--ratio", "-0.1"), 2, "ratio -0.1 is not between"),
        (("--ratio", "nan"), 2, "ratio nan is not between"),
        (("--ratio", "0.9"), 2, "Cannot remove 6 of 6 blocks: only 4 can be removed"),
        (("--remove", "5"), 2, "Cannot remove 5 of 6 blocks"),
        (("--remove", "0"), 2, "Cannot remove 0 blocks"),
        (("--remove", "-1"), 2, "--remove -1 is too small"),
        (("--remove", "x"), 2, "--remove"),
        (("--remove", 1, "--protect-first", "9"), 2, "only 0 can be removed"),
        (("--remove", 1, "--metric", "nl"), 2, "Did you mean 'nll'?"),
        (("--remove", 1, "--metric", "zzz"), 2, "There are: angular, cosine, kl"),
        (("--remove", 1, "--dtype", "int3"), 2, "no data type 'int3'"),
        (("--remove", 1, "--device", "gpu"), 2, "no device 'gpu'"),
        (("--remove", 1, "--samples", "0"), 2, "--samples 0"),
        (("--remove", 1, "--samples", "9999"), 5, "text for"),
        (("--remove", 1, "--sequence-length", "1"), 2, "--sequence-length 1 is too small"),
        (("--remove", 1, "--sequence-length", "129"), 2, "128 positions"),
        (("--remove", 1, "--batch-size", "0"), 2, "--batch-size 0"),
        (("--remove", 1, "--memory", "lots"), 2, "--memory lots is not a size"),
        (("--remove", 1, "--memory", "0"), 2, "--memory 0 is not a size"),
        (("--remove", 1, "--metric", "cosine", "--fast"), 2, "cosine, which does not score sequence by sequence"),
        (("--remove", 1, "--extend", "nowhere.json"), 3, "no plan nowhere.json"),
        (("--remove", 1, "--calibration", "nowhere.txt"), 5, "no file nowhere.txt"),
        (("--remove", 1, "--calibration", "wikitext3"), 5, "no text source 'wikitext3'"),
        (("--remove", 1, "--calibration", "."), 5, "is a folder"),
        (("--remove", 1, "--calibration", "org/a:b:c:d:e"), 5, "no text source"),
        (("--remove", 1, "--calibration", "c4:0.5,self:0.4"), 2, "sum to 0.9, not to 1"),
        (("--remove", 1, "--chat", "answer"), 2, "--chat"),
        (("--remove", 1, "--chat", "all"), 2, "no chat template"),
        (("--remove", 1, "--revision", "main"), 2, "--revision does not apply"),
        (("--frobnicate",), 2, "--frobnicate"),
        (("--remove", 1, "-o", "no/plan.json"), 8, "folder does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    run_sleb, tiny_llama, text_file, tmp_path, options, code, message
):
    result = search(run_sleb, tiny_llama, text_file, *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert "error:" in result.stderr
    assert "hint:" in result.stderr
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(run_sleb, tiny_llama, text_file, device, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    result = search(run_sleb, tiny_llama, text_file, "--remove", 1, "--device", device)
    assert result.exit_code == 7
    assert f"no usable {device}" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xff", "not UTF-8"),
        (b"few words", "less than one sequence of 32"),
    ],
)
def test_text_that_does_not_do(run_sleb, tiny_llama, tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    result = search(run_sleb, tiny_llama, "t.txt", "--remove", 1)
    assert result.exit_code == 5
    assert message in result.stderr


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '["text"]', '{"text": 3}'])
def test_a_jsonl_line_that_does_not_do_is_named(run_sleb, tiny_llama, tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line)
    result = search(run_sleb, tiny_llama, "t.jsonl", "--remove", 1)
    assert result.exit_code == 5
    assert "ine 2 of t.jsonl" in result.stderr


def test_too_little_text_for_the_default_is_said_not_refused(run_sleb, tiny_llama, tmp_path, text_file):
    (tmp_path / "t.txt").write_text(text_file.read_text()[:1500])
    result = run_sleb("search", tiny_llama, "--remove", 1, "--calibration", "t.txt", "--sequence-length", 64)
    assert result.exit_code == 0
    assert "using all of them" in result.stderr


def test_a_model_with_one_block(run_sleb, text_file, tmp_path):
    folder = save_model(tmp_path / "one", llama_config(1))
    result = search(run_sleb, folder, text_file, "--remove", 1)
    assert result.exit_code == 4
    assert "number of blocks" in result.stderr


def test_a_model_whose_own_loss_is_not_finite(run_sleb, text_file, tmp_path):
    folder = save_model(tmp_path / "nan", gpt2_config(3))
    tensors = weights_of(folder)
    tensors["transformer.h.1.mlp.c_fc.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = search(run_sleb, folder, text_file, "--remove", 1)
    assert result.exit_code == 4
    assert "computes NaN or infinity in float32, before any removal: in block 1" in result.stderr
    assert "--skip-bad-sequences" not in result.stderr  # all are bad


def test_a_plan_that_cannot_be_saved_is_not_lost(run_sleb, tiny_llama, text_file, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = search(run_sleb, tiny_llama, text_file, "--remove", 1)
    assert result.exit_code == 8
    assert "the disk is full" in result.stderr
    assert json.loads(result.stdout)["removals"]
    assert os.listdir(tmp_path) == ["plan.json.journal"]
    monkeypatch.undo()
    again = search(run_sleb, tiny_llama, text_file, "--remove", 1, "--resume", "-o", tmp_path / "plan.json")
    assert again.exit_code == 0, again.stderr

"""`sleb search`, through `main()`."""

import json
import re

import pytest

from conftest import llama_config, save_model
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.plan import read_plan
from sleb_cli.units import format_perplexity


def test_a_search_writes_a_plan_and_shows_it(search, tiny_llama, tmp_path):
    result, plan = search("--ratio", "0.3"), read_plan(tmp_path / "plan.json")
    assert len(plan.removals) == 2
    assert (plan.model.id, plan.model.family, plan.request["ratio"]) == (
        str(tiny_llama),
        "llama",
        "0.3",
    )
    assert [step.scores[step.block] for step in plan.steps] == [step.score for step in plan.steps]
    for block in plan.removals:
        assert re.search(rf"│\s+{block}\s+│", result.stdout)
    strip = next(line for line in result.stdout.splitlines() if "█" in line)
    assert [index for index, mark in enumerate(strip.strip()) if mark == "·"] == sorted(
        plan.removals
    )
    assert "step 2 of 2: block" in result.stderr
    assert "4 x 32 tokens" in result.stdout
    assert "perplexity by blocks removed" not in result.stdout


def test_three_steps_or_more_are_drawn_as_a_chart(search, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = search("--remove", 3, "--holdout", 0.5).stdout
    lines = shown.splitlines()
    start = lines.index("perplexity by blocks removed   ● searched on   ○ held out")
    chart = lines[start + 1 : start + 9]
    plan = read_plan(tmp_path / "plan.json")
    values = [of.perplexity for each in (plan.dense, *plan.steps) for of in (each, each.held_out)]
    highest, lowest = (line.split(" ┤")[0].strip() for line in (chart[0], chart[-2]))
    assert (highest, lowest) == (format_perplexity(max(values)), format_perplexity(min(values)))
    assert chart[-1].split() == ["0", "1", "2", "3"]
    assert "".join(chart).count("●") == 4
    assert "  █ kept   · removed" in lines
    assert "\x1b" not in shown
    assert max(len(line) for line in lines if line[:1] in "┏┃┡│└ ") <= 80


def test_a_mixture_is_named_in_the_plan_and_continued(
    search, sleb, tiny_llama, text_file, tmp_path
):
    mixture = f"self:0.25,{text_file}:0.75"
    shown = search("--remove", 1, "-o", "one.json", text=mixture).stdout
    assert f"calibrated on self:0.25,{text_file.name}:0.75: 4 x 32 tokens" in shown
    search("--remove", 2, text=mixture)
    sleb("search", "--extend", "one.json", "--remove", 2)
    two, extended = (read_plan(tmp_path / name) for name in ("plan.json", "one.json"))
    assert (extended.steps, extended.calibration) == (two.steps, two.calibration)


def test_conversations_are_scored_on_their_answers(search, sleb, tmp_path):
    folder = save_model(tmp_path / "chatty", llama_config())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "river mountain"},
        {"role": "assistant", "content": "snow water stone"},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 80))
    of_chat, plans = {"model": folder, "text": "chat.jsonl"}, []
    for chat in ("all", "answers"):
        shown = search("--remove", 2, "--chat", chat, "--force", **of_chat).stdout
        plans.append(read_plan(tmp_path / "plan.json"))
        assert plans[-1].calibration.chat == chat
    assert "chat.jsonl: 4 x 32 tokens, the answers of conversations" in shown
    assert plans[0].dense.loss != plans[1].dense.loss
    sleb("search", folder, "--extend", "plan.json", "--remove", 3)
    assert read_plan(tmp_path / "plan.json").steps[:2] == plans[1].steps
    assert "the answers of conversations" in search("--remove", 1, "--force", **of_chat).stdout


def test_the_screen_says_how_sequences_count(search):
    shown = " ".join(search("--remove 1").stdout.split())
    assert "Each sequence counts the same here, and each token in `sleb eval`." in shown


def test_a_race_is_recorded_and_shown(search, found, tmp_path):
    settings = ["--samples", 32, "--remove", 2]
    exact = found(*settings)
    result = search(*settings, "--fast", "--batch-size", 1, "--force")
    plan = read_plan(tmp_path / "plan.json")
    assert plan.search.fast
    assert plan.removals == exact.removals
    assert any(step.race.dropped for step in plan.steps)
    for step, other in zip(plan.steps, exact.steps, strict=True):
        assert set(step.scores) | set(step.race.dropped) == set(other.scores)
        for block, score in step.scores.items():  # over all sequences, as without a race
            assert score == pytest.approx(other.scores[block], abs=1e-5)
        assert all(
            0 <= drop.sequences < 32 and drop.behind > 0 for drop in step.race.dropped.values()
        )
    assert re.search(
        r"raced: \d+% of the evaluations; the closest lead was \d\.\d{4}, in step [12]",
        result.stdout,
    )


def test_a_race_of_one_candidate_has_no_lead(search):
    shown = search("--remove 1 --fast --protect-first 3 --protect-last 2").stdout
    assert "raced: no step had two candidates to race" in shown


def test_an_existing_plan_is_not_overwritten(search, tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    assert "plan.json already exists" in search("--remove", 1, code=8).stderr
    assert "plan.json has ended" in search("--remove", 1, "--resume", code=8).stderr
    assert (tmp_path / "plan.json").read_text() == "mine"
    search("--remove", 1, "--force")


def test_text_that_does_not_do(search, tmp_path):
    bad_lines = (b"{", b'{"txt": "a"}', b'["text"]', b'{"text": 3}')
    for name, content, message in (
        ("t.txt", b"", "is empty"),
        ("t.txt", b"\xff\xff", "not UTF-8"),
        ("t.txt", b"few words", "less than one sequence of 32"),
        *(("t.jsonl", b'{"text": "a"}\n' + line, "ine 2 of t.jsonl") for line in bad_lines),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in search("--remove", 1, text=name, code=5).stderr


def test_too_little_text_for_the_default_is_no_error(sleb, tiny_llama, tmp_path, text_file):
    (tmp_path / "t.txt").write_text(text_file.read_text()[:1500])
    told = sleb(
        "search", tiny_llama, "--remove", 1, "--calibration", "t.txt", "--sequence-length", 64
    ).stderr
    assert "using all of them" in told


def test_a_model_with_one_block(search, tmp_path):
    folder = save_model(tmp_path / "one", llama_config(1))
    assert "which has 1 block." in search("--remove", 1, model=folder, code=4).stderr


def test_a_search_runs_at_most_so_many_blocks(search, monkeypatch):
    """The dense model, two steps that fork, and the check of the engine: a bound on its work."""
    runs = []
    run_block = SkippableModel.run_block

    def counted(self, *given):
        runs.append(given)
        return run_block(self, *given)

    monkeypatch.setattr(SkippableModel, "run_block", counted)
    search("--remove", 2, "--batch-size", 4, "--sample-tokens", 0)
    assert len(runs) <= 47

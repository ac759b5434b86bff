"""Tasks of lm-eval on dense and pruned models: on results made by hand, and on tiny models."""

import random
import shutil
from pathlib import Path
from statistics import stdev

import lm_eval
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS, tokenizer_with, write_task
from sleb_cli.engine.door.evaluate import load_requested
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_tasks import find_tasks
from sleb_cli.engine.quality.tasks import PRESETS, compare_task
from sleb_cli.engine.statistics import (
    items_needed,
    mcnemar,
    paired_difference,
    paired_proportions_interval,
    wilson_interval,
)
from sleb_cli.events import TaskAdvanced, TaskStarted, ignore
from sleb_cli.requests import EvalRequest
from sleb_cli.tables.quality import tasks, verdicts
from sleb_cli.tables.table import by_model
from sleb_plugins import DataError, UsageError

QUIETLY = ("dense", ignore, ProcessGroup())


def sample(number, score, *, metric="acc", filtered="none", **changes):
    hashes = {f"{part}_hash": f"{part[0]}{number}" for part in ("doc", "prompt", "target")}
    answers = {"arguments": [[f"Q{number}:", " cold"], [f"Q{number}:", " warm"]], "target": 0}
    answers["filtered_resps"] = [[-1.0, False], [-2.0, False]]
    return (
        {"doc_id": number, "filter": filtered, "metrics": [metric], metric: score}
        | hashes
        | answers
        | changes
    )


def results_of(samples, values=None, *, task="weather", metric="acc", output_type="x"):
    """Results in lm-eval's schema; without values, the mean of the samples."""
    scores = [one[metric] for one in samples]
    return {
        "results": {
            task: values
            or {f"{metric},none": sum(scores) / len(scores), f"{metric}_stderr,none": 0.1}
        },
        "group_subtasks": {},
        "configs": {task: {"output_type": output_type, "target_delimiter": " "}},
        "versions": {task: 1.0},
        "n-shot": {task: 2},
        "higher_is_better": {task: {metric: True}},
        "samples": {task: list(samples)},
    }


def binary(*scores, **changes):
    return results_of([sample(number, score) for number, score in enumerate(scores)], **changes)


def one_pruned(dense, pruned, show_flips=0):
    (result,) = compare_task(dense, [((2, 1), pruned)], show_flips)
    return result, result.pruned[0]


def test_right_and_wrong_answers_are_compared_item_by_item():
    before, after = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    without = binary(*after)
    random.Random(0).shuffle(without["samples"]["weather"])  # items are matched by their ids
    result, pruned = one_pruned(binary(*before), without)
    assert (result.task, result.metric, result.filter, result.version) == (
        "weather",
        "acc",
        "none",
        "1.0",
    )
    assert (result.num_fewshot, result.higher_is_better, result.doc_ids) == (
        2,
        True,
        (0, 1, 2, 3, 4, 5),
    )
    assert (result.dense.items, result.dense.interval) == (before, wilson_interval(4, 6))
    assert (pruned.removals, pruned.items, pruned.interval) == (
        (2, 1),
        after,
        wilson_interval(2, 6),
    )
    assert pruned.standard_error == pytest.approx(paired_difference(before, after).standard_error)
    assert pruned.difference_interval == paired_proportions_interval(3, 1, 6)
    assert (pruned.mcnemar_p, pruned.lost, pruned.gained) == (mcnemar(3, 1), 3, 1)
    assert (pruned.difference, pruned.retention) == pytest.approx((-1 / 3, 0.5))
    assert pruned.items_needed == items_needed(stdev([0, -1, -1, 1, 0, -1]))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0, 0, 0)),
        ((0.0, 0.0), (1.0, 0.0), (0.5, None, 1.0, 0, 1)),
        ((1.0,), (0.0,), (-1.0, 0.0, 1.0, 1, 0)),
    ],
    ids=["alike", "never right", "one item"],
)
def test_lost_and_gained_items_are_counted(before, after, expected):
    _, pruned = one_pruned(binary(*before), binary(*after))
    found = (pruned.difference, pruned.retention, pruned.mcnemar_p, pruned.lost, pruned.gained)
    assert found == pytest.approx(expected)
    assert (pruned.standard_error is None) == (len(before) == 1)
    assert (pruned.items_needed is None) == (before == after or len(before) == 1)


def test_scores_that_are_shares_have_an_error_but_no_flips():
    before, after = (0.5, 0.25, 1.0, 0.75), (0.25, 0.25, 0.5, 0.5)
    result, pruned = one_pruned(binary(*before), binary(*after), show_flips=3)
    expected = paired_difference(before, after)
    assert (pruned.difference, pruned.standard_error) == (expected.mean, expected.standard_error)
    assert pruned.difference_interval == expected.interval
    assert (pruned.lost, pruned.gained, pruned.mcnemar_p, pruned.flips) == (None, None, None, ())
    # lm-eval's error, since the items are not right or wrong.
    assert result.dense.interval.high - result.dense.interval.low == pytest.approx(
        2 * 1.96 * 0.1, rel=1e-3
    )


@pytest.mark.parametrize("score", [[-3.0, 4], 0.7, "text"])
def test_a_score_that_is_no_mean_has_a_difference_without_error(score):
    values = [{"bleu,none": value, "bleu_stderr,none": "N/A"} for value in (20.0, 15.0)]
    dense, pruned = (
        results_of([sample(0, score, metric="bleu")], value, metric="bleu") for value in values
    )
    result, scores = one_pruned(dense, pruned)
    assert (result.dense.items, result.dense.interval, scores.items) == ((), None, ())
    assert (scores.difference, scores.retention) == (-5.0, 0.75)
    assert (scores.standard_error, scores.difference_interval, scores.items_needed) == (
        None,
        None,
        None,
    )


def test_each_filter_has_its_own_items():
    scores = {"strict": (1.0, 0.0), "flexible": (1.0, 1.0)}
    samples = [
        sample(n, score, filtered=name)
        for name, pair in scores.items()
        for n, score in enumerate(pair)
    ]
    results = results_of(
        samples, {"acc,strict": 0.5, "acc,flexible": 1.0, "alias": "weather", "sample_len": 2}
    )
    found = {result.filter: result for result in compare_task(results, [])}
    assert {name: result.dense.items for name, result in found.items()} == scores
    assert all(result.doc_ids == (0, 1) for result in found.values())


def group(children, shares, scores):
    """Results of a group of these tasks, whose accuracy is the mean of theirs by these shares."""
    merged, value = (
        {},
        sum(share * sum(scores[name]) / len(scores[name]) for name, share in shares.items()),
    )
    for name, items in scores.items():
        for key, part in binary(*items, task=name).items():
            merged[key] = merged.get(key, {}) | part
    merged["results"]["climate"] = {"acc,none": value, "acc_stderr,none": 0.2, "sample_len": 9}
    return merged | {"group_subtasks": children}


@pytest.mark.parametrize(
    ("by_size", "children"),
    [
        (True, {"climate": ["rain", "sun"]}),
        (False, {"climate": ["inner", "sun"], "inner": ["rain"]}),
    ],
    ids=["flat, by size", "nested, alike"],
)
def test_a_groups_difference_has_the_error_of_its_tasks(by_size, children):
    before = {"rain": (1.0, 1.0, 0.0, 1.0, 1.0, 0.0), "sun": (1.0, 0.0, 1.0)}
    after = {"rain": (0.0, 1.0, 0.0, 0.0, 1.0, 1.0), "sun": (0.0, 0.0, 1.0)}
    shares = {"rain": 6 / 9, "sun": 3 / 9} if by_size else {"rain": 0.5, "sun": 0.5}
    dense, without = group(children, shares, before), group(children, shares, after)
    result = compare_task(dense, [((1,), without)])[-1]
    assert (result.task, result.doc_ids) == ("climate", ())
    assert len(result.items_sha256) == 64  # of the items of its tasks
    (pruned,) = result.pruned
    changes = {name: paired_difference(before[name], after[name]) for name in shares}
    assert pruned.difference == pytest.approx(
        sum(shares[name] * change.mean for name, change in changes.items())
    )
    variance = sum((shares[name] * change.standard_error) ** 2 for name, change in changes.items())
    assert pruned.standard_error == pytest.approx(variance**0.5)
    assert pruned.lost is None
    # Other tasks of the run are none of its own, and tasks with different examples have no one
    # number of them.
    alone, dense["samples"]["snow"], dense["n-shot"]["snow"] = (
        result.items_sha256,
        [sample(9, 1.0)],
        5,
    )
    result = compare_task(dense, [])[-1]
    assert (result.items_sha256, result.num_fewshot) == (alone, 2)
    dense["n-shot"]["sun"] = 3
    assert compare_task(dense, [])[-1].num_fewshot == 0
    del dense["samples"]["snow"]
    # A value that is no mean of its tasks has a difference alone.
    dense["results"]["climate"]["acc,none"], without["results"]["climate"]["acc,none"] = 0.9, 0.3
    pruned = compare_task(dense, [((1,), without)])[-1].pruned[0]
    assert (pruned.difference, pruned.standard_error) == (pytest.approx(-0.6), None)


LONG = [["Q:", " a long answer"], ["Q:", " short"]]
EMPTY = [["Q:", " long"], ["Q:", " "]]
ENDS = [["Ann met Bea since Ann", " was late."], ["Ann met Bea since Bea", " was late."]]


@pytest.mark.parametrize(
    ("kind", "metric", "arguments", "answers", "expected"),
    [
        ("multiple_choice", "acc_norm", LONG, ([[-6, 0], [-5, 0]], [[-15, 0], [-5, 0]]),
         ("Q:", "a long answer", "a long answer", "short")),
        ("multiple_choice", "acc_norm", EMPTY, ([[-6, 0], [-5, 0]],) * 2, ("Q:", "long", "long", "long")),
        ("multiple_choice", "acc", LONG, ([[-4, 0], [-5, 0]], [[-6, 0], [-5, 0]]),
         ("Q:", "a long answer", "a long answer", "short")),
        ("multiple_choice", "acc", ENDS, ([[-1, 0], [-2, 0]], [[-4, 0], [-2, 0]]),
         ("Ann met Bea since ", "Ann was late.", "Ann was late.", "Bea was late.")),
        ("generate_until", "acc", [["2 + 2 =", {}]], ([" 4"], [["5", "6"]]), ("2 + 2 =", "4", " 4", '["5", "6"]')),
    ],
    ids=["by length", "an empty choice", "likeliest", "choices are prompts", "written"],
)  # fmt: skip
def test_a_flip_shows_both_answers(kind, metric, arguments, answers, expected):
    dense, pruned = (
        results_of(
            [sample(0, score, metric=metric, arguments=arguments, filtered_resps=answer, target="4")],
            metric=metric, output_type=kind,
        )
        for score, answer in zip((1.0, 0.0), answers, strict=True)
    )  # fmt: skip
    (lost,), (gained,) = (
        one_pruned(dense, pruned, show_flips=5)[1].flips,
        one_pruned(pruned, dense, 1)[1].flips,
    )
    assert (lost.doc_id, lost.prompt, lost.target, lost.dense, lost.pruned) == (0, *expected)
    assert (gained.dense, gained.pruned) == (lost.pruned, lost.dense)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A multiple-choice task with examples, a written one graded by code of its own, and a group."""
    # To find a group, lm-eval reads all its tasks, which takes ten seconds.
    monkeypatch.setattr(
        "lm_eval.tasks.manager.__file__", str(Path(lm_eval.__file__).parent / "tasks/piqa/none")
    )
    folder, rng = tmp_path / "tasks", random.Random(0)
    rows = [
        {
            "q": " ".join(rng.choices(WORDS, k=5)),
            "choices": rng.sample(WORDS, 2),
            "gold": rng.randint(0, 1),
        }
        for _ in range(12)
    ]
    write_task(folder, "own_chosen", rows, fewshot_split="test", metadata={"version": 3})
    written = write_task(
        folder, "own_written", rows, output_type="generate_until", num_fewshot=0, doc_to_choice=None,
        doc_to_target="{{choices[0]}}", generation_kwargs={"do_sample": False, "max_gen_toks": 5, "until": []},
        metric_list=[{"metric": "length", "aggregation": "mean", "higher_is_better": False}],
    )  # fmt: skip
    (folder / "graders.py").write_text(
        "def grade(doc, results):\n    return {'length': len(results[0]) / 10}\n"
    )
    with written.open("a") as file:
        file.write("process_results: !function graders.grade\n")
    metric = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "own_both", "task": ["own_chosen"], "aggregate_metric_list": [metric]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def task_of(folder, name="own_chosen", **options):
    (task,) = load_requested(EvalRequest(None, tasks=(name,), include_path=folder, **options))
    return task


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), AutoTokenizer.from_pretrained(
        tiny_llama
    )


@pytest.mark.parametrize(
    ("name", "requests", "expected"),
    [("own_chosen", 14, ("acc", "3", True)), ("own_written", 7, ("length", "1.0", False))],
)
def test_a_run_tells_its_progress_and_compares_with_itself(
    folder, loaded, name, requests, expected
):
    events = []
    result = task_of(folder, name, limit=7).run(*loaded, "dense", events.append, ProcessGroup())
    (started,) = [event for event in events if isinstance(event, TaskStarted)]
    assert (started.task, started.total) == (f"{name}, dense", requests)
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == requests
    (compared,) = compare_task(result, [((1,), result)])
    assert (len(compared.doc_ids), compared.pruned[0].difference) == (7, 0)
    assert (compared.metric, compared.version, compared.higher_is_better) == expected


def test_a_group_has_its_tasks_items_and_its_own_metric(folder, loaded):
    results = task_of(folder, "own_both").run(*loaded, *QUIETLY)
    found = {result.task: result for result in compare_task(results, [((1,), results)])}
    assert found["own_both"].dense.value == found["own_chosen"].dense.value
    assert found["own_both"].pruned[0].standard_error == 0


def test_a_chat_template_must_be_there(folder, loaded):
    with pytest.raises(UsageError, match="needs a chat template"):
        task_of(folder, apply_chat_template=True, limit=2).run(*loaded, *QUIETLY)


def test_as_many_examples_as_asked_stand_before_a_question(folder, loaded):
    results = task_of(folder, num_fewshot=2).run(*loaded, *QUIETLY)
    assert results["n-shot"]["own_chosen"] == 2
    assert results["samples"]["own_chosen"][0]["arguments"][0][0].count("\n\n") == 2


def test_a_fingerprint_changes_with_what_results_depend_on(folder, tmp_path):
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}{% endfor %}")

    def now(name="own_chosen", **options):
        return task_of(folder, name, **options).fingerprints(tokenizer)[name]

    def edit(file, old, new):
        (folder / file).write_text((folder / file).read_text().replace(old, new))

    found = [
        now(),
        *(
            now(**each)
            for each in ({"limit": 1}, {"num_fewshot": 1}, {"apply_chat_template": True})
        ),
    ]
    assert now(batch_size=1) == found[0]
    edit("graders.py", "/ 10", "/ 20")
    found += [now(), now("own_both")]
    edit("both.yaml", "weight_by_size: true", "weight_by_size: false")
    found.append(now("own_both"))
    edit("own_chosen.jsonl", '"gold": 1', '"gold": 0')
    found.append(now())
    edit("own_chosen.jsonl", '"q": "', '"q": "is at 0x12: ')
    found.append(now())
    edit("own_chosen.jsonl", "at 0x12", "at 0x13")
    found.append(now())
    folder = shutil.copytree(folder, tmp_path / "moved")
    assert now() == found[-1]
    assert len(set(found)) == len(found)


PROMPT_IN_A_FILE = """
from pathlib import Path
from lm_eval.api.task import ConfigurableTask

class Asked(ConfigurableTask):
    def __init__(self):
        super().__init__(config={config})

    def doc_to_text(self, doc):
        return doc["q"] + Path(__file__).with_name("prompt.txt").read_text()
"""


def test_a_fingerprint_changes_with_what_a_class_of_a_task_asks_and_how_it_grades(folder, loaded):
    config = yaml.safe_load((folder / "own_chosen.yaml").read_text())
    (folder / "own_class.yaml").write_text("task: own_class\nclass: !function asked.Asked\n")
    found = []
    for prompt, more in ((" Answer:", ""), (" Reply:", ""), (" Reply:", "# graded otherwise")):
        (folder / "prompt.txt").write_text(prompt)
        (folder / "asked.py").write_text(PROMPT_IN_A_FILE.replace("{config}", repr(config)) + more)
        found.append(task_of(folder, "own_class").fingerprints(loaded[1])["own_class"])
    assert len({*found}) == 3


def test_models_that_were_asked_other_items_are_not_compared():
    other = results_of([sample(0, 1.0, prompt_hash="another")])
    with pytest.raises(DataError, match="not the same for each model"):
        one_pruned(binary(1.0), other)


def test_tasks_of_lm_eval_are_found_without_an_index_of_all():
    tasks = Path(lm_eval.__file__).parent / "tasks"
    manager = find_tasks(["piqa"], [], ())
    assert len(manager.all_tasks) < 50
    assert manager.task_index["piqa"].yaml_path == tasks / "piqa/piqa.yaml"
    for preset, file in {
        "leaderboard-v1": "benchmarks/openllm",
        "leaderboard-v2": "leaderboard/leaderboard",
    }.items():
        assert (tasks / f"{file}.yaml").read_text().startswith(f"group: {PRESETS[preset][0]}\n")


def test_a_task_that_writes_more_than_the_model_has_positions_for_is_refused(folder, loaded):
    file = folder / "own_written.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 5", "max_gen_toks: 500"))
    with pytest.raises(UsageError, match=r"own_written .* up to 500 tokens, but it has only 128"):
        task_of(folder, "own_written").run(*loaded, *QUIETLY)


def measured(name, use, flips, *, metric="acc", items=200, right=100):
    """A task of so many items, of which a removal turns some wrong and others right."""
    lost, gained = flips
    before = (1.0,) * right + (0.0,) * (items - right)
    after = (
        (0.0,) * lost
        + (1.0,) * (right - lost)
        + (1.0,) * gained
        + (0.0,) * (items - right - gained)
    )
    result, _ = one_pruned(binary(*before), binary(*after))
    return result.model_copy(update={"task": name, "use": use, "metric": metric})


def test_a_verdict_is_of_a_kind_of_use():
    found = verdicts(
        [
            measured("piqa", "choosing", (2, 3), items=2000, right=1000),
            measured("arc_easy", "choosing", (1, 0), items=2000, right=1000),
            measured("arc_easy", "choosing", (900, 0), metric="perplexity", items=2000, right=1000),
            measured("humaneval", "programs", (40, 4)),
            measured("gsm8k", "writing", (5, 4)),
            measured("sleb_instructions", "writing", (0, 0), items=4, right=2),
            measured("sleb_sums", "writing", (100, 0)),
        ]
    )
    assert found.columns == ["use", "model", "kept", "95%", "verdict"]
    assert [[row[0], row[2], row[4]] for row in found.rows] == [
        ["choosing an answer", "100%", "kept"],
        ["writing programs", "64%", "36% lost"],
        ["writing answers", "99%", "no loss shown, at most 7%"],
        ["instructions", "100%", "too few items to tell"],
        ["canaries", "0%", "100% lost"],
    ]
    assert (
        verdicts([measured("piqa", "choosing", (0, 0)).model_copy(update={"pruned": ()})]).rows
        == []
    )


def test_a_model_that_is_measured_alone_has_no_name():
    task = measured("piqa", "choosing", (1, 0))
    assert [row[1] for row in by_model([task], ["piqa"])] == ["dense", "-2"]
    (row,) = by_model([task.model_copy(update={"pruned": ()})], ["piqa"])
    assert (row[1], tasks([row]).columns[:2]) == ("", ["task", "score"])

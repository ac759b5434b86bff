"""Tasks of lm-eval on dense and pruned models: on results made by hand, and on tiny models."""

import random
import shutil
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import lm_eval
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS, tokenizer_with, write_task
from sleb_cli.canaries import PRESETS
from sleb_cli.engine.door.evaluate import load_requested
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_tasks import find_tasks
from sleb_cli.engine.quality.tasks import compare_task
from sleb_cli.engine.statistics import (
    items_needed,
    mcnemar,
    paired_difference,
    paired_proportions_interval,
    wilson_interval,
)
from sleb_cli.events import TaskAdvanced, TaskStarted, ignore
from sleb_cli.requests import EvalRequest
from sleb_cli.tables.quality import by_use, tasks, verdicts
from sleb_cli.tables.table import by_model
from sleb_plugins import DataError, UsageError

QUIETLY = ("dense", ignore, ProcessGroup())


def sample(number, score, metric="acc", **changes):
    answers = {
        "arguments": [["Q:", " cold"], ["Q:", " warm"]],
        "filtered_resps": [[-1.0, False], [-2.0, False]],
        "target": 0,
    }
    hashes = {f"{part}_hash": f"{part}{number}" for part in ("doc", "prompt", "target")}
    found = {"doc_id": number, "filter": "none", "metrics": [metric], metric: score}
    return found | answers | hashes | changes


def results_of(samples, values=None, task="weather", metric="acc", kind="x"):
    """Results in lm-eval's schema; without values, the mean of the samples."""
    if values is None:
        mean = fmean(one[metric] for one in samples)
        values = {f"{metric},none": mean, f"{metric}_stderr,none": 0.1}
    return {
        "results": {task: values},
        "group_subtasks": {},
        "configs": {task: {"output_type": kind, "target_delimiter": " "}},
        "versions": {task: 1.0},
        "n-shot": {task: 2},
        "higher_is_better": {task: {metric: True}},
        "samples": {task: samples},
    }


def binary(scores, task="weather"):
    samples = [sample(number, score) for number, score in enumerate(scores)]
    return results_of(samples, task=task)


def compared(dense, pruned, show_flips=0):
    """The last result, and what it says of a pruned model."""
    result = compare_task(dense, [((2, 1), pruned)], show_flips)[-1]
    return result, result.pruned[0]


def test_right_and_wrong_answers_are_compared_item_by_item():
    before = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
    after = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    without = binary(after)
    random.Random(0).shuffle(without["samples"]["weather"])  # items are matched by their ids
    result, pruned = compared(binary(before), without)
    names = (result.task, result.metric, result.filter, result.version)
    assert names == ("weather", "acc", "none", "1.0")
    assert (result.num_fewshot, result.higher_is_better) == (2, True)
    assert result.doc_ids == (0, 1, 2, 3, 4, 5)
    assert (result.dense.items, result.dense.interval) == (before, wilson_interval(4, 6))
    assert (pruned.items, pruned.interval) == (after, wilson_interval(2, 6))
    assert (pruned.removals, pruned.lost, pruned.gained) == ((2, 1), 3, 1)
    assert pruned.mcnemar_p == mcnemar(3, 1)
    assert pruned.difference_interval == paired_proportions_interval(3, 1, 6)
    assert pruned.standard_error == pytest.approx(paired_difference(before, after).standard_error)
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
    _, pruned = compared(binary(before), binary(after))
    found = (pruned.difference, pruned.retention, pruned.mcnemar_p, pruned.lost, pruned.gained)
    assert found == pytest.approx(expected)
    assert (pruned.standard_error is None) == (len(before) == 1)
    assert (pruned.items_needed is None) == (before == after or len(before) == 1)


def test_scores_that_are_shares_have_an_error_but_no_flips():
    before = (0.5, 0.25, 1.0, 0.75)
    after = (0.25, 0.25, 0.5, 0.5)
    result, pruned = compared(binary(before), binary(after), show_flips=3)
    expected = paired_difference(before, after)
    assert (pruned.difference, pruned.standard_error) == (expected.mean, expected.standard_error)
    assert pruned.difference_interval == expected.interval
    assert (pruned.lost, pruned.gained, pruned.mcnemar_p, pruned.flips) == (None, None, None, ())
    # lm-eval's error, since the items are not right or wrong.
    width = result.dense.interval.high - result.dense.interval.low
    assert width == pytest.approx(2 * 1.96 * 0.1, rel=1e-3)


@pytest.mark.parametrize("score", [[-3.0, 4], 0.7, "text"])
def test_a_score_that_is_no_mean_has_a_difference_without_error(score):
    models = []
    for value in (20.0, 15.0):
        values = {"bleu,none": value, "bleu_stderr,none": "N/A"}
        models.append(results_of([sample(0, score, "bleu")], values, metric="bleu"))
    result, pruned = compared(*models)
    assert (result.dense.items, result.dense.interval, pruned.items) == ((), None, ())
    assert (pruned.difference, pruned.retention) == (-5.0, 0.75)
    assert pruned.standard_error is pruned.difference_interval is pruned.items_needed is None


def test_each_filter_has_its_own_items():
    scores = {"strict": (1.0, 0.0), "flexible": (1.0, 1.0)}
    samples = []
    for name, (first, second) in scores.items():
        samples += [sample(0, first, filter=name), sample(1, second, filter=name)]
    values = {"acc,strict": 0.5, "acc,flexible": 1.0, "alias": "weather", "sample_len": 2}
    found = compare_task(results_of(samples, values), [])
    assert {result.filter: result.dense.items for result in found} == scores
    assert {result.doc_ids for result in found} == {(0, 1)}


def group(children, shares, scores):
    """Results of a group of these tasks, whose accuracy is the mean of theirs by these shares."""
    merged = {}
    value = 0.0
    for name, items in scores.items():
        value += shares[name] * fmean(items)
        for key, part in binary(items, name).items():
            merged[key] = merged.get(key, {}) | part
    merged["results"]["climate"] = {"acc,none": value, "acc_stderr,none": 0.2, "sample_len": 9}
    return merged | {"group_subtasks": children}


@pytest.mark.parametrize(
    ("shares", "children"),
    [
        ({"rain": 6 / 9, "sun": 3 / 9}, {"climate": ["rain", "sun"]}),
        ({"rain": 0.5, "sun": 0.5}, {"climate": ["inner", "sun"], "inner": ["rain"]}),
    ],
    ids=["flat, by size", "nested, alike"],
)
def test_a_groups_difference_has_the_error_of_its_tasks(shares, children):
    before = {"rain": (1.0, 1.0, 0.0, 1.0, 1.0, 0.0), "sun": (1.0, 0.0, 1.0)}
    after = {"rain": (0.0, 1.0, 0.0, 0.0, 1.0, 1.0), "sun": (0.0, 0.0, 1.0)}
    dense = group(children, shares, before)
    without = group(children, shares, after)
    mean = variance = 0
    for name, share in shares.items():
        change = paired_difference(before[name], after[name])
        mean += share * change.mean
        variance += (share * change.standard_error) ** 2
    result, pruned = compared(dense, without)
    assert (result.task, result.doc_ids, pruned.lost) == ("climate", (), None)
    assert (pruned.difference, pruned.standard_error) == pytest.approx((mean, variance**0.5))
    alone = result.items_sha256
    assert len(alone) == 64  # of the items of its tasks
    # Other tasks of the run are none of its own.
    dense["samples"]["snow"] = [sample(9, 1.0)]
    dense["n-shot"]["snow"] = 5
    result = compare_task(dense, [])[-1]
    assert (result.items_sha256, result.num_fewshot) == (alone, 2)
    # Tasks with different examples have no one number of them.
    dense["n-shot"]["sun"] = 3
    assert compare_task(dense, [])[-1].num_fewshot == 0
    # A value that is no mean of its tasks has a difference alone.
    dense["results"]["climate"]["acc,none"] = 0.9
    without["results"]["climate"]["acc,none"] = 0.3
    _, pruned = compared(dense, without)
    assert (pruned.difference, pruned.standard_error) == (pytest.approx(-0.6), None)


LONG = [["Q:", " a long answer"], ["Q:", " short"]]
EMPTY = [["Q:", " long"], ["Q:", " "]]
ENDS = [["Ann met Bea since Ann", " was late."], ["Ann met Bea since Bea", " was late."]]
SUM = [["2 + 2 =", {}]]
LATER = [[-4, 0], [-2, 0]]


@pytest.mark.parametrize(
    ("metric", "asked", "before", "after", "expected"),
    [
        ("acc_norm", LONG, [[-6, 0], [-5, 0]], [[-15, 0], [-5, 0]], "Q:|a long answer|short"),
        ("acc_norm", EMPTY, [[-6, 0], [-5, 0]], [[-6, 0], [-5, 0]], "Q:|long|long"),
        ("acc", LONG, [[-4, 0], [-5, 0]], [[-6, 0], [-5, 0]], "Q:|a long answer|short"),
        ("acc", ENDS, [[-1, 0], [-2, 0]], LATER, "Ann met Bea since |Ann was late.|Bea was late."),
        ("acc", SUM, [" 4"], [["5", "6"]], '2 + 2 =| 4|["5", "6"]'),
    ],
    ids=["by length", "an empty choice", "likeliest", "choices are prompts", "written"],
)
def test_a_flip_shows_both_answers(metric, asked, before, after, expected):
    kind = "generate_until" if asked is SUM else "multiple_choice"
    models = []
    for score, answer in ((1.0, before), (0.0, after)):
        one = sample(0, score, metric, arguments=asked, filtered_resps=answer, target="4")
        models.append(results_of([one], metric=metric, kind=kind))
    (lost,) = compared(*models, show_flips=5)[1].flips
    (gained,) = compared(*reversed(models), show_flips=1)[1].flips
    assert "|".join((lost.prompt, lost.dense, lost.pruned)) == expected
    assert (lost.doc_id, lost.target) == (0, lost.dense.strip())
    assert (gained.dense, gained.pruned) == (lost.pruned, lost.dense)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A multiple-choice task with examples, a written one with its own grader, and a group."""
    # To find a group, lm-eval reads all its tasks, which takes ten seconds.
    monkeypatch.setattr(
        "lm_eval.tasks.manager.__file__", str(Path(lm_eval.__file__).parent / "tasks/piqa/none")
    )
    folder = tmp_path / "tasks"
    rng = random.Random(0)
    rows = []
    for _ in range(12):
        question = " ".join(rng.choices(WORDS, k=5))
        choices = rng.sample(WORDS, 2)
        rows.append({"q": question, "choices": choices, "gold": rng.randint(0, 1)})
    write_task(folder, "own_chosen", rows, fewshot_split="test", metadata={"version": 3})
    written = write_task(
        folder,
        "own_written",
        rows,
        output_type="generate_until",
        num_fewshot=0,
        doc_to_choice=None,
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"do_sample": False, "max_gen_toks": 5, "until": []},
        metric_list=[{"metric": "length", "aggregation": "mean", "higher_is_better": False}],
    )
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
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def print_and_keep(events, event):
    print("heard")
    print("heard", file=sys.stderr)
    events.append(event)


@pytest.mark.parametrize(
    ("name", "requests", "expected"),
    [("own_chosen", 14, ("acc", "3", True)), ("own_written", 7, ("length", "1.0", False))],
)
def test_a_run_tells_its_progress_and_compares_with_itself(
    folder, loaded, capsys, name, requests, expected
):
    events = []
    listen = partial(print_and_keep, events)
    result = task_of(folder, name, limit=7).run(*loaded, "dense", listen, ProcessGroup())
    heard = "heard\n" * len(events)
    assert capsys.readouterr() == (heard, heard)
    (started,) = [event for event in events if isinstance(event, TaskStarted)]
    assert (started.task, started.total) == (f"{name}, dense", requests)
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == pytest.approx(
        requests
    )
    itself, pruned = compared(result, result)
    assert (len(itself.doc_ids), pruned.difference) == (7, 0)
    assert (itself.metric, itself.version, itself.higher_is_better) == expected


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

    assert now(batch_size=1) == now()
    found = [now(), now(limit=1), now(num_fewshot=1), now(apply_chat_template=True)]
    found.append(now("own_both"))
    for file, old, new, task in [
        ("graders.py", "/ 10", "/ 20", "own_chosen"),
        ("both.yaml", "weight_by_size: true", "weight_by_size: false", "own_both"),
        ("own_chosen.jsonl", '"gold": 1', '"gold": 0', "own_chosen"),
        ("own_chosen.jsonl", '"q": "', '"q": "is at 0x12: ', "own_chosen"),
        ("own_chosen.jsonl", "at 0x12", "at 0x13", "own_chosen"),
    ]:
        (folder / file).write_text((folder / file).read_text().replace(old, new))
        found.append(now(task))
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
        compared(binary([1.0]), other)


def test_tasks_of_lm_eval_are_found_without_an_index_of_all():
    tasks = Path(lm_eval.__file__).parent / "tasks"
    manager = find_tasks(["piqa"], [])
    assert len(manager.all_tasks) < 50
    assert manager.task_index["piqa"].yaml_path == tasks / "piqa/piqa.yaml"
    files = {
        "leaderboard-v1": "benchmarks/openllm.yaml",
        "leaderboard-v2": "leaderboard/leaderboard.yaml",
    }
    for preset, file in files.items():
        assert (tasks / file).read_text().startswith(f"group: {PRESETS[preset][0]}\n")


def test_a_task_that_writes_more_than_the_model_has_positions_for_is_refused(folder, loaded):
    file = folder / "own_written.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 5", "max_gen_toks: 500"))
    with pytest.raises(UsageError, match=r"own_written .* up to 500 tokens, but it has only 128"):
        task_of(folder, "own_written").run(*loaded, *QUIETLY)


def measured(name, use, lost, gained, metric="acc", items=200):
    """A task half of whose items are right, of which a removal loses some, and gains others."""
    half = items // 2
    before = [1.0] * half + [0.0] * half
    after = [0.0] * lost + [1.0] * (half - lost + gained) + [0.0] * (half - gained)
    result, _ = compared(binary(before), binary(after))
    return result.model_copy(update={"task": name, "use": use, "metric": metric})


def test_a_verdict_is_of_a_kind_of_use():
    found = verdicts(
        by_use(
            [
                measured("piqa", "choosing", 2, 3, items=2000),
                measured("arc_easy", "choosing", 1, 0, items=2000),
                measured("arc_easy", "choosing", 900, 0, metric="perplexity", items=2000),
                measured("humaneval", "programs", 40, 4),
                measured("gsm8k", "writing", 5, 4),
                measured("sleb_instructions", "writing", 0, 0, items=4),
                measured("sleb_loops", "writing", 100, 0, metric="ended"),
                measured("sleb_sums", "writing", 100, 0),
            ]
        )
    )
    assert found.columns == ["use", "model", "kept", "95%", "verdict"]
    assert [f"{row[0]}: {row[2]}, {row[4]}" for row in found.rows] == [
        "choosing an answer: 100%, kept",
        "writing programs: 64%, 36% lost",
        "writing answers: 99%, no loss shown, at most 7%",
        "instructions: 100%, too few items to tell",
        "ending long answers: 0%, 100% lost",
        "canaries: 0%, 100% lost",
    ]


def test_a_model_that_is_measured_alone_has_no_name_and_no_verdict():
    task = measured("piqa", "choosing", 1, 0)
    alone = task.model_copy(update={"pruned": ()})
    assert verdicts(by_use([alone])).rows == []
    assert [row[1] for row in by_model([task], ["piqa"])] == ["dense", "without 2"]
    (row,) = by_model([alone], ["piqa"])
    assert (row[1], tasks([row]).columns[:2]) == ("", ["task", "score"])

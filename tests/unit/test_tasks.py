"""Tasks of lm-eval on dense and pruned models: on results made by hand, and on tiny models."""

import importlib.metadata
import json
import os
import random
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conftest import WORDS
from sleb_cli.engine.quality.lm_eval_tasks import (
    LoadedTask,
    TaskSettings,
    merge_results,
    require_task,
    task_manager,
    write_lm_eval_results,
)
from sleb_cli.engine.quality.tasks import PRESETS, Tasks, compare_task
from sleb_cli.engine.statistics import mcnemar, paired_difference, wilson_interval
from sleb_cli.events import Notice, TaskAdvanced, TaskStarted, ignore
from sleb_cli.requests import EvalRequest
from sleb_plugins import DataError, ModelError, OutputError, UsageError


def sample(number, score, *, metric="acc", filtered="none", **changes):
    return {
        "doc_id": number,
        "filter": filtered,
        "metrics": [metric],
        "doc_hash": f"d{number}",
        "prompt_hash": f"p{number}",
        "target_hash": f"t{number}",
        "arguments": [[f"Q{number}:", " cold"], [f"Q{number}:", " warm"]],
        "filtered_resps": [[-1.0, False], [-2.0, False]],
        "target": 0,
        metric: score,
    } | changes


def results_of(samples, values=None, *, task="weather", metric="acc", higher_is_better=True, output_type="x"):
    """Results in lm-eval's schema; without values, the mean of the samples."""
    scores = [one[metric] for one in samples]
    return {
        "results": {task: values or {f"{metric},none": sum(scores) / len(scores), f"{metric}_stderr,none": 0.1}},
        "group_subtasks": {},
        "configs": {task: {"output_type": output_type, "target_delimiter": " "}},
        "versions": {task: 1.0},
        "n-shot": {task: 2},
        "higher_is_better": {task: {metric: higher_is_better}},
        "samples": {task: list(samples)},
    }


def binary(*scores, **changes):
    return results_of([sample(number, score) for number, score in enumerate(scores)], **changes)


def one_pruned(dense, pruned, show_flips=0):
    (result,) = compare_task(dense, [((2, 1), pruned)], show_flips)
    return result, result.pruned[0]


def test_right_and_wrong_answers_are_compared_item_by_item():
    before, after = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    result, pruned = one_pruned(binary(*before), binary(*after))
    assert (result.task, result.metric, result.filter) == ("weather", "acc", "none")
    assert (result.version, result.num_fewshot, result.higher_is_better) == ("1.0", 2, True)
    assert result.doc_ids == (0, 1, 2, 3, 4, 5)
    assert result.dense.items == before
    assert result.dense.interval == wilson_interval(4, 6)
    assert pruned.removals == (2, 1)
    assert pruned.items == after
    assert pruned.interval == wilson_interval(2, 6)
    assert pruned.retention == pytest.approx(0.5)
    assert pruned.difference == pytest.approx(-2 / 6)
    assert pruned.standard_error == pytest.approx(paired_difference(before, after).standard_error)
    assert pruned.difference_interval.low < -2 / 6 < pruned.difference_interval.high
    assert (pruned.lost, pruned.gained) == (3, 1)
    assert pruned.mcnemar_p == mcnemar(3, 1)
    assert pruned.items_needed > 10_000


def test_items_are_matched_by_their_ids_in_any_order():
    dense, pruned = binary(1.0, 0.0, 1.0, 1.0), binary(1.0, 1.0, 0.0, 1.0)
    expected = compare_task(dense, [((1,), pruned)])
    random.Random(0).shuffle(pruned["samples"]["weather"])
    assert compare_task(dense, [((1,), pruned)]) == expected


@pytest.mark.parametrize(
    ("part", "word"), [("doc_hash", "content"), ("prompt_hash", "prompt"), ("target_hash", "answer")]
)
def test_other_items_are_never_paired(part, word):
    pruned = binary(1.0, 0.0)
    pruned["samples"]["weather"][1][part] = "another"
    with pytest.raises(DataError, match=f"Item 1 of weather did not have the same {word}"):
        compare_task(binary(1.0, 0.0), [((1,), pruned)])


def test_more_items_are_never_paired():
    with pytest.raises(DataError, match="did not see the same items of weather"):
        compare_task(binary(1.0, 0.0), [((1,), binary(1.0, 0.0, 1.0))])


def test_models_that_answer_alike():
    _, pruned = one_pruned(binary(1.0, 0.0, 1.0), binary(1.0, 0.0, 1.0))
    assert (pruned.difference, pruned.retention, pruned.mcnemar_p) == (0.0, 1.0, 1.0)
    assert (pruned.lost, pruned.gained, pruned.items_needed) == (0, 0, None)
    assert pruned.difference_interval.low < 0 < pruned.difference_interval.high


def test_a_dense_model_that_is_always_wrong_has_no_retention():
    _, pruned = one_pruned(binary(0.0, 0.0), binary(1.0, 0.0))
    assert pruned.retention is None
    assert (pruned.lost, pruned.gained) == (0, 1)


def test_a_single_item():
    _, pruned = one_pruned(binary(1.0), binary(0.0))
    assert (pruned.difference, pruned.standard_error, pruned.items_needed) == (-1.0, None, None)
    assert pruned.lost == 1


def test_scores_that_are_shares_have_a_paired_error_but_no_flips():
    before, after = (0.5, 0.25, 1.0, 0.75), (0.25, 0.25, 0.5, 0.5)
    result, pruned = one_pruned(binary(*before), binary(*after), show_flips=3)
    expected = paired_difference(before, after)
    assert (pruned.difference, pruned.standard_error) == (expected.mean, expected.standard_error)
    assert pruned.difference_interval == expected.interval
    assert (pruned.lost, pruned.gained, pruned.mcnemar_p, pruned.flips) == (None, None, None, ())
    assert pruned.items_needed is not None
    # lm-eval's error, since the items are not right or wrong.
    assert result.dense.interval.high - result.dense.interval.low == pytest.approx(2 * 1.96 * 0.1, rel=1e-3)


@pytest.mark.parametrize("score", [[-3.0, 4], 0.7, "text"])
def test_what_is_no_mean_of_its_items_has_a_difference_alone(score):
    values = [{"bleu,none": value, "bleu_stderr,none": "N/A"} for value in (20.0, 15.0)]
    dense, pruned = (results_of([sample(0, score, metric="bleu")] * 1, value, metric="bleu") for value in values)
    result, scores = one_pruned(dense, pruned)
    assert (result.dense.items, scores.items) == ((), ())
    assert (result.dense.stderr, result.dense.interval) == (None, None)
    assert (scores.difference, scores.retention) == (-5.0, 0.75)
    assert (scores.standard_error, scores.difference_interval, scores.items_needed) == (None, None, None)


def test_each_filter_has_its_own_items():
    scores = {"strict": (1.0, 0.0), "flexible": (1.0, 1.0)}
    samples = [sample(n, score, filtered=name) for name, pair in scores.items() for n, score in enumerate(pair)]
    results = results_of(samples, {"acc,strict": 0.5, "acc,flexible": 1.0, "alias": "weather", "sample_len": 2})
    found = {result.filter: result for result in compare_task(results, [])}
    assert {name: result.dense.items for name, result in found.items()} == scores
    assert all(result.doc_ids == (0, 1) for result in found.values())


def test_whether_higher_is_better():
    for told, expected in ((True, True), (False, False), (None, True)):
        (result,) = compare_task(binary(1.0, 0.0, higher_is_better=told), [])
        assert result.higher_is_better is expected


def test_an_infinite_metric_is_refused():
    broken = results_of([sample(0, 1.0)], {"acc,none": float("inf")})
    with pytest.raises(ModelError, match="acc of weather is inf"):
        compare_task(binary(1.0), [((1,), broken)])


def group(children, value, tasks):
    """Results of a group of these tasks, merged, whose accuracy is `value`."""
    merged = {key: {} for key in tasks[0]}
    for task in tasks:
        for key in merged:
            merged[key] |= task[key]
    merged["results"]["climate"] = {"acc,none": value, "acc_stderr,none": 0.2, "sample_len": 9}
    merged["group_subtasks"] = children
    return merged


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize(
    "children", [{"climate": ["rain", "sun"]}, {"climate": ["inner", "sun"], "inner": ["rain"]}], ids=["flat", "nested"]
)
def test_the_difference_of_a_group_has_the_error_of_its_tasks(by_size, children):
    scores = {
        "dense": {"rain": (1.0, 1.0, 0.0, 1.0, 1.0, 0.0), "sun": (1.0, 0.0, 1.0)},
        "pruned": {"rain": (0.0, 1.0, 0.0, 0.0, 1.0, 1.0), "sun": (0.0, 0.0, 1.0)},
    }
    shares = {"rain": 6 / 9, "sun": 3 / 9} if by_size else {"rain": 0.5, "sun": 0.5}
    found = {}
    for model, of_model in scores.items():
        value = sum(shares[name] * sum(items) / len(items) for name, items in of_model.items())
        found[model] = group(children, value, [binary(*items, task=name) for name, items in of_model.items()])
    result = compare_task(found["dense"], [((1,), found["pruned"])])[-1]
    assert (result.task, result.doc_ids, result.items_sha256) == ("climate", (), None)
    (pruned,) = result.pruned
    changes = {name: paired_difference(scores["dense"][name], scores["pruned"][name]) for name in shares}
    assert pruned.difference == pytest.approx(sum(shares[name] * change.mean for name, change in changes.items()))
    variance = sum((shares[name] * change.standard_error) ** 2 for name, change in changes.items())
    assert pruned.standard_error == pytest.approx(variance**0.5)
    assert pruned.difference_interval.low < pruned.difference < pruned.difference_interval.high
    assert pruned.lost is None


def test_a_group_that_is_no_mean_of_its_tasks_has_a_difference_alone():
    children = {"climate": ["rain", "sun"]}
    dense, pruned = (
        group(children, value, [binary(1.0, 0.0, task="rain"), binary(0.0, task="sun")]) for value in (0.9, 0.3)
    )
    scores = compare_task(dense, [((1,), pruned)])[-1].pruned[0]
    assert scores.difference == pytest.approx(-0.6)
    assert scores.standard_error is None


def test_flips_of_a_multiple_choice_show_the_chosen_answers():
    dense = results_of([sample(0, 1.0), sample(1, 1.0), sample(2, 0.0)], output_type="multiple_choice")
    other = {"filtered_resps": [[-3.0, False], [-2.5, True]]}
    pruned = results_of([sample(0, 1.0), sample(1, 0.0, **other), sample(2, 1.0, **other)])
    _, scores = one_pruned(dense, pruned, show_flips=5)
    lost, gained = scores.flips
    assert (lost.doc_id, lost.prompt, lost.target, lost.dense, lost.pruned) == (1, "Q1:", "cold", "cold", "warm")
    assert (gained.doc_id, gained.target, gained.dense, gained.pruned) == (2, "warm", "cold", "warm")
    assert len(one_pruned(dense, pruned, show_flips=1)[1].flips) == 1
    assert one_pruned(dense, pruned)[1].flips == ()


def test_the_chosen_answer_of_acc_norm_is_the_likeliest_by_its_length():
    choices = {"arguments": [["Q:", " a long answer"], ["Q:", " short"]]}
    before = {"filtered_resps": [[-6.0, False], [-5.0, False]]} | choices
    after = {"filtered_resps": [[-15.0, False], [-5.0, False]]} | choices
    dense, pruned = (
        results_of([sample(0, score, metric="acc_norm", **told)], metric="acc_norm", output_type="multiple_choice")
        for score, told in ((1.0, before), (0.0, after))
    )
    (flip,) = one_pruned(dense, pruned, show_flips=1)[1].flips
    assert (flip.dense, flip.pruned, flip.target) == ("a long answer", "short", "a long answer")


def test_flips_of_a_task_whose_choices_are_its_prompts():
    choices = {"arguments": [["Ann met Bea since Ann", " was late."], ["Ann met Bea since Bea", " was late."]]}
    dense = results_of([sample(0, 1.0, **choices)], output_type="multiple_choice")
    pruned = results_of([sample(0, 0.0, **choices | {"filtered_resps": [[-4.0, False], [-2.0, False]]})])
    (flip,) = one_pruned(dense, pruned, show_flips=1)[1].flips
    assert flip.prompt == "Ann met Bea since "
    assert (flip.dense, flip.pruned, flip.target) == ("Ann was late.", "Bea was late.", "Ann was late.")


def test_flips_of_written_answers():
    def written(score, answer):
        return results_of([sample(0, score, arguments=[["2 + 2 =", {}]], filtered_resps=[answer], target="4")])

    (flip,) = one_pruned(written(1.0, " 4"), written(0.0, ["5", "6"]), show_flips=1)[1].flips
    assert (flip.prompt, flip.target, flip.dense, flip.pruned) == ("2 + 2 =", "4", " 4", '["5", "6"]')


ITEMS = 12


@pytest.fixture
def folder(tmp_path):
    """A multiple-choice task with examples, a written one graded by code of its own, and a group of both."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rng = random.Random(0)
    rows = [
        {"q": " ".join(rng.choices(WORDS, k=5)), "choices": rng.sample(WORDS, 2), "gold": rng.randint(0, 1)}
        for _ in range(ITEMS)
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    (folder / "chosen.yaml").write_text(
        f"task: own_chosen\n{data}output_type: multiple_choice\nfewshot_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 3\n"
    )
    (folder / "graders.py").write_text("def grade(doc, results):\n    return {'length': len(results[0]) / 10}\n")
    (folder / "written.yaml").write_text(
        f"task: own_written\n{data}output_type: generate_until\nnum_fewshot: 0\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{choices[0]}}"\nprocess_results: !function graders.grade\n'
        "generation_kwargs:\n  do_sample: false\n  max_gen_toks: 5\n  until: []\n"
        "metric_list:\n  - metric: length\n    aggregation: mean\n    higher_is_better: false\n"
    )
    (folder / "both.yaml").write_text(
        "group: own_both\ntask: [own_chosen]\n"
        "aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n    weight_by_size: true\n"
    )
    return folder


def tasks_of(folder, *names, **options):
    return Tasks(EvalRequest(None, tasks=names, include_path=folder, **options))


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), AutoTokenizer.from_pretrained(tiny_llama)


def test_a_run_holds_what_lm_eval_tells_and_compares_with_itself(folder, loaded):
    tasks = tasks_of(folder, "own_chosen", "own_written", limit=7)
    assert tasks.names == ("own_chosen", "own_written")
    events = []
    results = [tasks.run(name, *loaded, "dense", events.append) for name in tasks.names]
    assert all(json.loads(json.dumps(result)) == result for result in results)
    assert [len(result["samples"][name]) for name, result in zip(tasks.names, results, strict=True)] == [7, 7]
    assert {"config", "lm_eval_version", "transformers_version", "max_length", "tokenizer_eos_token"} <= set(results[0])
    started = [event for event in events if isinstance(event, TaskStarted)]
    assert [(event.task, event.total) for event in started] == [("own_chosen, dense", 14), ("own_written, dense", 7)]
    assert sum(event.done for event in events if isinstance(event, TaskAdvanced)) == 14 + 7
    chosen, written = (compare_task(result, [((1,), result)])[0] for result in results)
    assert (chosen.metric, chosen.version, len(chosen.doc_ids)) == ("acc", "3", 7)
    assert chosen.pruned[0].difference == 0
    assert (written.metric, written.higher_is_better) == ("length", False)
    assert written.dense.value == pytest.approx(sum(written.dense.items) / 7)


def test_a_second_run_gives_the_same_answers(folder, loaded):
    tasks = tasks_of(folder, "own_chosen", num_fewshot=2)
    first, second = (tasks.run("own_chosen", *loaded, "dense", ignore)["samples"] for _ in range(2))
    assert first == second


def test_examples_in_the_prompt(folder, loaded):
    results = tasks_of(folder, "own_chosen", num_fewshot=2).run("own_chosen", *loaded, "dense", ignore)
    assert results["n-shot"]["own_chosen"] == 2
    assert results["samples"]["own_chosen"][0]["arguments"][0][0].count("\n\n") == 2


def test_a_group_has_its_tasks_items_and_a_metric_of_its_own(folder, loaded):
    tasks = Tasks(EvalRequest(None, tasks=("own_chosen",), include_path=folder))
    alone = tasks.run("own_chosen", *loaded, "dense", ignore)["results"]["own_chosen"]["acc,none"]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    group = LoadedTask("own_both", manager.load(["own_both"]), TaskSettings())
    results = group.run(*loaded)
    found = {result.task: result for result in compare_task(results, [((1,), results)])}
    assert found["own_both"].dense.value == found["own_chosen"].dense.value == alone
    assert found["own_both"].pruned[0].standard_error == 0


def test_the_chat_template_is_applied_where_there_is_one(folder, loaded):
    model, tokenizer = loaded
    tasks = tasks_of(folder, "own_chosen", apply_chat_template=True, limit=2)
    with pytest.raises(UsageError, match="no chat template"):
        tasks.run("own_chosen", model, tokenizer, "dense", ignore)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    talking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    talking.chat_template = template
    results = tasks.run("own_chosen", model, talking, "dense", ignore)
    assert results["samples"]["own_chosen"][0]["arguments"][0][0].startswith("<user>")
    assert results["chat_template"] == template


def fingerprint(folder, name="own_chosen", **options):
    return tasks_of(folder, name, **options).fingerprint(name)


def test_a_fingerprint_changes_with_all_that_the_results_depend_on(folder, tmp_path, monkeypatch):
    first = fingerprint(folder)
    assert first == fingerprint(folder)
    changed = [
        fingerprint(folder, limit=3),
        fingerprint(folder, num_fewshot=1),
        fingerprint(folder, apply_chat_template=True),
        fingerprint(folder, batch_size=2),
    ]
    grader = folder / "graders.py"
    for line in (
        "0",
        "len(os.environ.get('OWN_SCALE', ''))",
        "len(os.getenv( 'OTHER_SCALE') or os.environ['OWN_SCALE'])",
    ):
        grader.write_text(f"import os\n\ndef grade(doc, results):\n    return {{'length': {line}}}\n")
        changed.append(fingerprint(folder))
    for name in ("OWN_SCALE", "OTHER_SCALE"):
        for value in ("1", "2"):
            monkeypatch.setenv(name, value)
            changed.append(fingerprint(folder))
    items = tmp_path / "items.jsonl"
    items.write_text("".join(reversed(items.read_text().splitlines(keepends=True))))
    changed.append(fingerprint(folder))
    versions = importlib.metadata.version
    for package in ("lm_eval", "sacrebleu"):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, new=package: "99" if name == new else versions(name)
        )
        changed.append(fingerprint(folder))
    assert len({first, *changed}) == len(changed) + 1


def test_the_fingerprint_of_a_group_changes_with_how_it_is_weighed(folder):
    found = set()
    for by_size in ("true", "false"):
        (folder / "both.yaml").write_text(
            "group: own_both\ntask: [own_chosen]\n"
            f"aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n    weight_by_size: {by_size}\n"
        )
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found |= {LoadedTask("own_both", manager.load(["own_both"]), TaskSettings()).fingerprint() for _ in range(2)}
    assert len(found) == 2


def test_a_fingerprint_does_not_depend_on_the_folder(folder, tmp_path):
    first = fingerprint(folder)
    assert first == fingerprint(folder.rename(tmp_path / "moved"))


def test_out_of_memory_requests_come_in_smaller_batches(folder, loaded, monkeypatch):
    tasks = tasks_of(folder, "own_chosen", batch_size=4)
    expected = tasks.run("own_chosen", *loaded, "dense", ignore)["samples"]
    forward, refused = LlamaForCausalLM.forward, []

    def short_of_memory(self, input_ids=None, **options):
        if len(input_ids) > 1:
            refused.append(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", short_of_memory)
    found = tasks.run("own_chosen", *loaded, "dense", ignore)["samples"]
    assert {2, 4} <= set(refused)
    assert [one["acc"] for one in found["own_chosen"]] == [one["acc"] for one in expected["own_chosen"]]


@pytest.mark.parametrize("batch_size", ["none", "0", "-1", "1.5", 0])
def test_a_batch_size_is_a_number_or_auto(batch_size):
    with pytest.raises(UsageError, match="--batch-size"):
        EvalRequest(None, batch_size=batch_size).windows_per_batch  # noqa: B018


def test_batches_of_windows_and_of_requests():
    found = [(request.windows_per_batch, request.items_per_batch) for request in map(request_of, ("auto", "8", 3))]
    assert found == [(1, "auto"), (8, 8), (3, 3)]


def request_of(batch_size):
    return EvalRequest(None, batch_size=batch_size)


def test_a_preset_stands_for_its_tasks_once():
    names = Tasks(EvalRequest(None, tasks=("canaries", "sleb_sums"))).names
    assert names == PRESETS["canaries"]


def test_a_name_that_is_close_to_a_preset():
    with pytest.raises(DataError, match="no task 'canarys'") as error:
        require_task("canarys", [*PRESETS, "piqa"])
    assert error.value.hint == "Did you mean 'canaries'?"


def test_a_task_of_lm_eval_is_found_without_reading_all_of_them(folder):
    manager = task_manager(["piqa", "arc_easy", "own_chosen"], [folder])
    assert len(manager.all_tasks) < 50
    files = {name: manager.task_index[name].yaml_path for name in ("piqa", "arc_easy", "own_chosen")}
    tasks = Path(lm_eval.__file__).parent / "tasks"
    assert files == {
        "piqa": tasks / "piqa" / "piqa.yaml",
        "arc_easy": tasks / "arc" / "arc_easy.yaml",
        "own_chosen": folder / "chosen.yaml",
    }


def test_canaries_that_do_not_fit_the_model_are_left_out(loaded):
    tasks, events = Tasks(EvalRequest(None, tasks=("canaries",))), []
    names = tasks.fitting(loaded[1], 128, events.append)
    left = [event.text for event in events if isinstance(event, Notice)]
    assert set(names) | {text.split()[0] for text in left} == set(tasks.names)
    assert any("sleb_repeat_1024 is left out" in text and "the model has 128" in text for text in left)
    assert tasks.fitting(loaded[1], None, events.append) == tasks.names


def test_a_task_that_has_the_model_write_more_than_it_can(folder, loaded):
    text = (folder / "written.yaml").read_text()
    (folder / "written.yaml").write_text(text.replace("max_gen_toks: 5", "max_gen_toks: 500"))
    with pytest.raises(UsageError, match="own_written has models write up to 500 tokens, and this one has 128"):
        tasks_of(folder, "own_written").run("own_written", *loaded, "dense", ignore)


def test_a_task_that_runs_what_the_model_writes_is_refused(folder):
    with (folder / "written.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(DataError, match="The task own_written runs code that the model writes"):
        tasks_of(folder, "own_written")


def test_the_files_are_those_of_lm_eval(folder, loaded, tmp_path):
    tasks = tasks_of(folder, "own_chosen", "own_written", limit=4)
    results = [tasks.run(name, *loaded, "dense", ignore) for name in tasks.names]
    merged = merge_results(results)
    before = json.dumps(merged)
    files = write_lm_eval_results(tmp_path / "out", merged, {"model": "tiny", "blocks": "2+3"})
    assert json.dumps(merged) == before
    date = files[0].name.removeprefix("results_").removesuffix(".json")
    assert [file.name for file in files[1:]] == [f"samples_{name}_{date}.jsonl" for name in tasks.names]
    written = json.loads(files[0].read_text())
    assert written["config"]["model_args"] == {"model": "tiny", "blocks": "2+3"}
    assert set(written["task_hashes"]) == set(written["results"]) == set(tasks.names)
    (chosen,) = compare_task(results[0], [])
    assert written["task_hashes"]["own_chosen"] == chosen.items_sha256
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert tuple(line["acc"] for line in lines) == chosen.dense.items
    assert lines[0]["arguments"]["gen_args_0"]["arg_1"].startswith(" ")


def test_a_file_of_lm_eval_that_was_cut_short_is_not_delivered(folder, loaded, tmp_path, monkeypatch):
    """lm-eval tells nobody that the disk was full."""
    tasks = tasks_of(folder, "own_chosen", limit=4)
    results = merge_results([tasks.run("own_chosen", *loaded, "dense", ignore)])
    save = EvaluationTracker.save_results_samples

    def cut_short(self, **what):
        save(self, **what)
        (file,) = (tmp_path / "out").glob("samples_*")
        os.truncate(file, file.stat().st_size - 1)

    monkeypatch.setattr(EvaluationTracker, "save_results_samples", cut_short)
    with pytest.raises(OutputError, match=r"samples_own_chosen_\S+ cannot be written"):
        write_lm_eval_results(tmp_path / "out", results, {"model": "tiny"})
    assert os.listdir(tmp_path / "out") == []


def test_the_leaderboards_are_groups_of_lm_eval():
    own = Path(lm_eval.__file__).parent / "tasks"
    for preset, file in (
        ("leaderboard-v1", "benchmarks/openllm.yaml"),
        ("leaderboard-v2", "leaderboard/leaderboard.yaml"),
    ):
        assert (own / file).read_text().startswith(f"group: {PRESETS[preset][0]}\n")

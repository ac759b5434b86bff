"""The canaries: items and graders, and that lm-eval runs them on a model that knows the answers."""

import logging
from collections import Counter

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from sleb_cli.canaries import CANARIES, FOLDER, INSTRUCTIONS, LOOPS, items
from sleb_cli.engine.quality.lm_eval_model import Answer


@pytest.fixture(scope="module")
def manager():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


@pytest.fixture(scope="module")
def loaded(manager):
    return manager.load(["sleb_canaries"])


class Oracle(LM):
    """Knows the answers, and writes them in its form."""

    def generate_until(self, requests):
        return [self.form.format(request.doc["answer"]) for request in requests]

    loglikelihood = loglikelihood_rolling = None


@pytest.mark.parametrize(
    ("form", "score"),
    [(" {}\n\nand more", 1), ("", 0), ("nonsense", 0), ("0 0 0 0 0 0 0 0 0 0", 0)],
)
def test_a_perfect_answer_scores_one_and_a_wrong_one_zero(loaded, form, score):
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=0)
    oracle = Oracle()
    oracle.form = form
    results = evaluate(lm=oracle, task_dict=loaded, bootstrap_iters=0, log_samples=True)["results"]
    for name in CANARIES:
        found = {
            value for key, value in results[name].items() if "," in key and "_stderr" not in key
        }
        assert found == {score}, name


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("sold the lamp near the mill.", 2 / 3),
        ("sold a lamp near a river", 1.0),
        ("the lamp near the river.", 0.0),
        ("sold", 1 / 3),
    ],
)
def test_answers_are_graded_in_part(answer, expected):
    graded = items.grade_words({"answer": "sold the lamp near the river."}, [answer])
    assert graded == {"right_words": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a b c", 0),
        ("a b c d a b c d", 1 / 5),
        ("a b c d i a b c d", 1 / 6),
        ("x y " * 50, 95 / 97),
        ("", 1),
    ],
)
def test_the_repetition_of_an_answer(answer, expected):
    graded = items.grade_instructions({"kind": "lower case", "answer": ""}, [answer])
    assert graded["repetition"] == pytest.approx(expected)


TWO_KEYS = '{"name": "...", "use": "..."}'


@pytest.mark.parametrize(
    ("kind", "asked", "answer", "follows"),
    [
        ("lines", "2", "1. Bees fly.\n\n2. They hum.\n", True),
        ("lines", "2", "Bees fly.\nThey hum.\nThey sting.", False),
        ("lower case", "", "bees make honey. They hum.", False),
        ("last word", "lamp", 'Bees like the "Lamp".\n', True),
        ("last word", "lamp", "Bees like the lamp post.", False),
        (
            "list",
            "5",
            "Five facts:\n\n1. a\n   - more\n2. b\n3. c\n\n4) d\n5. **e**: f\n\nThat is all.",
            True,
        ),
        ("json", TWO_KEYS, '{"use": "wax", "name": {"of": "bee"}}', True),
        (
            "json",
            TWO_KEYS,
            'Here it is:\n```json\n{"name": "bee",\n"use": null}\n```\nIt hums.',
            True,
        ),
        ("json", TWO_KEYS, '{"name": "bee", "use": "wax", "size": 1}', False),
    ],
)
def test_whether_an_instruction_is_followed(kind, asked, answer, follows):
    doc = {"question": "", "kind": kind, "answer": asked}
    found = items.grade_instructions(doc, [answer])
    assert found == {
        "followed": follows,
        "words": len(answer.split()),
        "repetition": found["repetition"],
    }


def test_instructions_ask_for_what_is_graded(manager):
    (task,) = manager.load([INSTRUCTIONS])["tasks"].values()
    rows = list(task.eval_docs)
    assert len(rows) == 100
    for kind in items.INSTRUCTIONS:
        of_kind = [row for row in rows if row["kind"] == kind]
        assert 15 <= len(of_kind) <= 25
        assert all(row["answer"] in row["question"] for row in of_kind)
        assert len({row["question"] for row in of_kind}) == len(of_kind)
    task.build_all_requests(limit=1)
    assert task.instances[0].args == (
        rows[0]["question"],
        {"do_sample": False, "max_gen_toks": 200, "until": []},
    )


def test_long_answers_are_asked_for_by_forty_different_prompts(manager):
    (task,) = manager.load([LOOPS])["tasks"].values()
    rows = list(task.eval_docs)
    assert rows == list(items.long_answers(items=40)["test"])
    assert len({row["question"] for row in rows}) == 40
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(items.LONG_ANSWERS, 8)
    task.build_all_requests(limit=1)
    (prompt, settings) = task.instances[0].args
    assert prompt == f"{rows[0]['question']}\n\n{rows[0]['prefix']}"
    assert settings == {"do_sample": False, "max_gen_toks": 1024, "until": []}


def test_silence_is_no_end():
    for text, ended in (("Done.", True), (" ", True), ("So", False)):
        answer = Answer(text)
        answer.ended = ended
        assert items.grade_long_answer({}, [answer]) == {"ended": text == "Done.", "loops": 0}
    assert items.grade_long_answer({}, ["by lm-eval " * 30]) == {"loops": 1}


def test_the_answers_follow_from_the_questions(loaded):
    tasks = {name: list(task.eval_docs) for name, task in loaded["tasks"].items()}
    for row in tasks["sleb_sums"]:
        first, second = row["question"].removeprefix("Q: What is ").removesuffix("?").split(" + ")
        assert int(first) + int(second) == int(row["answer"])
    for row in tasks["sleb_repeat_64"]:
        said, between = row["question"].split("\n\n")
        assert (
            said.removeprefix("Say: ") == f"{row['prefix'].removeprefix('Again: ')} {row['answer']}"
        )
        assert 0.6 * 64 <= len(between.split()) <= 64


SUMS, SAID = "Q: What is 61 + 76?\nA: 137\n\nQ: What is 75 + 34?\nA: 109\n\n", "The brave sailor"


@pytest.mark.parametrize(
    ("name", "text", "turns"),
    [
        ("sleb_sums", SUMS, ["Q: ", "A: "] * 8 + ["Q: ", "A:"]),
        (
            "sleb_repeat_64",
            f" in January.\n\nAgain: {SAID}",
            [f"Say: {SAID} broke ", f"Again: {SAID}"],
        ),
    ],
)
def test_in_a_chat_each_question_is_a_turn(loaded, name, text, turns):
    task, rendered = loaded["tasks"][name], []
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(limit=1)
    assert text in task.instances[0].args[0]
    chat = {"chat_template": lambda messages, **options: rendered.append((messages, options)) or ""}
    task.build_all_requests(
        limit=1, apply_chat_template=True, fewshot_as_multiturn=True, tokenizer_name="", **chat
    )
    ((messages, options),) = rendered
    assert [message["role"] for message in messages] == (["user", "assistant"] * len(turns))[
        : len(turns)
    ]
    assert all(map(str.startswith, [message["content"] for message in messages], turns))
    assert options["add_generation_prompt"] == (messages[-1]["role"] == "user")
    assert all(message["content"] == message["content"].strip() for message in messages)


def test_every_answer_fits_what_the_model_may_write(loaded, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for name in CANARIES:
        task = loaded["tasks"][name]
        longest = max(len(tokenizer(f" {row['answer']}").input_ids) for row in task.eval_docs)
        assert longest <= task.config.generation_kwargs["max_gen_toks"], name


def test_the_group_has_all_canaries_and_none_else(loaded, manager):
    assert tuple(loaded["tasks"]) == CANARIES
    assert set(manager.all_subtasks) == {*CANARIES, INSTRUCTIONS, LOOPS}
    names = (*CANARIES, INSTRUCTIONS, LOOPS, "sleb_canaries")
    assert {file.name for file in FOLDER.glob("*.yaml")} == {f"{name}.yaml" for name in names}

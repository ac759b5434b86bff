"""`sleb eval`, through `main()`."""

import csv
import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import datasets
import lm_eval
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conftest import WORDS, calibration, evaluation, llama_config, prose, save_model, write_task
from reference import log_likelihood, plain_loss
from sleb_cli import repetition
from sleb_cli.cache import read_cached, write_cached
from sleb_cli.canaries import FOLDER, LOOPS
from sleb_cli.canaries.items import instructions
from sleb_cli.checks.text_names import task_names_key
from sleb_cli.engine.door import evaluate as evaluate_door
from sleb_cli.engine.forward import prepare
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.output.measured import read_measurements
from sleb_cli.engine.quality import models as quality_models
from sleb_cli.engine.quality import texts as quality_texts
from sleb_cli.engine.quality import written_code
from sleb_cli.engine.quality.models import Models
from sleb_cli.events import ignore
from sleb_cli.plan import read_plan
from sleb_cli.results import EvalResult
from sleb_cli.saved_results import read_results, results_folder
from sleb_cli.texts.named import text_source
from texts import write_lines

SHORT = ["--sequence-length 64"]


@pytest.fixture
def test_text(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text(prose(120, seed=5))
    return path


@pytest.fixture
def evaluate(sleb):
    """Run `sleb eval` to its end, and return its result and what it says on stderr."""

    def run(*words):
        result = sleb("eval", *words, "--json")
        return result.data, result.stderr

    return run


def kept_results(folder):
    """Return the kept results of evaluations, the oldest first."""
    return list(read_results(EvalResult, folder, ignore).values())


def loaded(folder):
    """Return a tokenizer and a model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def plain_perplexity(folder, text, length, skipped):
    """Tokenize once as a whole, cut, and take the exponential of the mean loss."""
    tokenizer, model = loaded(folder)
    ids = tokenizer(text.read_text()).input_ids
    windows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    path = {"llama": "model.layers", "opt": "model.decoder.layers"}[model.config.model_type]
    return math.exp(plain_loss(model, model.get_submodule(path), windows, set(skipped)))


@pytest.mark.parametrize(
    ("model", "sizes", "counts"),
    [
        ("tiny_llama", "--every 2", [2, 3]),
        ("tiny_llama", "--remove 3,1", [1, 3]),
        ("tiny_opt", "--every 9", [3]),
    ],
)
def test_perplexity_is_that_of_the_literature(sleb, request, model, sizes, counts, test_text):
    folder = request.getfixturevalue(model)
    file = test_text.rename("a[bold]b[ end].txt")
    command = ["eval", folder, "--blocks 3,1,2", sizes, "--perplexity", file.name, *SHORT]
    shown = sleb(*command, "--batch-size 3 -o r[x].json").stdout
    measured = json.loads(Path("r[x].json").read_text())
    assert measured["sizes"] == [[3, 1, 2][:count] for count in counts]
    (text,) = measured["texts"]
    dense = text["dense"]
    assert len(dense["losses"]) == text["windows"]
    for size in [dense | {"removals": []}, *text["pruned"]]:
        expected = plain_perplexity(folder, file, 64, size["removals"])
        assert size["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert f"{size['perplexity']:.2f}" in shown
    for size in text["pruned"]:
        ratio = size["perplexity"] / dense["perplexity"]
        assert size["log_ratio"] == pytest.approx(math.log(ratio))
        assert size["interval"]["low"] < size["log_ratio"] < size["interval"]["high"]
    assert file.name in shown
    assert "wrote r[x].json" in shown


def test_a_plans_results_are_kept_beside_it_and_it_says_so(sleb, llama_plan, test_text):
    measure = ["--perplexity", test_text.name, *SHORT]
    alone = sleb("eval", llama_plan, *measure)
    kept = f"Kept in {results_folder(llama_plan)}, for `sleb export`."
    assert kept in " ".join(alone.stderr.split())
    timed = sleb("bench", llama_plan, "--prompt --prompt-length 8 --iterations 2 --warmup 0")
    assert kept in " ".join(timed.stderr.split())


ITEMS = [
    {"q": f"The {word} is", "choices": [f" {first}.", f" {second}."], "gold": n % 2}
    for n, (word, first, second) in enumerate(zip(WORDS, WORDS[9:], WORDS[20:], strict=False))
]


@pytest.fixture
def own_task(tmp_path):
    """Return options for four items of a task of the user's own."""
    folder = write_task(tmp_path / "tasks", "own_weather", ITEMS).parent
    return ["--tasks own_weather --include-path", folder, "--limit 4"]


def plain_accuracy(folder, limit):
    """Choose the likelier continuation."""
    tokenizer, model = loaded(folder)
    right = 0
    for item in ITEMS[:limit]:
        scores = [log_likelihood(model, tokenizer, item["q"], each) for each in item["choices"]]
        right += scores.index(max(scores)) == item["gold"]
    return right / limit


def test_a_task_file_of_ones_own(sleb, tiny_llama, own_task):
    options = [*own_task, "--limit 14 --show-flips 1 -o r.json"]
    shown = sleb("eval", tiny_llama, "--blocks 3,2,1 --every 1", *options).stdout
    (task,) = json.loads(Path("r.json").read_text())["tasks"]
    assert (task["task"], task["metric"], task["num_fewshot"]) == ("own_weather", "acc", 0)
    assert task["doc_ids"] == list(range(14))
    dense = task["dense"]
    assert dense["value"] == pytest.approx(plain_accuracy(tiny_llama, 14))
    flips = []
    for pruned in task["pruned"]:
        pairs = zip(dense["items"], pruned["items"], strict=True)
        assert pruned["lost"] == sum(before > after for before, after in pairs)
        assert len(pruned["flips"]) == min(1, pruned["lost"] + pruned["gained"])
        flips += pruned["flips"]
    assert flips
    assert all(flip["dense"] != flip["pruned"] for flip in flips)
    assert shown.count("only one model gets right") == len(flips)


def test_a_chat_model_is_asked_and_ends_its_answers_or_not(evaluate, tmp_path):
    folder = save_model(tmp_path / "chat", llama_config(max_position_embeddings=1024))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}!{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, model = loaded(folder)
    answers = []
    for row in instructions(items=100)["test"].select(range(4)):
        ids = tokenizer(f"user: {row['question']}!", return_tensors="pt").input_ids
        whole = model.generate(ids, do_sample=False, max_new_tokens=200, pad_token_id=0)[0]
        answers.append(set(whole[ids.shape[1] :].tolist()))
    # Another end token, which some of the answers reach.
    end = min(token for token in answers[0] if sum(token in answer for answer in answers) == 2)
    model.generation_config.eos_token_id = [1, end]
    model.generation_config.save_pretrained(folder)
    asked = "--tasks sleb_instructions --apply-chat-template --limit 4 --batch-size 3"
    data, _ = evaluate(folder, asked)
    found = {task["metric"]: task["dense"]["items"] for task in data["tasks"]}
    assert found["ended"] == [not answer.isdisjoint({1, end}) for answer in answers]
    assert set(found) == {"followed", "ended", "repetition", "words"}
    assert all(task["chat"] for task in data["tasks"])


def test_long_answers_end_or_loop_and_a_slow_model_writes_few(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_door, "MANY_PARAMETERS", 1)
    monkeypatch.setattr(repetition, "MIN_CHARACTERS", 20)
    folder = save_model(tmp_path / "chat", llama_config(max_position_embeddings=256))
    settings = {"do_sample": False, "max_gen_toks": 64, "until": []}
    own = {"include": str(FOLDER / "sleb_loops.yaml"), "task": LOOPS, "generation_kwargs": settings}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.yaml").write_text(yaml.safe_dump(own))
    asked = [folder, "--blocks 2 --tasks sleb_loops --include-path", tmp_path / "tasks"]
    data, said = evaluate(*asked)
    ended, loops = data["tasks"]
    assert (ended["metric"], loops["metric"]) == ("ended", "loops")
    assert (ended["higher_is_better"], loops["higher_is_better"]) == (True, False)
    assert len(ended["doc_ids"]) == 10
    assert "sleb_loops runs with --limit 10" in said
    for task in (ended, loops):
        assert set(task["dense"]["items"]) <= {0, 1}
        (pruned,) = task["pruned"]
        right = int(task["higher_is_better"])
        pairs = list(zip(task["dense"]["items"], pruned["items"], strict=True))
        assert pruned["lost"] == pairs.count((right, 1 - right))
        assert pruned["gained"] == pairs.count((1 - right, right))
        assert pruned["mcnemar_p"] is not None
    assert 1 in loops["dense"]["items"] + loops["pruned"][0]["items"]
    data, said = evaluate(*asked, "--limit 2")
    assert len(data["tasks"][0]["doc_ids"]) == 2
    assert "--limit" not in said


def count_passes(monkeypatch, limit=None):
    """Return a list that grows with each pass of a model with weights; the pass after `limit` is
    interrupted.
    """
    forward = LlamaForCausalLM.forward
    passes = []

    def counted(self, *given, **options):
        if self.device.type != "meta":
            passes.append(1)
            if len(passes) == limit:
                raise KeyboardInterrupt
        return forward(self, *given, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return passes


HUMANEVAL = Path(lm_eval.__file__).parent / "tasks/humaneval"


def test_programs_run_only_with_permission(sleb, evaluate, tiny_llama, tmp_path, monkeypatch):
    # What the model writes here is the rest of a comment.
    row = {"prompt": "def one():\n    return 1\n# ", "entry_point": "one"}
    rows = [row | {"test": f"def check(f):\n    assert f() == {n}\n"} for n in (1, 2)]
    inherited = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "metric_list")
    settings = dict.fromkeys(inherited) | {
        "include": str(HUMANEVAL / "humaneval_instruct.yaml"),
        "generation_kwargs": {"max_gen_toks": 1, "do_sample": False, "until": ["\n"]},
    }
    file = write_task(tmp_path, "own_programs", rows, **settings)
    asked = [tiny_llama, "--blocks 2 --tasks own_programs --include-path", tmp_path]
    unconfined = "--run-code unconfined"
    assert "own_programs runs programs that the model" in sleb("eval", *asked, code=2).stderr
    (task,) = evaluate(*asked, unconfined)[0]["tasks"]
    assert (task["metric"], task["dense"]["items"]) == ("pass@1", [1.0, 0.0])
    passes = written_code.passes
    with monkeypatch.context() as patch:  # a program that is not decided ends the run
        patch.setattr(written_code, "passes", lambda program, how: None if program else True)
        assert "too busy to tell" in sleb("eval", *asked, unconfined, code=7).stderr
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delattr(LlamaForCausalLM, "forward")
        assert "needs bubblewrap" in sleb("eval", *asked, "--run-code confined", code=7).stderr
    ways = set()

    def run(program, how):
        ways.add(how)
        return passes(program, "unconfined")

    monkeypatch.setattr(written_code, "passes", run)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (confined,) = evaluate(*asked)[0]["tasks"]
    # What may run decides what passes.
    assert confined["fingerprint"] != task["fingerprint"]
    assert confined | {"fingerprint": task["fingerprint"]} == task
    assert ways == {"confined"}
    old = yaml.safe_load(file.read_text())
    old["include"] = str(HUMANEVAL / "humaneval.yaml")
    old["metric_list"] = [{"metric": "exact_match"}]
    file.write_text(yaml.safe_dump(old))
    assert "without limits" in sleb("eval", *asked, code=5).stderr


def test_an_answer_longer_than_the_model_is_refused(sleb, tiny_llama, tmp_path):
    write_task(tmp_path, "long", [{"q": "a", "choices": ["b", prose(60)], "gold": 0}])
    told = sleb("eval", tiny_llama, "--tasks long --include-path", tmp_path, code=2).stderr
    assert "but the model has only 128 positions" in told


def test_what_was_measured_before_is_not_measured_again(
    evaluate, llama_plan, test_text, own_task, monkeypatch
):
    options = [llama_plan, "--perplexity", test_text, *SHORT, *own_task, "--max-windows 4"]
    first, _ = evaluate(*options, "--remove 1")
    passes = count_passes(monkeypatch)
    again, said = evaluate(*options, "--remove 1")
    assert (again, passes) == (first, [])
    assert f"Measured before: perplexity on {test_text}, own_weather. --force measures" in said
    assert "Loading" not in said
    same_tokens = "--remove 1 --sequence-length 32 --max-windows 8"
    others = ["--limit 3", "--dtype bfloat16", "--force"]
    for more in ["--every 1", same_tokens, *(f"--remove 1 {each}" for each in others)]:
        (text,) = evaluate(*options, more)[0]["texts"]
        assert passes, more
        assert text["pruned"][0]["removals"] == first["texts"][0]["pruned"][0]["removals"]
        passes.clear()
    # Tasks may have the model write, by its own settings.
    settings = Path(json.loads(llama_plan.read_text())["model"]["id"]) / "generation_config.json"
    before = settings.read_text()
    settings.write_text(before.replace("{", '{"repetition_penalty": 50.0,', 1))
    evaluate(*options, "--remove 1")
    settings.write_text(before)
    assert passes


def test_an_interval_is_not_reused_where_documents_begin_elsewhere(evaluate, llama_plan):
    parts = [prose(6, seed=seed) for seed in range(4)]
    found = []
    for at in (1, 3):
        write_lines("text.jsonl", text=["\n\n".join(parts[:at]), "\n\n".join(parts[at:])])
        (text,) = evaluate(llama_plan, "--perplexity text.jsonl --remove 1", *SHORT)[0]["texts"]
        pruned = text["pruned"][0]
        found.append((text["tokens_sha256"], pruned["losses"], pruned["interval"]))
    first, second = found
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_sizes_that_share_work_give_what_each_gives_alone(
    evaluate, tiny_llama, test_text, own_task, monkeypatch
):
    options = [tiny_llama, "--perplexity", test_text, *SHORT, "--max-windows 4", *own_task]
    options.append("--blocks 3,1 --every 1")
    without = Models.without
    asked = set()

    def watched(self, removals):
        model = without(self, removals)
        assert not self.one_at_a_time or list(self._loaded) == [removals]
        asked.add(removals)
        return model

    monkeypatch.setattr(Models, "without", watched)
    shared, _ = evaluate(*options)
    assert asked == {()}
    for where in (prepare, quality_models):
        monkeypatch.setattr(where, "why_not_fork", lambda *given: "a reason")
    for is_packed in (False, True):  # packed weights need no second copy
        asked.clear()
        monkeypatch.setattr(Architecture, "is_quantized", is_packed)
        alone, _ = evaluate(*options, "--force")
        assert asked == {(), (3,), (3, 1)}
        assert alone["tasks"] == shared["tasks"]
        pairs = zip(alone["texts"][0]["pruned"], shared["texts"][0]["pruned"], strict=True)
        for ours, theirs in pairs:
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
            divergence = theirs["divergence"]["mean"]
            assert ours["divergence"]["mean"] == pytest.approx(divergence, rel=1e-4)


def test_the_dense_model_answers_once_for_all_plans(evaluate, tiny_llama, own_task, monkeypatch):
    options = [tiny_llama, *own_task]
    passes = count_passes(monkeypatch)
    first, _ = evaluate(*options, "--blocks 3")
    of_both = len(passes)
    second, said = evaluate(*options, "--blocks 1")
    assert "Using the dense model's answers to own_weather, from the cache." in said
    assert len(passes) < 2 * of_both
    assert second["tasks"][0]["dense"] == first["tasks"][0]["dense"]
    anew, said = evaluate(*options, "--blocks 1 --force")
    assert anew["tasks"] == second["tasks"]
    assert "Using" not in said


def test_an_interrupted_evaluation_keeps_its_finished_parts(
    sleb, evaluate, tiny_llama, test_text, text_file, own_task, monkeypatch
):
    texts = f"{test_text},{text_file}"
    options = [tiny_llama, "--blocks 3 --perplexity", texts, *SHORT, *own_task]
    with monkeypatch.context() as patch:
        passes = count_passes(patch)
        whole, _ = evaluate(*options)
    with monkeypatch.context() as patch:
        count_passes(patch, limit=len(passes))
        sleb("eval", *options, "--force -o r.json", code=130)
    unfinished = kept_results(Path("r.unfinished"))
    assert [each.texts[0].text for each in unfinished] == texts.split(",")
    rest = count_passes(monkeypatch)
    assert evaluate(*options, "-o r.json")[0] == whole
    assert json.loads(Path("r.json").read_text()) == whole
    assert 0 < len(rest) < len(passes) / 2
    assert not Path("r.unfinished").exists()


def joined_sizes(plan):
    """Return of how many sizes each text and task was measured, as a report joins them."""
    joined, _ = read_measurements(plan, read_plan(plan), ignore)
    return [len(each.pruned) for each in (*joined.texts, *joined.tasks)]


def test_results_of_runs_are_kept_beside_the_plan(
    evaluate, llama_plan, test_text, text_file, own_task
):
    plan = llama_plan.rename("plan.json")  # which is the default
    folder, both = results_folder(plan), f"{test_text},{text_file}"
    short = [*SHORT, "--max-windows 4 -q"]
    assert evaluate("--perplexity", both, "--every 1", *short)[1] == ""
    evaluate(plan, "--perplexity", text_file, *own_task, *short)
    one, other, last = kept_results(folder)
    assert [each.texts[0].text for each in (one, other)] == both.split(",")
    assert [len(size) for size in one.sizes] == [1, 2]
    (task,) = last.tasks
    assert (task.task, task.limit, task.lm_eval) == ("own_weather", 4, version("lm_eval"))
    windows = "--sequence-length 64 --max-windows 4"
    first = f"sleb eval --every 1 --perplexity {both} {windows}"
    assert one.commands == other.commands == (first,)
    of_task = f"--tasks own_weather --limit 4 --include-path {own_task[1]}"
    assert last.commands == (f"sleb eval plan.json --perplexity {text_file} {of_task} {windows}",)
    assert joined_sizes(plan) == [2, 2, 1]
    # Another size is another file, and of another model, nothing is kept.
    evaluate(plan, "--perplexity", text_file, *own_task, *short, "--remove 1")
    other = save_model(folder.parent / "other", llama_config(), seed=1)
    evaluate(plan, "--model", other, "--any-model --perplexity", test_text, *short)
    assert len(kept_results(folder)) == 4
    assert joined_sizes(plan) == [2, 2, 2]


def test_an_applied_checkpoint_keeps_its_own_results(
    sleb, evaluate, llama_plan, test_text, tmp_path
):
    sleb("apply", llama_plan, "-o out --no-verify -q")
    options = ["--perplexity", test_text, *SHORT]
    planned, _ = evaluate(llama_plan, *options)
    evaluate("out", *options)
    assert "Measured before" in evaluate("out", *options)[1]
    # With further blocks removed, it is another model.
    evaluate("out", "--blocks 1", *options)
    (file,) = Path("out/sleb_results").iterdir()
    assert str(tmp_path) not in file.read_text()
    (kept,) = kept_results(file.parent)
    expected = planned["texts"][0]["pruned"][0]["perplexity"]
    assert kept.texts[0].dense.perplexity == expected


def test_out_of_memory_batches_are_smaller(evaluate, tiny_llama, own_task, text_file, monkeypatch):
    text = ["--perplexity", text_file, *SHORT, "--max-windows 8 --batch-size 4"]
    expected, _ = evaluate(tiny_llama, *own_task, *text)
    forward = LlamaForCausalLM.forward
    refused = set()

    def short_of_memory(self, input_ids=None, **options):
        if len(input_ids) > 1:
            refused.add(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", short_of_memory)
    found, said = evaluate(tiny_llama, *own_task, *text)
    assert {2, 4} <= refused
    assert "Out of memory on cpu; continuing with" in said
    assert found["tasks"] == expected["tasks"]
    losses, before = (data["texts"][0]["dense"]["losses"] for data in (found, expected))
    assert losses == pytest.approx(before, rel=1e-5)


@pytest.fixture
def corpus(tmp_path):
    """Make a data set of two splits, which `load_dataset` reads from a folder."""
    folder = tmp_path / "org" / "corpus"
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "test")):
        (folder / f"{split}.txt").write_text(prose(60, seed=seed))


@pytest.mark.usefixtures("corpus")
def test_the_split_is_the_least_known_one_by_default(evaluate, tiny_llama):
    chosen, said = evaluate(tiny_llama, "--perplexity org/corpus:,org/corpus:::text", *SHORT)
    assert "No split given; measuring perplexity on org/corpus::test." in said
    named, said = evaluate(tiny_llama, "--perplexity org/corpus::test,org/corpus::train", *SHORT)
    assert "No split given" not in said
    default, column = chosen["texts"]
    test, train = named["texts"]
    assert default == test
    assert column["text"] == "org/corpus::test:text"
    assert train["tokens_sha256"] != test["tokens_sha256"]


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        ("train validation test", "test"),
        ("train dev validation", "validation"),
        ("train valid", "valid"),
        ("train dev", "dev"),
        ("corpus more", "corpus"),
        ("", "train"),
    ],
)
def test_splits_by_other_names(monkeypatch, splits, chosen):
    load = Mock(return_value=datasets.Dataset.from_dict({"text": ["a river"]}))
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *of: splits.split())
    source = text_source("org/name:cfg").read_for_evaluation(2048).source
    assert source == f"org/name:cfg:{chosen}"
    load.assert_called_with("org/name", "cfg", split=chosen, data_files=None)


def flattered(evaluate, subject, *texts):
    """Return what is said of texts that may flatter, each measured on windows of 32 tokens."""
    _, said = evaluate(subject, "--perplexity", ",".join(map(str, texts)), "--sequence-length 32")
    return [line for line in said.splitlines() if "may flatter" in line]


def test_text_that_blocks_were_chosen_or_recovered_on_is_flagged(
    sleb, search, evaluate, tiny_llama, text_file, test_text
):
    copy = shutil.copy(test_text, "copy.txt")
    data, _ = evaluate(tiny_llama, "--perplexity", copy, "--sequence-length 32")
    search("--remove 1", text=test_text, samples=data["texts"][0]["windows"])
    assert len(flattered(evaluate, "plan.json", copy)) == 1
    recover = ["--recover --no-heal", *calibration(text_file, 10), "-o out --no-verify -q"]
    sleb("apply", "plan.json", *recover)
    chosen, recovered = flattered(evaluate, "out", test_text, text_file)
    assert "Blocks were chosen on test.txt" in chosen
    assert "The remaining blocks were recovered on prose.txt" in recovered


def tabulated(sleb):
    sleb("export out --to table -o table.csv --force")
    _, row = csv.DictReader(Path("table.csv").read_text().splitlines())
    return row.values()


def test_a_checkpoint_that_was_trained_is_measured_with_the_weights_that_it_has_now(
    sleb, apply, evaluate, llama_plan, tiny_llama, text_file
):
    apply(llama_plan)
    measure = ["out/sleb_plan.json", "--model", tiny_llama, *evaluation(text_file)]

    written, said = evaluate(*measure)
    assert "own weights" not in said
    assert str(written["texts"][0]["pruned"][0]["perplexity"]) in tabulated(sleb)
    weights = load_file("out/model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, "out/model.safetensors", {"format": "pt"})
    told = sleb("export", "out", "--to table").stderr
    assert "Ignoring 1 result in out/sleb_plan.results: of another model or other weights" in told
    trained, said = evaluate(*measure)
    assert "with its own weights, not the dense model's" in said
    alone, _ = evaluate("out", *evaluation(text_file))
    (pruned,) = trained["texts"][0]["pruned"]
    assert pruned["losses"] == alone["texts"][0]["dense"]["losses"]
    assert pruned["losses"] != written["texts"][0]["pruned"][0]["losses"]
    assert str(pruned["perplexity"]) in tabulated(sleb)


def test_all_that_is_named_wrong_is_said_at_once(sleb, tiny_llama, monkeypatch):
    command = ["eval", tiny_llama, "--blocks 2 --perplexity none.txt --tasks piqqa,aqua"]
    key = task_names_key()
    write_cached(*key, ["piqa", "winogrande"], "names", ignore)
    monkeypatch.setattr(evaluate_door, "resolve_subject", None)  # no model is looked at
    error = sleb(*command, code=5).stderr
    assert "There is no file none.txt. lm-eval has no task 'piqqa'." in error
    assert "lm-eval has no task 'aqua'" in error


def test_the_names_of_tasks_are_kept_once_a_wrong_one_was_looked_up(sleb, tiny_llama):
    command = ["eval", tiny_llama, "--blocks 2 --tasks piqqa"]
    assert read_cached(*task_names_key()) is None
    assert "Did you mean 'piqa'" in sleb(*command, code=5).stderr
    assert "piqa" in read_cached(*task_names_key())
    assert "Did you mean 'piqa'" in sleb(*command, code=5).stderr


def test_a_long_text_says_how_long_it_takes_and_what_a_part_of_it_takes(
    sleb, tiny_llama, text_file, monkeypatch
):
    for name, value in {"PACE_SECONDS": 0, "LONG_SECONDS": 0, "FEW_WINDOWS": 2}.items():
        monkeypatch.setattr(quality_texts, name, value)
    command = ["eval", tiny_llama, "--blocks 2 --sequence-length 32 --perplexity", text_file]
    assert "; --max-windows 2 takes about" in sleb(*command).stderr
    assert "--max-windows" not in sleb(*command, "--max-windows 2").stderr

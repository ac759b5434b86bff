"""The model card: what it inherits, what was measured, and how it is brought up to date."""

import json
import math
import os
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from test_apply import applied

from conftest import calibration, llama_config, save_model
from gguf_models import write_llama_gguf
from measured_plans import make_benchmark, make_evaluation, make_plan
from sleb_cli.engine.output.card import BEGIN, END, update_card
from sleb_cli.engine.output.card_metadata import with_results
from sleb_cli.engine.output.card_results import Row, results_section
from sleb_cli.kept_results import beside_plan
from sleb_cli.plan import read_plan
from sleb_cli.results import EvalResult
from sleb_cli.units import format_change, format_perplexity


class Checkpoint:
    """A checkpoint in the folder `out`, and its card."""

    def __init__(self, run_sleb, text_file, tmp_path):
        self.run, self.text_file, self.folder = run_sleb, text_file, tmp_path / "out"
        self.readme = self.folder / "README.md"

    def apply(self, subject, *options):
        applied(self.run, subject, "--no-verify", *options)

    def evaluate(self):
        options = ["--perplexity", self.text_file, "--sequence-length", 32, "--max-windows", 4]
        result = self.run("eval", "out", *options)
        assert result.exit_code == 0, result.stderr
        return result

    @property
    def text(self):
        return self.readme.read_text()

    @property
    def data(self):
        """What huggingface_hub reads and writes back as it is."""
        card = ModelCard(self.text)
        yaml_text = re.match(r"---\n(.*?)\n---\n", self.text, re.S)[1]
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() == yaml.safe_load(yaml_text)
        return card.data

    @property
    def results(self):
        return self.text.partition(BEGIN)[2].partition(END)[0].strip()

    def row(self, *words):
        """Return the first row of the results that begins with these cells."""
        return next(line for line in self.results.splitlines() if line.startswith(f"| {' | '.join(words)} |"))


@pytest.fixture
def out(run_sleb, text_file, tmp_path):
    return Checkpoint(run_sleb, text_file, tmp_path)


PLAIN = {"library_name": "transformers", "tags": ["sleb", "pruned"], "pipeline_tag": "text-generation"}


@pytest.mark.parametrize(
    ("front_matter", "inherited"),
    [
        (
            "license: other\nlicense_name: llama3.2\nlicense_link: LICENSE\nlanguage:\n- en\n- no\n"
            "tags:\n- llama\n- base_model:adapter:x/y\npipeline_tag: image-text-to-text\nbase_model: far/away\n"
            "model-index: []\nextra: 1",
            {
                "license": "other", "license_name": "llama3.2", "license_link": "LICENSE", "language": ["en", "no"],
                "tags": ["sleb", "pruned", "llama"], "pipeline_tag": "image-text-to-text",
            },
        ),
        ("license: apache-2.0\nlanguage: en\ntags: [1, pruned]", {"license": "apache-2.0", "language": "en"}),
        ("license: [", {}),
        ("just words", {}),
        ("license: \xff\xfe", {}),  # not UTF-8
    ],
)  # fmt: skip
def test_licence_and_language_of_the_base_model_stay(out, tmp_path, front_matter, inherited):
    folder = save_model(tmp_path / "base", llama_config(4))
    card = f"---\n{front_matter}\n---\n# Base\n---\nlicense: mit\n---\n"
    (folder / "README.md").write_text(card, encoding="latin-1")
    out.apply(folder, "--blocks", "1")
    assert out.data.to_dict() == PLAIN | inherited


def test_a_gguf_file_says_its_licence_and_languages_too(out, tmp_path):
    out.apply(write_llama_gguf(tmp_path / "tiny.gguf"), "--blocks", "1")
    assert (out.data.license, out.data.language) == ("apache-2.0", ["en", "no"])


@pytest.fixture
def measured(llama_plan, text_file):
    """A plan with what was measured of it kept beside it: on a local text, a data set, two tasks, three workloads."""
    plan = read_plan(llama_plan)
    evaluation = make_evaluation(plan, texts=(str(text_file), "wikitext2", "org/words:plain:test"), every=1)
    evaluation = evaluation.model_copy(update={"lm_eval": (str(text_file.parent / "lm-eval.json"),)})
    evaluation.write(beside_plan(llama_plan, "eval"))
    benchmark = make_benchmark(plan, every=1)
    benchmark.write(beside_plan(llama_plan, "bench"))
    return llama_plan, evaluation, benchmark


@pytest.mark.parametrize("size", [1, 2])
def test_the_card_shows_what_was_measured_of_this_size(out, measured, size):
    plan, evaluation, benchmark = measured
    out.apply(plan, "--remove", size)
    text, task = evaluation.texts[0], evaluation.tasks[0]
    scores, value, timing = (of.pruned[size - 1] for of in (text, task, benchmark.workloads[1]))
    name, change = "prose.txt, 24 windows of 2048 tokens, bfloat16 on cpu", format_change(math.expm1(scores.log_ratio))
    out.row(name, "base model", format_perplexity(text.dense.perplexity))
    out.row(name, "this model", format_perplexity(scores.perplexity), change)
    out.row("piqa, acc, bfloat16 on cpu", "base model", f"{task.dense.value:.4f}")
    row = out.row("piqa, acc, bfloat16 on cpu", "this model", f"{value.value:.4f}")
    assert f"| {value.difference:+.4f} |" in row
    row = out.row("generation 1x64+32, bfloat16 on cpu", "this model")
    assert f"| {timing.tokens_per_second:,.1f} | {timing.speedup:.2f}x |" in row
    values = [(entry.metric_type, entry.metric_value) for entry in out.data.eval_results]
    assert values == [
        *(("perplexity", round(text.pruned[size - 1].perplexity, 4)) for text in evaluation.texts),
        *(("acc", round(task.pruned[size - 1].value, 4)) for task in evaluation.tasks),
    ]
    files = out.folder.glob("*.[jm][sd]*")
    assert str(out.text_file.parent) not in "".join(path.read_text() for path in files)


def test_names_and_commands_are_those_of_the_hub_and_settings(out, measured):
    out.apply(measured[0])
    sets = [(of.dataset_name, of.dataset_type, of.dataset_config, of.dataset_split) for of in out.data.eval_results]
    assert sets == [
        ("prose.txt", "prose.txt", None, None),
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("org/words:plain:test", "org/words", "plain", "test"),
        ("piqa", "piqa", None, None),
        ("arc_easy", "arc_easy", None, None),
    ]
    machine, texts = "--dtype bfloat16 --device cpu", "prose.txt,wikitext2,org/words:plain:test"
    assert out.results.partition("```bash\n")[2].partition("```")[0].splitlines() == [
        f"sleb eval FOLDER --sequence-length 2048 --max-windows 24 {machine} --perplexity {texts}",
        "lm-eval run --model hf --model_args pretrained=FOLDER,dtype=bfloat16 --device cpu --num_fewshot 0 "
        "--limit 400 --tasks piqa,arc_easy",
        f"sleb bench FOLDER --prompt --batch-size 1 --prompt-length 512 {machine}",
        *(
            f"sleb bench FOLDER --generation --batch-size {size} --prompt-length 64 --new-tokens 32 {machine}"
            for size in (1, 8)
        ),
    ]


def test_commands_and_names_of_tasks_in_the_chat_template(out, measured):
    plan, evaluation, _ = measured
    tasks = [
        evaluation.tasks[0].model_copy(update={"task": name, "chat": True}) for name in ("piqa", "sleb_instructions")
    ]
    evaluation.model_copy(update={"tasks": tuple(tasks)}).write(beside_plan(plan, "eval"))
    out.apply(plan)
    out.row("piqa, acc, chat, bfloat16 on cpu", "this model")
    assert "--limit 400 --apply_chat_template --tasks piqa\n" in out.results
    assert "--limit 400 --apply-chat-template --tasks sleb_instructions\n" in out.results


@pytest.mark.parametrize("removed", [2, 4])
def test_speeds_of_the_checkpoint_alone_are_beside_those_of_its_plan(removed):
    plan = make_plan(8, removed)
    found = make_benchmark(plan)
    workload = found.workloads[0]
    alone = found.model_copy(update={"model": found.model.model_copy(update={"blocks": 8 - removed})})
    rows = [Row(found, workload, workload.dense, workload.pruned[-1]), Row(alone, workload, None, workload.dense)]
    assert f"| {8 / (8 - removed):.2f}x |" in "\n".join(results_section(rows))


def test_a_recovered_checkpoint_claims_no_earlier_number(out, measured, tmp_path):
    out.apply(measured[0], "--recover", "--calibration", out.text_file, "--samples", 12, "--sequence-length", 32)
    assert "model-index" not in out.data.to_dict()
    assert "The steps of the search" in out.text
    assert out.results == ""
    assert not list(out.folder.glob("sleb_plan.*.json"))
    # Nor does one whose plan is measured later, nor another model of the same plan.
    measured[1].write(beside_plan(out.folder / "sleb_plan.json", "eval"))
    update_card(out.folder)
    assert out.results == ""
    recovered = measured[1].model_copy(update={"recovered": "weights"})
    recovered.write(beside_plan(out.folder / "sleb_plan.json", "eval"))
    moved = shutil.copytree(out.folder, tmp_path / "recovered")
    out.apply(moved / "sleb_plan.json", "--model", read_plan(measured[0]).model.id, "--force")
    assert not list(out.folder.glob("sleb_plan.*.json"))
    out.apply(measured[0], "--model", save_model(tmp_path / "other", llama_config(), seed=1), "--any-model", "--force")
    assert out.results == ""


def test_eval_and_bench_update_the_card(out, llama_plan, without_memory):
    out.apply(llama_plan)
    own = out.text.replace("library_name", "widget: mine # by hand\nlibrary_name")
    out.readme.write_text(own.replace(BEGIN, f"My words.\n\n{BEGIN}") + "\nMore of mine.\n")
    out.evaluate()
    result = EvalResult.model_validate_json((out.folder / "sleb_eval.json").read_text())
    perplexity = result.texts[0].dense.perplexity
    (entry,) = out.data.eval_results
    assert (entry.dataset_name, entry.metric_value) == ("prose.txt", round(perplexity, 4))
    out.row("prose.txt, 4 windows of 32 tokens, float32 on cpu", "this model", format_perplexity(perplexity))
    assert "base model |" not in out.results
    assert all(words in out.text for words in ("widget: mine # by hand\n", "My words.\n\n<!--"))
    assert out.text.endswith("\nMore of mine.\n")
    assert str(out.text_file) not in out.text
    bench = ["--prompt", "--prompt-length", 8, "--batch-size", 1, "--iterations", 2, "--warmup", 1]
    assert out.run("bench", "out", *bench).exit_code == 0
    out.row("prompt 1x8, float32 on cpu", "this model")
    # The same again changes nothing.
    before = out.text
    out.evaluate()
    assert out.text == before


@pytest.mark.parametrize("changed", ["weights", "generation settings"])
def test_results_of_another_model_are_not_shown(out, llama_plan, changed):
    out.apply(llama_plan)
    out.evaluate()
    kept = out.folder / "sleb_eval.json"
    data = json.loads(kept.read_text())
    if changed == "weights":
        kept.write_text(json.dumps(data | {"model": data["model"] | {"fingerprint": "f" * 64}}))
    else:
        (out.folder / "generation_config.json").write_text('{"repetition_penalty": 5.0}')
    assert "model-index" in out.data.to_dict()
    update_card(out.folder)
    assert out.results == ""
    assert "model-index" not in out.data.to_dict()


def test_results_of_others_stay_and_ours_are_replaced(out, measured):
    out.apply(measured[0])
    ours = out.data.eval_results
    theirs = type(ours[0])(
        task_type="text-generation", dataset_type="gsm8k", dataset_name="GSM8K", metric_type="acc", metric_value=0.1
    )
    changed = [type(ours[0])(**(vars(entry) | {"metric_value": 0.5})) for entry in ours]
    data = ModelCard(with_results(with_results(out.text, "x", [theirs]), "x", changed)).data
    assert [entry.metric_value for entry in data.eval_results] == [0.1, *[0.5] * len(ours)]
    assert data.model_name == "tiny-llama-sleb-4-blocks"


@pytest.mark.parametrize(
    ("change", "is_updated", "message"),
    [
        (lambda card: card.replace(BEGIN, ""), False, ""),
        (lambda card: "Mine.", False, ""),
        (lambda card: card.replace("library_name: transformers", "library_name: [\n"), False, "Cannot update"),
        (lambda card: card.replace("---\n", "", 1), True, ""),
    ],
)
def test_a_card_that_cannot_be_updated_costs_no_result(out, llama_plan, change, is_updated, message):
    out.apply(llama_plan)
    out.readme.write_text(change(out.text))
    before = out.text
    assert message in out.evaluate().stderr
    assert (out.folder / "sleb_eval.json").exists()
    assert (out.text != before) == ("| prose.txt, " in out.text) == is_updated
    out.readme.unlink()
    update_card(out.folder)
    assert not out.readme.exists()


def test_no_file_names_a_folder_of_this_machine(out, run_sleb, search, tmp_path, text_file):
    folder = save_model(tmp_path / "own" / "model", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(tmp_path / "base"), "vision_config": {"_name_or_path": "org/eyes"}}
    (folder / "config.json").write_text(json.dumps(config | {"text": {"_name_or_path": f"{tmp_path}/base/"}}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": str(tmp_path / "base")}))
    (folder / "plan.eval.json.old").write_text(json.dumps({"sleb_version": "1", "model": str(folder)}))
    (folder / "adapter_config.json").write_text("{}")
    search("--remove", 1, model=folder, text=f"{text_file}:2/3,self:1/3", samples=6)
    out.apply("plan.json", "--recover", *calibration(text_file, samples=10))
    files = {path.name: path.read_bytes() for path in out.folder.iterdir()}
    assert "adapter_config.json" not in files
    places = [str(place).encode() for place in (tmp_path.parent, text_file.parent, os.environ["SLEB_CACHE"])]
    assert [name for name, content in files.items() if any(place in content for place in places)] == []
    written = json.loads(files["config.json"])
    assert (written["_name_or_path"], written["text"]["_name_or_path"]) == ("base", "base")
    assert written["vision_config"]["_name_or_path"] == "org/eyes"
    assert json.loads(files["tokenizer_config.json"]) == tokenizer | {"name_or_path": "base"}
    plan = read_plan(out.folder / "sleb_plan.json")
    assert (plan.model.id, plan.calibration.source) == ("model", "prose.txt:2/3,self:1/3")
    # It is still a plan for that model, wherever that is, and nobody looks for "model" on the Hub.
    result = run_sleb("apply", "out/sleb_plan.json", "-o", "again")
    assert (result.exit_code, "was made for model, and does not say where that is" in result.stderr) == (3, True)

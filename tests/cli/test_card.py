"""The model card: what it inherits, what was measured, and how it is brought up to date."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from conftest import llama_config, save_model
from gguf_models import write_llama_gguf
from measured_plans import make_benchmark, make_evaluation
from sleb_cli.engine.output.card import BEGIN, END, update_card
from sleb_cli.engine.output.card_metadata import with_results
from sleb_cli.kept_results import beside_plan
from sleb_cli.plan import read_plan
from sleb_cli.results import EvalResult
from sleb_cli.units import format_change, format_perplexity


def card_of(folder):
    """Return a card that huggingface_hub reads and writes back as it is."""
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() == yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])
    return card


def applied(run_sleb, subject, *options):
    result = run_sleb("apply", subject, "-o", "out", "--no-verify", *options)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize(
    ("front_matter", "inherited"),
    [
        (
            "license: other\nlicense_name: llama3.2\nlicense_link: LICENSE\nlanguage:\n- en\n- no\n"
            "tags:\n- llama\n- base_model:adapter:x/y\npipeline_tag: image-text-to-text\nbase_model: far/away\n"
            "model-index: []\nextra: 1\n",
            {
                "license": "other", "license_name": "llama3.2", "license_link": "LICENSE", "language": ["en", "no"],
                "tags": ["sleb", "pruned", "llama"], "pipeline_tag": "image-text-to-text",
            },
        ),
        (
            "license: apache-2.0\nlanguage: en\ntags: [1, pruned]\n",
            {"license": "apache-2.0", "language": "en", "tags": ["sleb", "pruned"], "pipeline_tag": "text-generation"},
        ),
        ("license: [\n", {"tags": ["sleb", "pruned"], "pipeline_tag": "text-generation"}),
        ("just words\n", {"tags": ["sleb", "pruned"], "pipeline_tag": "text-generation"}),
    ],
)  # fmt: skip
def test_licence_and_language_of_the_base_model_stay(run_sleb, tmp_path, front_matter, inherited):
    folder = save_model(tmp_path / "base", llama_config(4))
    (folder / "README.md").write_text(f"---\n{front_matter}---\n# Base\n---\nlicense: mit\n---\n")
    applied(run_sleb, folder, "--blocks", "1")
    assert card_of(tmp_path / "out").data.to_dict() == {"library_name": "transformers"} | inherited


def test_a_gguf_file_says_its_licence_and_languages_too(run_sleb, tmp_path):
    applied(run_sleb, write_llama_gguf(tmp_path / "tiny.gguf"), "--blocks", "1")
    data = card_of(tmp_path / "out").data
    assert (data.license, data.language) == ("apache-2.0", ["en", "no"])


@pytest.mark.parametrize("what", ["a link out of the folder", "not text"])
def test_a_card_that_cannot_be_read_gives_nothing(run_sleb, tmp_path, what):
    folder = save_model(tmp_path / "base", llama_config(4))
    (tmp_path / "private.md").write_text("---\nlicense: mit\n---\n")
    if what == "not text":
        (folder / "README.md").write_bytes(b"\xff\xfe")
    else:
        (folder / "README.md").symlink_to(tmp_path / "private.md")
    applied(run_sleb, folder, "--blocks", "1")
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sleb", "pruned"]}
    assert card_of(tmp_path / "out").data.to_dict() == expected


def test_a_model_of_the_hub_is_named_with_its_relation(run_sleb, tiny_llama, tmp_path, monkeypatch):
    from sleb_cli.engine.model import source

    snapshot = tmp_path / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_llama, snapshot)
    monkeypatch.setattr(source, "snapshot_download", lambda *arguments, **options: str(snapshot))
    applied(run_sleb, "org/tiny", "--blocks", "1")
    data = card_of(tmp_path / "out").data
    assert (data.base_model, data.base_model_relation) == ("org/tiny", "finetune")


@pytest.fixture
def measured(llama_plan, text_file):
    """A plan with what was measured of it kept beside it: on a local text, a data set, two tasks, three workloads."""
    plan = read_plan(llama_plan)
    texts = (str(text_file), "wikitext2", "org/words:plain:test")
    evaluation = make_evaluation(plan, texts=texts, every=1)
    evaluation = evaluation.model_copy(update={"lm_eval": (str(text_file.parent / "lm-eval.json"),)})
    evaluation.write(beside_plan(llama_plan, "eval"))
    benchmark = make_benchmark(plan, every=1)
    benchmark.write(beside_plan(llama_plan, "bench"))
    return llama_plan, evaluation, benchmark


def section(folder):
    return (folder / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]


def row_of(folder, *words):
    """Return the first row of the results that holds these words."""
    return next(line for line in section(folder).splitlines() if all(word in line for word in words))


@pytest.mark.parametrize("size", [1, 2])
def test_the_card_shows_what_was_measured_of_this_size(run_sleb, measured, tmp_path, text_file, size):
    plan, evaluation, benchmark = measured
    applied(run_sleb, plan, "--remove", size)
    out, text, task = tmp_path / "out", evaluation.texts[0], evaluation.tasks[0]
    name = "| prose.txt, 24 windows of 2048 tokens, bfloat16 on cpu |"
    assert format_perplexity(text.dense.perplexity) in row_of(out, name, "| base model |")
    change = format_change(text.pruned[size - 1].perplexity / text.dense.perplexity - 1)
    assert f"| {format_perplexity(text.pruned[size - 1].perplexity)} | {change} |" in row_of(
        out, name, "| this model |"
    )
    assert f"| {task.dense.value:.4f} |" in row_of(out, "| piqa, acc, bfloat16 on cpu | base model |")
    scores = task.pruned[size - 1]
    assert f"| {scores.value:.4f} |" in row_of(out, "| piqa, acc, bfloat16 on cpu | this model |")
    assert f"| {scores.difference:+.4f} |" in row_of(out, "| piqa, acc, bfloat16 on cpu | this model |")
    timing = benchmark.workloads[1].pruned[size - 1]
    speeds = f"| {timing.output_throughput:,.1f} | {timing.speedup:.2f}x |"
    assert speeds in row_of(out, "| generation 1x64+32, bfloat16 on cpu | this model |")
    entries = card_of(out).data.eval_results
    assert {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in entries} == {
        **{
            (name, "perplexity"): round(text.pruned[size - 1].perplexity, 4)
            for name, text in zip(("prose.txt", "wikitext2", "org/words:plain:test"), evaluation.texts, strict=True)
        },
        **{(task.task, "acc"): round(task.pruned[size - 1].value, 4) for task in evaluation.tasks},
    }
    assert str(text_file.parent) not in "".join(path.read_text() for path in out.glob("*.[jm][sd]*"))


def test_names_and_commands_are_those_of_the_hub_and_settings(run_sleb, measured, tmp_path):
    applied(run_sleb, measured[0])
    found = [
        (entry.dataset_type, entry.dataset_config, entry.dataset_split)
        for entry in card_of(tmp_path / "out").data.eval_results
    ]
    assert found == [
        ("prose.txt", None, None), ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("org/words", "plain", "test"), ("piqa", None, None), ("arc_easy", None, None),
    ]  # fmt: skip
    assert all(re.fullmatch(r"([\w-]+/)?[\w.-]+", name) for name, _, _ in found)
    machine = "--dtype bfloat16 --device cpu"
    commands = section(tmp_path / "out").partition("```bash\n")[2].partition("```")[0].splitlines()
    assert commands == [
        f"sleb eval FOLDER --sequence-length 2048 --max-windows 24 {machine} "
        "--perplexity prose.txt,wikitext2,org/words:plain:test",
        "lm-eval run --model hf --model_args pretrained=FOLDER,dtype=bfloat16 --device cpu --num_fewshot 0 "
        "--limit 400 --tasks piqa,arc_easy",
        f"sleb bench FOLDER --prompt --batch-size 1 --prompt-length 512 {machine}",
        f"sleb bench FOLDER --generation --batch-size 1 --prompt-length 64 --new-tokens 32 {machine}",
        f"sleb bench FOLDER --generation --batch-size 8 --prompt-length 64 --new-tokens 32 {machine}",
    ]


def test_a_recovered_checkpoint_claims_no_earlier_number(run_sleb, measured, text_file, tmp_path):
    options = ["--recover", "--calibration", text_file, "--samples", 12, "--sequence-length", 32]
    applied(run_sleb, measured[0], *options)
    assert "model-index" not in card_of(tmp_path / "out").data.to_dict()
    assert "The steps of the search" in (tmp_path / "out" / "README.md").read_text()
    assert section(tmp_path / "out").strip() == ""
    assert not list((tmp_path / "out").glob("sleb_plan.*.json"))
    # Nor does one whose plan is measured later.
    measured[1].write(beside_plan(tmp_path / "out" / "sleb_plan.json", "eval"))
    update_card(tmp_path / "out")
    assert section(tmp_path / "out").strip() == ""


def test_another_model_with_the_same_plan_has_not_been_measured(run_sleb, measured, tmp_path):
    other = save_model(tmp_path / "other", llama_config(), seed=1)
    applied(run_sleb, measured[0], "--model", other, "--any-model")
    assert section(tmp_path / "out").strip() == ""


def test_eval_and_bench_update_the_card(run_sleb, llama_plan, text_file, tmp_path, without_memory):
    applied(run_sleb, llama_plan)
    path = tmp_path / "out" / "README.md"
    own = path.read_text().replace("library_name", "widget: mine # by hand\nlibrary_name")
    path.write_text(own.replace(BEGIN, f"My words.\n\n{BEGIN}") + "\nMore of mine.\n")
    measuring = ["--perplexity", text_file, "--sequence-length", 32, "--max-windows", 4]
    assert run_sleb("eval", "out", *measuring).exit_code == 0
    result = EvalResult.model_validate_json((tmp_path / "out" / "sleb_eval.json").read_text())
    perplexity = result.texts[0].dense.perplexity
    (entry,) = card_of(tmp_path / "out").data.eval_results
    assert (entry.dataset_name, entry.metric_value) == ("prose.txt", round(perplexity, 4))
    card = path.read_text()
    row = f"| prose.txt, 4 windows of 32 tokens, float32 on cpu | this model | {format_perplexity(perplexity)} |"
    assert row in card
    assert "base model |" not in section(tmp_path / "out")
    assert "widget: mine # by hand\n" in card
    assert "My words.\n\n<!--" in card
    assert card.endswith("\nMore of mine.\n")
    assert str(text_file) not in card
    bench = ["--prompt", "--prompt-length", 8, "--batch-size", 1, "--iterations", 2, "--warmup", 1]
    result = run_sleb("bench", "out", *bench)
    assert result.exit_code == 0, result.stderr
    assert row in path.read_text()
    assert "| prompt 1x8, float32 on cpu | this model |" in path.read_text()
    # The same again changes nothing.
    before = path.read_text()
    assert run_sleb("eval", "out", *measuring).exit_code == 0
    assert path.read_text() == before


@pytest.mark.parametrize("changed", ["weights", "generation settings"])
def test_results_of_another_model_are_not_shown(run_sleb, llama_plan, text_file, tmp_path, changed):
    applied(run_sleb, llama_plan)
    measuring = ["--perplexity", text_file, "--sequence-length", 32, "--max-windows", 4]
    assert run_sleb("eval", "out", *measuring).exit_code == 0
    kept = tmp_path / "out" / "sleb_eval.json"
    data = json.loads(kept.read_text())
    if changed == "weights":
        kept.write_text(json.dumps(data | {"model": data["model"] | {"fingerprint": "f" * 64}}))
    else:
        (tmp_path / "out" / "generation_config.json").write_text('{"repetition_penalty": 5.0}')
    assert "model-index" in card_of(tmp_path / "out").data.to_dict()
    update_card(tmp_path / "out")
    assert section(tmp_path / "out").strip() == ""
    assert "model-index" not in card_of(tmp_path / "out").data.to_dict()


def test_results_of_others_stay_and_ours_are_replaced(run_sleb, measured, tmp_path):
    applied(run_sleb, measured[0])
    card = (tmp_path / "out" / "README.md").read_text()
    ours = card_of(tmp_path / "out").data.eval_results
    theirs = type(ours[0])(
        task_type="text-generation", dataset_type="gsm8k", dataset_name="GSM8K", metric_type="acc", metric_value=0.1
    )
    changed = [type(ours[0])(**(vars(entry) | {"metric_value": 0.5})) for entry in ours]
    data = ModelCard(with_results(with_results(card, "x", [theirs]), "x", changed)).data
    assert [entry.metric_value for entry in data.eval_results] == [0.1, *[0.5] * len(ours)]
    assert data.model_name == "tiny-llama-sleb-4-blocks"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.replace(BEGIN, ""), None),
        (lambda card: "Mine.", None),
        (lambda card: card.replace("library_name: transformers", "library_name: [\n"), "is not brought up to date"),
        (lambda card: card.replace("---\n", "", 1), None),
    ],
)
def test_a_card_that_cannot_be_updated_costs_no_result(run_sleb, llama_plan, text_file, tmp_path, change, message):
    applied(run_sleb, llama_plan)
    path = tmp_path / "out" / "README.md"
    path.write_text(change(path.read_text()))
    before = path.read_text()
    result = run_sleb("eval", "out", "--perplexity", text_file, "--sequence-length", 32, "--max-windows", 4)
    assert result.exit_code == 0
    assert (tmp_path / "out" / "sleb_eval.json").exists()
    if message:
        assert message in result.stderr
    if message or BEGIN not in before:
        assert path.read_text() == before
    else:
        assert "| prose.txt, " in path.read_text()
    path.unlink()
    update_card(tmp_path / "out")
    assert not path.exists()

"""The model card: what it inherits, and what was measured."""

import json
import math
import os
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from conftest import calibration, llama_config, save_model
from gguf_models import write_llama_gguf
from measured_plans import make_benchmark, make_evaluation
from sleb_cli.events import ignore
from sleb_cli.plan import read_plan
from sleb_cli.saved_results import keep_result, results_folder
from sleb_cli.units import format_change, format_perplexity


class Checkpoint:
    """A checkpoint in the folder `out`, and its card."""

    def __init__(self, apply, text_file, tmp_path):
        self.run, self.text_file, self.folder = apply, text_file, tmp_path / "out"
        self.readme = self.folder / "README.md"

    def apply(self, subject, *options):
        self.run(subject, "--no-verify", *options)

    @property
    def text(self):
        return self.readme.read_text()

    @property
    def data(self):
        """What huggingface_hub reads and writes back as it is."""
        card = ModelCard(self.text)
        yaml_text = re.match(r"---\n(.*?)\n---\n", self.text, re.S)[1]
        assert (
            ModelCard(str(card)).data.to_dict() == card.data.to_dict() == yaml.safe_load(yaml_text)
        )
        return card.data

    @property
    def results(self):
        """The cells of the table of results, by what was measured."""
        rows = self.text.partition("**Results**")[2].split("\n\n")[1].splitlines()[2:]
        return {name: cells for name, *cells in (row.strip("| ").split(" | ") for row in rows)}


@pytest.fixture
def out(apply, text_file, tmp_path):
    return Checkpoint(apply, text_file, tmp_path)


PLAIN = {
    "library_name": "transformers",
    "tags": ["sleb", "pruned"],
    "pipeline_tag": "text-generation",
}


@pytest.mark.parametrize(
    ("front_matter", "inherited"),
    [
        (
            "license: other\nlicense_name: llama3.2\nlicense_link: LICENSE\nlanguage:\n- en\n- no\n"
            "tags:\n- llama\n- base_model:adapter:x/y\npipeline_tag: "
            "image-text-to-text\nbase_model: far/away\n"
            "model-index: []\nextra: 1",
            {
                "license": "other",
                "license_name": "llama3.2",
                "license_link": "LICENSE",
                "language": ["en", "no"],
                "tags": ["sleb", "pruned", "llama"],
                "pipeline_tag": "image-text-to-text",
            },
        ),
        (
            "license: apache-2.0\nlanguage: en\ntags: [1, pruned]",
            {"license": "apache-2.0", "language": "en"},
        ),
        ("license: [", {}),
        ("just words", {}),
        ("license: \xff\xfe", {}),  # not UTF-8
    ],
)
def test_licence_and_language_of_the_base_model_stay(out, tmp_path, front_matter, inherited):
    folder = save_model(tmp_path / "base", llama_config(4))
    card = f"---\n{front_matter}\n---\n# Base\n---\nlicense: mit\n---\n"
    (folder / "README.md").write_text(card, encoding="latin-1")
    out.apply(folder, "--blocks 1")
    assert out.data.to_dict() == PLAIN | inherited


def test_a_gguf_file_says_its_licence_and_languages_too(out, tmp_path):
    out.apply(write_llama_gguf(tmp_path / "tiny.gguf"), "--blocks 1")
    assert (out.data.license, out.data.language) == ("apache-2.0", ["en", "no"])


@pytest.fixture
def measured(llama_plan, text_file):
    """A plan with what was measured of it kept beside it: on a local text, a data set, two tasks,
    three workloads.
    """
    plan = read_plan(llama_plan)
    evaluation = make_evaluation(
        plan, texts=(str(text_file), "wikitext2", "org/words:plain:test"), every=1
    )
    evaluation = evaluation.model_copy(
        update={"lm_eval": (str(text_file.parent / "lm-eval.json"),)}
    )
    benchmark = make_benchmark(plan, every=1)
    for result in (evaluation, benchmark):
        keep_result(result, {}, results_folder(llama_plan), ignore)
    return llama_plan, evaluation, benchmark


@pytest.mark.parametrize("size", [1, 2])
def test_the_card_shows_what_was_measured_of_this_size(out, measured, size):
    plan, evaluation, benchmark = measured
    out.apply(plan, "--remove", size)
    whole, text = read_plan(plan), evaluation.texts[1]
    task, workload = evaluation.tasks[0], benchmark.workloads[1]
    scores, value, timing = (of.pruned[size - 1] for of in (text, task, workload))
    dense, step = whole.dense.perplexity, whole.steps[size - 1].perplexity
    entries = [*evaluation.texts, *evaluation.tasks, *benchmark.workloads]
    assert len(out.results) == 1 + len(entries)
    assert out.results["perplexity, prose.txt (searched on)"] == [
        format_perplexity(dense),
        format_perplexity(step),
        format_change(step / dense - 1),
    ]
    assert out.results["perplexity, wikitext2"] == [
        format_perplexity(text.dense.perplexity),
        format_perplexity(scores.perplexity),
        format_change(math.expm1(scores.log_ratio)),
    ]
    assert out.results["piqa, acc"] == [
        f"{task.dense.value:.4f}",
        f"{value.value:.4f}",
        f"{value.difference:+.4f}",
    ]
    assert out.results["generation 1x64+32, tokens a second"] == [
        f"{32_000 / workload.dense.e2el_ms.median:,.1f}",
        f"{32_000 / timing.e2el_ms.median:,.1f}",
        f"{timing.speedup:.2f}x",
    ]
    values = [
        (entry.dataset_name, entry.metric_type, entry.metric_value)
        for entry in out.data.eval_results
    ]
    names = ("prose.txt", "wikitext2", "org/words:plain:test")
    assert values == [
        *(
            (name, "perplexity", round(text.pruned[size - 1].perplexity, 4))
            for name, text in zip(names, evaluation.texts, strict=True)
        ),
        *((task.task, "acc", round(task.pruned[size - 1].value, 4)) for task in evaluation.tasks),
    ]
    assert out.data.model_name == f"tiny-llama-sleb-{6 - size}-blocks"
    files = out.folder.rglob("*.[jm][sd]*")
    assert str(out.text_file.parent) not in "".join(path.read_text() for path in files)


def test_a_recovered_checkpoint_claims_no_earlier_number(out, measured, tmp_path):
    out.apply(measured[0], "--recover --no-heal", *calibration(out.text_file, samples=12))
    assert "model-index" not in out.data.to_dict()
    assert "**Recovery**" in out.text
    assert "**Results**" not in out.text
    assert not results_folder(out.folder / "sleb_plan.json").exists()
    recovered = measured[1].model_copy(update={"recovered": "weights"})
    keep_result(recovered, {}, results_folder(out.folder / "sleb_plan.json"), ignore)
    moved = shutil.copytree(out.folder, tmp_path / "recovered")
    # Nor does one without these values, nor another model of the same plan.
    out.apply(moved / "sleb_plan.json", "--model", read_plan(measured[0]).model.id, "--force")
    assert "model-index" not in out.data.to_dict()
    out.apply(
        measured[0],
        "--model",
        save_model(tmp_path / "other", llama_config(), seed=1),
        "--any-model --force",
    )
    assert "model-index" not in out.data.to_dict()
    assert "Found by greedy search of another model" in out.text
    assert "**Results**" not in out.text
    assert "At the end of the search" not in out.text


def test_no_file_names_a_folder_of_this_machine(out, sleb, search, tmp_path, text_file):
    folder = save_model(tmp_path / "own" / "model", llama_config(4))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "_name_or_path": str(tmp_path / "base"),
        "vision_config": {"_name_or_path": "org/eyes"},
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"text": {"_name_or_path": f"{tmp_path}/base/"}})
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"name_or_path": str(tmp_path / "base")})
    )
    (folder / "results.json").write_text(json.dumps({"sleb_version": "1", "model": str(folder)}))
    # An earlier version put aside what it could not read.
    for name in ("plan.eval.json.old", "plan.eval.2.json.old", "sleb_plan.bench.json"):
        (folder / name).write_text(json.dumps({"model": str(folder)}))
    (folder / "adapter_config.json").write_text("{}")
    search("--remove 1", model=folder, text=f"{text_file}:2/3,self:1/3", samples=6)
    out.apply("plan.json", "--recover --no-heal", *calibration(text_file, samples=10))
    files = {path.name: path.read_bytes() for path in out.folder.iterdir()}
    assert "adapter_config.json" not in files
    places = [
        str(place).encode()
        for place in (tmp_path.parent, text_file.parent, os.environ["SLEB_CACHE"])
    ]
    assert [
        name for name, content in files.items() if any(place in content for place in places)
    ] == []
    written = json.loads(files["config.json"])
    assert (written["_name_or_path"], written["text"]["_name_or_path"]) == ("base", "base")
    assert written["vision_config"]["_name_or_path"] == "org/eyes"
    assert json.loads(files["tokenizer_config.json"]) == tokenizer | {"name_or_path": "base"}
    plan = read_plan(out.folder / "sleb_plan.json")
    assert (plan.model.id, plan.calibration.source) == ("model", "prose.txt:2/3,self:1/3")
    # It is still a plan for that model, wherever that is, and nobody looks for "model" on the Hub.
    told = sleb("apply", "out/sleb_plan.json", "-o again", code=3).stderr
    assert "was made for model, and does not say where that is" in told

"""lm-eval's own command on a plan and on what `apply` writes, beside `sleb eval` on the same items."""

import json
import os
import random
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from conftest import prose, random_model, train_tokenizer, write_task
from families import tiny_config
from sleb_cli.engine.model.source import locate_model
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_model import LoadedModel, SlebLM
from sleb_cli.engine.quality.tasks import load_requested
from sleb_cli.engine.surgery.loading import load_tokenizer
from sleb_cli.events import ignore
from sleb_cli.lm_eval import main
from sleb_cli.requests import EvalRequest
from sleb_plugins import PlanError, UsageError

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 8


@pytest.fixture
def folder(tmp_path):
    words = [line.split() for line in prose(ITEMS).replace("\n", " ").split(". ")]
    rows = [{"q": " ".join(line[:3]), "choices": [f" {line[3]}", " mill"], "gold": 0} for line in words]
    return write_task(tmp_path / "tasks", "own_words", rows, target_delimiter="").parent


def run_lm_eval(program, model, args, folder, out):
    """Return the results and samples that lm-eval's command writes."""
    options = ["--tasks", "own_words", "--include_path", folder, "--output_path", out / "r.json", "--log_samples"]
    command = map(str, [*program, "run", "--model", model, "--model_args", args, "--device", "cpu", *options])
    subprocess.run(list(command), env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    (results,), (samples,) = (list(out.glob(f"{name}_*")) for name in ("r", "samples"))
    return json.loads(results.read_text()), list(map(json.loads, samples.read_text().splitlines()))


def items_of(samples):
    """What identifies the items and their scores; likelihoods are text in lm-eval's files."""
    hashes = [[sample[f"{part}_hash"] for part in ("doc", "prompt", "target")] for sample in samples]
    scores = [float(likelihood) for sample in samples for likelihood, _ in sample["filtered_resps"]]
    return [sample["doc_id"] for sample in samples], hashes, [sample["acc"] for sample in samples], scores


@pytest.mark.slow
def test_lm_evals_own_command_agrees_with_ours_item_by_item(run_sleb, llama_plan, folder, tmp_path):
    assert run_sleb("apply", llama_plan, "-o", "applied", "-q").exit_code == 0
    (ours,) = load_requested(EvalRequest(None, tasks=("own_words",), include_path=folder, batch_size=1))
    model = SlebLM(plan=str(llama_plan), device="cpu")
    results = ours.run(model.model, model.tokenizer)
    doc_ids, hashes, right, scores = items_of(results["samples"]["own_words"])
    assert (doc_ids, sum(right) > 0) == (list(range(ITEMS)), True)
    lm_eval = [sys.executable, "-m", "lm_eval"]
    ways = {
        "hf": (lm_eval, f"pretrained={tmp_path / 'applied'},dtype=float32"),
        "sleb": ([sys.executable, "-m", "sleb_cli.lm_eval"], f"plan={llama_plan}"),
    }
    for name, (program, args) in ways.items():
        (tmp_path / name).mkdir()
        told, samples = run_lm_eval(program, name, args, folder, tmp_path / name)
        assert told["results"]["own_words"]["acc,none"] == results["results"]["own_words"]["acc,none"]
        found = items_of(samples)
        assert found[:3] == (doc_ids, hashes, right)
        assert found[3] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba"])
def test_texts_that_have_ended_leave_the_others_as_lm_eval_writes_them(monkeypatch, model_type):
    model, tokenizer, runs = random_model(tiny_config(model_type)), train_tokenizer(bos=True), []
    model.generation_config.eos_token_id = [1, *range(40, 52)]
    draws, noise = random.Random(0), torch.randn(320, 320, generator=torch.Generator().manual_seed(0))
    options = {"max_gen_toks": 24, "until": [" r", "e ", "\n"]}
    asked = [Instance("generate_until", {}, (prose(3)[: draws.randint(5, 50)], options), at) for at in range(8)]
    generate = model.generate

    # The next token depends on the model and on the last one.
    def watched(input_ids, **given):
        runs.append(len(input_ids))
        return generate(input_ids, logits_processor=[lambda ids, scores: scores + noise[ids[:, -1]]], **given)

    monkeypatch.setattr(model, "generate", watched)
    written = LoadedModel(model, tokenizer, 8, ("task", "dense"), ignore, ProcessGroup()).generate_until(asked)
    assert runs[0] == 8 > max(runs[1:])
    assert 0 < sum(answer.ended for answer in written) < 8
    assert written == HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(asked)


def test_sizes_and_blocks(llama_plan, tiny_llama):
    whole, first = SlebLM(plan=str(llama_plan)), SlebLM(plan=str(llama_plan), remove=1)
    dense, cut = SlebLM(model=str(tiny_llama)), SlebLM(model=str(tiny_llama), blocks="3+1", batch_size=4)
    assert [lm.config.num_hidden_layers for lm in (whole, first, dense, cut)] == [4, 5, 6, 4]
    assert SlebLM(model=str(tiny_llama), blocks=2).config.num_hidden_layers == 5
    assert cut.batch_size == 4
    assert cut.tok_encode("river") == load_tokenizer(locate_model(str(tiny_llama), ignore))("river").input_ids
    # What lm-eval asks for by default, on a machine without it.
    assert SlebLM(model=str(tiny_llama), device="cuda:0").device.type in ("cpu", "cuda")


def test_lm_eval_finds_it_by_its_name():
    (entry,) = entry_points(group="lm_eval.models", name="sleb")
    assert entry.load() is SlebLM


def test_errors_of_the_command_are_ours(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: SlebLM(plan="gone.json"))
    assert main() == PlanError.exit_code
    assert "error: " in capsys.readouterr().err
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: SlebLM(model=str(tiny_llama), blocks="a+b"))
    assert main() == UsageError.exit_code
    assert "blocks=a+b is not a list of numbers" in capsys.readouterr().err

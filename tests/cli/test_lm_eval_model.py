"""The model that lm-eval asks, beside lm-eval's own."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from conftest import as_typed, prose, random_model, train_tokenizer, write_task
from families import tiny_config
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.lm_eval_model import LmEvalModel
from sleb_cli.events import TaskAdvanced

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 8


@pytest.fixture
def folder(tmp_path):
    words = [line.split() for line in prose(ITEMS).replace("\n", " ").split(". ")]
    rows = [
        {"q": " ".join(line[:3]), "choices": [f" {line[3]}", " mill"], "gold": 0} for line in words
    ]
    return write_task(tmp_path / "tasks", "own_words", rows, target_delimiter="").parent


@pytest.mark.slow
def test_lm_evals_own_command_agrees_with_ours_item_by_item(sleb, llama_plan, folder, tmp_path):
    sleb("apply", llama_plan, "-o applied -q")
    asked = ["--tasks own_words --include-path", folder, "--batch-size 1 -o ours.json -q"]
    sleb("eval", llama_plan, *asked)
    (ours,) = json.loads((tmp_path / "ours.json").read_text())["tasks"]
    out = tmp_path / "theirs"
    options = ["--tasks own_words --include_path", folder]
    options += ["--output_path", out / "r.json", "--log_samples"]
    args = f"pretrained={tmp_path / 'applied'},dtype=float32"
    command = ["-m lm_eval run --model hf --model_args", args, "--device cpu"]
    subprocess.run([sys.executable, *as_typed([*command, *options])], check=True)
    (results,), (samples,) = (list(out.glob(f"{name}_*")) for name in ("r", "samples"))
    theirs = list(map(json.loads, samples.read_text().splitlines()))
    assert [sample["acc"] for sample in theirs] == ours["pruned"][0]["items"]
    assert [sample["doc_id"] for sample in theirs] == ours["doc_ids"]
    assert json.loads(results.read_text())["task_hashes"]["own_words"] == ours["items_sha256"]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba"])
def test_generations_are_lm_evals_when_some_of_a_batch_end_early(monkeypatch, model_type):
    model, tokenizer, runs = random_model(tiny_config(model_type)), train_tokenizer(bos=True), []
    model.generation_config.eos_token_id = [1, *range(40, 52)]
    draws, noise = (
        random.Random(0),
        torch.randn(320, 320, generator=torch.Generator().manual_seed(0)),
    )
    options = {"max_gen_toks": 24, "until": [" r", "e ", "\n"]}
    asked = [
        Instance("generate_until", {}, (prose(3)[: draws.randint(5, 50)], options), at)
        for at in range(8)
    ]
    generate = model.generate

    # The next token depends on the model and on the last one.
    def watched(input_ids, **given):
        runs.append(len(input_ids))
        return generate(
            input_ids, logits_processor=[lambda ids, scores: scores + noise[ids[:, -1]]], **given
        )

    monkeypatch.setattr(model, "generate", watched)
    events = []
    written = LmEvalModel(
        model, tokenizer, 8, ("task", "dense"), events.append, ProcessGroup()
    ).generate_until(asked)
    advances = [event.done for event in events if isinstance(event, TaskAdvanced)]
    # The bar moves with each token, and on when an answer ends.
    assert sum(advances) == pytest.approx(8)
    assert len(advances) > 20
    assert min(advances) >= 0
    assert max(advances) > 2 * 8 / 24
    assert runs[0] == 8 > max(runs[1:])
    assert 0 < sum(answer.ended for answer in written) < 8
    assert written == HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(
        asked
    )

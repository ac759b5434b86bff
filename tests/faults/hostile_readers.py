"""What reads one hostile file, in a process that imports no tests: see `hostile_reading.read_all`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch


def read_gguf_file(path: Path, own: Path) -> None:
    """Read a GGUF file, plan a removal, and write the pruned file."""
    from sleb_cli.engine.gguf.file import gguf_size, read_gguf, write_gguf
    from sleb_cli.engine.gguf.llama_cpp import holds_model_type
    from sleb_cli.engine.gguf.surgery import block_count, plan_gguf_surgery

    file = read_gguf(path)
    holds_model_type(file.architecture, "llama")
    pruned = plan_gguf_surgery(file, (1,)).pruned()
    block_count(pruned)
    if gguf_size(pruned) < 1 << 24:
        write_gguf(pruned, own / "pruned.gguf", lambda count: None)
        assert gguf_size(pruned) == (own / "pruned.gguf").stat().st_size
        again = read_gguf(own / "pruned.gguf")
        assert again.entries == pruned.entries


def _summary(plan: Path) -> None:
    from sleb_cli.api import export
    from sleb_cli.requests import ExportRequest
    from sleb_cli.ui.export import show_exported

    show_exported(export(ExportRequest(str(plan), to="summary")), None)


def read_plan_file(path: Path, own: Path) -> None:
    """Read a plan, and show it as the screen and exporters do."""
    from sleb_cli.plan import read_plan
    from sleb_cli.ui.search import show_plan

    plan = read_plan(path)
    plan.published().write(own / "plan.json")
    for count in range(1, len(plan.steps) + 1):
        plan.first(count)
    if plan.steps:
        show_plan(plan, own / "plan.json")
    _summary(path)


def _read_results(path: Path, own: Path, kind: Any) -> None:
    from sleb_cli.events import ignore
    from sleb_cli.kept_results import beside_plan, keep_result, read_kept

    whole = path.parent / f"whole.{kind}"
    plan, record = own / "plan.json", _RECORDS()[kind]
    shutil.copy(path.parent / "plan", plan)
    shutil.copy(path, beside_plan(plan, kind))
    _summary(plan)
    read_kept(record, beside_plan(plan, kind), ignore)
    keep_result(record.model_validate_json(whole.read_text()), beside_plan(plan, kind), ignore)
    _summary(plan)


def _RECORDS() -> dict[str, Any]:  # noqa: N802
    from sleb_cli.results import BenchResult, EvalResult

    return {"eval": EvalResult, "bench": BenchResult}


def read_evaluation(path: Path, own: Path) -> None:
    """Summarise a plan with these results of `sleb eval` beside it, and add others to them."""
    _read_results(path, own, "eval")


def read_benchmark(path: Path, own: Path) -> None:
    """Summarise a plan with these results of `sleb bench` beside it, and add others to them."""
    _read_results(path, own, "bench")


SEARCH = {"model": {"fingerprint": "abc"}, "search": {"metric": "nll", "seed": 0}}
JOURNAL = {"format": 1} | SEARCH


def read_journal(path: Path, own: Path) -> None:
    """Continue a journal, and then what was added to it."""
    from sleb_cli.engine.search.journal import open_journal

    with open_journal(path, SEARCH, resume=True) as journal:
        known = dict(journal._known)
        assert all(isinstance(score, int | float) for scores in known.values() for score in scores)
        sum(score for scores in known.values() for score in scores)
        journal.add([1.0], [1], 2, 3)
    with open_journal(path, SEARCH, resume=True) as again:
        assert again._known == known | {((1,), 2, 3): [1.0]}


IDENTITY = {"model": "abc", "removals": [2, 3]}
HEALING = {"format": 3} | IDENTITY


def read_healing(path: Path, own: Path) -> None:
    """Read the state of a healing."""
    from sleb_cli.engine.recovery.heal import _progress_of
    from sleb_cli.engine.recovery.unfinished import Unfinished

    state = Unfinished(own / "out")
    state.folder.mkdir(exist_ok=True)
    shutil.copy(path, state.folder / "healing.safetensors")
    saved = state.read(IDENTITY)
    assert saved
    _progress_of(saved)
    saved.tensor("best", (8,), torch.float32)
    saved.tensor("deciding", (None, 4), torch.int64)


WALK = {"format": "1", "identity": "abc", "removed": json.dumps([2])}


def read_walk(path: Path, own: Path) -> None:
    """Restore a saved walk: what does not fit is left out."""
    from collections import defaultdict

    from sleb_cli.engine.forward.saved_walk import SavedWalk
    from sleb_cli.engine.forward.states import States

    place = own / "plan.json.journal.walk.0"
    shutil.copy(path, place)
    states: defaultdict[tuple[int, int], States] = defaultdict(States)
    SavedWalk(place, "abc").restore([2], states, {(0, 0): (2, 4, 8)}, {torch.float32})
    for key, found in states.items():
        assert key == (0, 0)
        for branches in found.at.values():
            assert all(hidden.shape == (2, 4, 8) and hidden.dtype == torch.float32 for hidden in branches.values())


def read_text(path: Path, own: Path) -> None:
    """Cut a text into windows, to calibrate and to evaluate on."""
    from transformers import AutoTokenizer

    from sleb_cli.engine.text.sources import TextSplit, calibration_text, evaluation_text
    from sleb_cli.engine.text.windows import cut_for_evaluation, cut_windows, require_windows

    tokenizer = AutoTokenizer.from_pretrained(path.parent / "model")
    for split in (TextSplit(), TextSplit(0.7, 0.9)):
        text = calibration_text(str(path), tokens=100, seed=0, split=split)
        require_windows(cut_windows(tokenizer, text.content, 4, bos=False), text, tokenizer, 4)
    cut_for_evaluation(tokenizer, evaluation_text(str(path)), 4, stride=2)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def read_conversations(path: Path, own: Path) -> None:
    """Cut conversations into sequences with a loss mask."""
    from transformers import AutoTokenizer

    from sleb_cli.engine.text.chat import cut_conversations
    from sleb_cli.engine.text.sources import calibration_conversations

    tokenizer = AutoTokenizer.from_pretrained(path.parent / "model")
    tokenizer.chat_template = TEMPLATE
    found = calibration_conversations(str(path), tokens=100, seed=0)
    for answers in (True, False):
        cut_conversations(tokenizer, found, 128, answers=answers, asked=None)

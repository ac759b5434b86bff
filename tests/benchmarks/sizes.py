"""What it takes to measure several sizes together, beside plain transformers and lm-eval on one
after the other.

    python tests/benchmarks/sizes.py PLAN TEXT [--every 2] [--windows 16] [--tasks NAME
    --include-path TASKS]

All models are loaded beforehand, and share weights. Plain transformers sums up the loss alone; sleb
adds how far each model diverges from the dense one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import parser
from torch.nn.functional import cross_entropy

from sleb_cli.checks.verbs import check_evaluation
from sleb_cli.engine.door.evaluate import resolve_evaluation
from sleb_cli.engine.door.files import locate_pair
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.engine.quality.evaluation import Evaluation, evaluate_models
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.events import ignore
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.requests import EvalRequest


def main() -> None:
    options = parser(
        __doc__,
        "plan",
        "text",
        every=2,
        windows=16,
        length=512,
        tasks="",
        include_path="",
        limit=100,
    ).parse_args()
    request = EvalRequest(
        options.plan,
        perplexity=(options.text,),
        every=options.every,
        max_windows=options.windows,
        sequence_length=options.length,
        tasks=tuple(filter(None, options.tasks.split(","))),
        include_path=Path(options.include_path) if options.include_path else None,
        limit=options.limit if options.tasks else None,
    )
    plugins = load_plugins()
    named = check_evaluation(request, plugins)
    asked = resolve_evaluation(
        request, named, locate_pair(named, ignore), plugins, ignore, ProcessGroup()
    )
    models = [asked.models.without(size).model for size in [(), *asked.models.sizes]]
    print(f"{len(models)} models, without {', '.join(map(str, asked.models.sizes))}")
    report(
        options.text,
        lambda: measure(asked, tasks=()),
        lambda: plain_losses(models, asked.texts[0].ids),
    )
    for task in asked.tasks:
        report(
            task.name,
            lambda task=task: measure(asked, tasks=(task,), texts=()),
            lambda task=task: run(task, models, asked),
        )


def report(what: str, together: Callable[[], Any], plain: Callable[[], Any]) -> None:
    seconds = [seconds_of(do) for do in (plain, together)]
    print(
        f"{what}: one after the other {seconds[0]:.1f} s, together {seconds[1]:.1f} s, "
        f"{seconds[1] / seconds[0]:.2f}x"
    )


def seconds_of(do: Callable[[], Any]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def measure(asked: Evaluation, **what: Any) -> None:
    evaluate_models(replace(asked, **what, force=True), None)


@torch.inference_mode()
def plain_losses(models: list[Any], windows: torch.Tensor) -> list[float]:
    return [
        sum(
            float(cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]))
            for ids in windows
        )
        for model in models
    ]


def run(task: LoadedTask, models: list[Any], asked: Evaluation) -> None:
    for model in models:
        task.run(model, asked.tokenizer, "plain", ignore, ProcessGroup())


if __name__ == "__main__":
    main()

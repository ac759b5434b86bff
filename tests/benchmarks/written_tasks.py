"""How much faster `sleb eval` is where the model writes answers than lm-eval, which runs a batch until all have ended.

    python tests/benchmarks/written_tasks.py MODEL [--tasks sleb_lists,sleb_instructions] [--limit 64]
        [--include-path FOLDER] [--apply-chat-template] [--run-code]

Both take the same batches on the same model, lm-eval first and last. Prints a row for each task.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from operator import eq
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM
from saved_work import architecture_of, markdown, parser, say
from torch import Tensor

from sleb_cli.engine.device import CPU
from sleb_cli.engine.door.evaluate import load_requested
from sleb_cli.engine.forward.placement import place_model
from sleb_cli.engine.quality.lm_eval_model import LoadedModel
from sleb_cli.engine.quality.lm_eval_tasks import LoadedTask
from sleb_cli.engine.surgery.loading import load_dense, load_tokenizer, quiet_libraries
from sleb_cli.events import ignore
from sleb_cli.requests import AUTO, EvalRequest


def plain(self: LoadedModel, ids: Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
    """Write as lm-eval does."""
    whole = HFLM._model_generate(self, ids, max_length, stop, **options)
    return self._remember_ended(ids, list(whole[:, ids.shape[1] :]))


def timed(task: LoadedTask, model: Any, tokenizer: Any, *, ours: bool) -> tuple[float, list[str]]:
    """Return how long a task takes, and the answers."""
    with nullcontext() if ours else mock.patch.object(LoadedModel, "_model_generate", plain):
        began = time.perf_counter()
        (samples,) = task.run(model, tokenizer)["samples"].values()
        return time.perf_counter() - began, [sample["resps"][0][0] for sample in samples]


def main() -> None:
    flags = {"apply_chat_template": False, "run_code": False, "include_path": Path}
    options = parser(__doc__, "model", tasks=["sleb_lists", "sleb_instructions"], limit=64, **flags).parse_args()
    quiet_libraries()
    architecture = architecture_of(options.model)
    dtype = place_model(architecture, CPU, AUTO, ignore, stream=False).dtype
    model, tokenizer = load_dense(architecture, dtype, CPU, ignore), load_tokenizer(architecture.source)
    rows = []
    given = {name: getattr(options, name) for name in (*flags, "limit")}
    for task in load_requested(EvalRequest(None, tasks=tuple(options.tasks), **given)):
        runs = [(ours, *timed(task, model, tokenizer, ours=ours)) for ours in (False, True, True, False)]
        slow, fast = (
            statistics.fmean(seconds for which, seconds, _ in runs if which == side) for side in (False, True)
        )
        (*_, theirs), (*_, answers) = runs[:2]
        same = f"{sum(map(eq, theirs, answers))} of {len(answers)}"
        rows.append([task.name, f"{slow:.0f} s", f"{fast:.0f} s", f"{slow / fast:.1f}x", same])
    say(markdown(["task", "lm-eval", "sleb", "ratio", "the same answers"], rows))
    say(f"{options.model}, {dtype}")


if __name__ == "__main__":
    main()

"""Files for inference engines that are timed: the model as it is, and without blocks, in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

from sleb_cli.atomic import clear, scratch_folder
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.model.demo import demo_gguf
from sleb_cli.engine.model.source import DEMO
from sleb_cli.engine.output.apply import apply_removals
from sleb_cli.engine.output.apply_gguf import prune_gguf, require_same_kind_of_model
from sleb_cli.engine.output.delivery import Delivery
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify
from sleb_cli.plugin_manager import Registry
from sleb_cli.requests import BenchRequest
from sleb_plugins import Engine, UsageError


@contextmanager
def engine_files(
    subject: Subject, engine: Engine, request: BenchRequest, registry: Registry, notify: Notify
) -> Iterator[Callable[[Surgery], Path]]:
    """Yield a function that returns what the engine reads: the model's own file or folder, or a pruned one.

    Raises:
        UsageError: the engine reads GGUF files, but none of this model is known; or `request.source` does not apply.
        PlanError: `request.source` holds another model.
    """
    is_checkpoint, own = engine.reads == "checkpoint", engine_source(subject, engine, request, notify)
    with scratch_folder(Path(gettempdir()), "sleb-bench") as folder:

        def write(surgery: Surgery) -> Path:
            if not surgery.removals:
                return own
            clear(folder)  # the last one has been timed, since pruned models take turns
            name = f"{len(surgery.removals)}-blocks-fewer"
            to = Delivery(folder / (name if is_checkpoint else f"{name}.gguf"), verify=False)
            if is_checkpoint:
                apply_removals(Subject(surgery, None), to, notify)
            else:
                prune_gguf(read_gguf(own), surgery.removals, to, registry, notify)
            return to.place

        yield write


def engine_source(subject: Subject, engine: Engine, request: BenchRequest, notify: Notify) -> Path:
    """Return the model's own file or folder that an engine reads.

    Raises:
        UsageError: the engine reads GGUF files, but none of this model is known; or `request.source` does not apply.
        PlanError: `request.source` holds another model.
    """
    if engine.reads == "checkpoint":
        if request.source is not None:
            raise UsageError(f"--source does not apply to --engine {engine.name}.", hint="Leave out --source.")
        return subject.architecture.source.folder
    model = subject.architecture.record
    if request.source is not None:
        if not request.any_model:
            require_same_kind_of_model(model, read_gguf(request.source), notify)
        return request.source
    if model.id == DEMO:
        return demo_gguf(notify)
    if model.id.endswith(".gguf"):
        return Path(model.id)
    raise UsageError(
        f"{engine.name} reads GGUF files, but {model.id} is a checkpoint.",
        hint="Name a GGUF file of the model with --source; llama.cpp's convert_hf_to_gguf.py makes one.",
    )

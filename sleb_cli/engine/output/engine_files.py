"""The files that timed engines read: the model's own, or a pruned copy in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

from sleb_cli.atomic import clear, scratch_folder
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.output.apply_gguf import prune_gguf
from sleb_cli.engine.output.checkpoint import Output, apply_removals
from sleb_cli.engine.surgery.gguf_surgery import plan_gguf_surgery
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify
from sleb_cli.plugin_manager import Registry


@contextmanager
def engine_files(
    dense: Path, registry: Registry, notify: Notify
) -> Iterator[Callable[[Surgery], Path]]:
    """Yield a function that returns the file or folder of a model.

    A pruned model is written first.
    """
    with scratch_folder(Path(gettempdir()), "sleb-bench") as folder:

        def write(surgery: Surgery) -> Path:
            if not surgery.cuts:
                return dense
            clear(folder)  # pruned models take turns: the last one has been timed
            folder.mkdir()
            what = "fewer" if surgery.other_cuts else "blocks-fewer"
            name = f"{len(surgery.size_key)}-{what}"
            if dense.is_dir():
                path = folder / name
                apply_removals(Subject(surgery, None), Output(path, verify=False), notify)
            else:
                path = folder / f"{name}.gguf"
                file = read_gguf(dense)
                cuts = plan_gguf_surgery(file, surgery.removals, surgery.other_cuts)
                prune_gguf(cuts, Output(path, verify=False), registry, notify)
            return path

        yield write

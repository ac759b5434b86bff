"""`sleb export`: the removals as another tool writes them."""

from __future__ import annotations

from sleb_cli.engine.loading import dtype_name
from sleb_cli.engine.source import DEMO
from sleb_cli.engine.subject import Subject
from sleb_plugins import Pruning, UsageError


def describe_pruning(subject: Subject) -> Pruning:
    """Describe the subject as exporters take it.

    Raises:
        UsageError: no block is to go.
    """
    architecture = subject.architecture
    if not subject.surgery.removals:
        raise UsageError("There is nothing to export: no block is removed.", hint="Name a plan, or give --blocks.")
    source = architecture.source
    # Other tools know neither "demo" nor our cache of converted GGUF files: they get the folder.
    in_cache = source.id == DEMO or source.id.endswith(".gguf")
    return Pruning(
        model=str(source.folder) if in_cache else source.id,
        revision=source.revision,
        dtype=dtype_name(architecture.config.dtype) if architecture.config.dtype else "float32",
        blocks=architecture.block_count,
        removals=subject.surgery.removals,
    )

"""Load the models of a benchmark with transformers, or into another inference engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.forward.ending import ending_of
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.speed.transformers_model import TransformersModel, prepared, weights_bytes
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify, task
from sleb_cli.results import ModelSize, Workload
from sleb_plugins import Engine, EngineSettings, LoadedModel

WriteFiles = Callable[[Surgery], Path]
"""Write the files that the engine reads of the model after a surgery; without one, return the
model's own.
"""


@dataclass(frozen=True)
class TimedModel:
    """A loaded model, and `prepare`, which makes it ready to run a workload."""

    model: Any
    size: ModelSize
    dtype: str
    device: str
    prepare: Callable[[Workload], AbstractContextManager[TransformersModel | LoadedModel]]
    attention: str | None = None


ModelLoader = Callable[[Surgery, TimedModel | None], AbstractContextManager[TimedModel]]
"""Load the model after a surgery, and free it at the end.

The dense one comes first, and is passed for the others.
"""


@contextmanager
def load_with_transformers(
    placement: Placement, notify: Notify, surgery: Surgery, dense: TimedModel | None
) -> Iterator[TimedModel]:
    """Load a model with transformers; pruned ones share its weights unless quantized."""
    if dense:
        model = load_pruned(surgery, placement, notify, dense=dense.model)
    else:
        model = open_model(surgery.architecture, placement, notify).model
    yield TimedModel(
        model,
        _size(surgery, weights_bytes(model)),
        dtype_name(placement.dtype),
        placement.device.type,
        partial(prepared, model, ending_of(surgery.architecture, placement.device)),
        getattr(model.config.get_text_config(), "_attn_implementation", None),
    )


@contextmanager
def load_with_engine(
    engine: Engine,
    write_files: WriteFiles,
    settings: EngineSettings,
    notify: Notify,
    surgery: Surgery,
    dense: TimedModel | None,
) -> Iterator[TimedModel]:
    """Load a model from files into an engine."""
    files = write_files(surgery)
    without = f" without {surgery.description}" if surgery.cuts else ""
    with task(notify, f"Loading {surgery.architecture.source.id}{without} into {engine.name}"):
        start = time.perf_counter()
        model = engine.load(files, settings)
        seconds = time.perf_counter() - start
    with closing(model):
        if files.is_dir():
            dtype = settings.dtype
            stored = sum(tensor.size for tensor in find_weights(files).stored)
        else:
            by_type: Counter[str] = Counter()
            for tensor in read_gguf(files).tensors:
                by_type[gguf.GGMLQuantizationType(tensor.type).name] += tensor.size
            dtype = by_type.most_common(1)[0][0]  # of most bytes, such as "Q4_1"
            stored = by_type.total()
        size = _size(surgery, stored, seconds)
        yield TimedModel(model, size, dtype, model.device, lambda workload: nullcontext(model))


def _size(surgery: Surgery, stored: int, load_seconds: float | None = None) -> ModelSize:
    # The parameters are counted without weights, since packed ones have other shapes.
    architecture = surgery.architecture
    unpacked = architecture.skeleton
    if surgery.cuts:
        unpacked = architecture.build(architecture.read_config(surgery.prune_config()))
    return ModelSize(
        removals=surgery.size_key,
        blocks=len(surgery.kept.blocks),
        parameters=sum(tensor.numel() for tensor in unpacked.parameters()),
        weights_bytes=stored,
        load_seconds=load_seconds,
    )

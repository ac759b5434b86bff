"""What runs the models of a benchmark: transformers, or another inference engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from sleb_cli.engine.device import dtype_name
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.speed.energy import Meter, find_meter
from sleb_cli.engine.speed.timing import Run
from sleb_cli.engine.speed.transformers_model import TransformersModel, as_timed, weights_bytes
from sleb_cli.engine.surgery.loading import load_dense, load_pruned
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notice, Notify, task
from sleb_cli.results import ModelSize, Workload
from sleb_plugins import Engine, EngineSettings, MachineError

WriteFiles = Callable[[Surgery], Path]
"""Write what the engine reads of the model after a surgery; without removals, return the model's own files."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be timed; `run` returns how it runs a workload."""

    size: ModelSize
    run: Callable[[Workload], Run]


class Runner(ABC):
    """Loads models, the dense one first.

    Attributes:
        dtype: the data type of the models.
        device: the kind of device they run on.
        version: the engine and its version.
        attention: the implementation of attention, if known.
        meter: what measures their energy, if anything does.
        in_pairs: only two models fit at once.
    """

    dtype: str
    device: str
    version: str | None
    attention: str | None = None
    meter: Meter | None = None
    in_pairs: bool

    @abstractmethod
    def load(self, surgery: Surgery) -> AbstractContextManager[Loaded]:
        """Load the model after this surgery, and free it at the end."""

    def timing(self, workload: Workload) -> AbstractContextManager[None]:
        """Prepare the loaded models for being timed."""
        return nullcontext()


class TransformersRunner(Runner):
    """Runs models with transformers; the pruned ones share the dense one's weights, unless they are quantized."""

    version = transformers.__version__

    def __init__(self, dtype: torch.dtype, device: torch.device, notify: Notify, *, in_pairs: bool) -> None:
        self.dtype, self.device, self.in_pairs = dtype_name(dtype), device.type, in_pairs
        self._where, self._notify = (dtype, device), notify
        self._models: list[Any] = []
        try:
            self.meter = find_meter(device)
        except MachineError as error:
            notify(Notice(error.message))

    @contextmanager
    def load(self, surgery: Surgery) -> Iterator[Loaded]:
        """Load the model with transformers."""
        if surgery.removals:
            model = load_pruned(surgery, *self._where, self._notify, dense=self._models[0])
        else:
            model = load_dense(surgery.architecture, *self._where, self._notify)
            self.attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
        self._models.append(model)
        try:
            yield Loaded(_size(surgery, weights_bytes(model)), lambda workload: TransformersModel(model, workload).run)
        finally:
            self._models.remove(model)

    def timing(self, workload: Workload) -> AbstractContextManager[None]:
        """Prepare the models as transformers loads them."""
        return as_timed(self._models, workload)


class EngineRunner(Runner):
    """Runs models in another engine, from files."""

    in_pairs = True

    def __init__(self, engine: Engine, write_files: WriteFiles, settings: EngineSettings, notify: Notify) -> None:
        self.dtype, self.version = settings.dtype, engine.version() or None
        self._engine, self._write_files, self._settings, self._notify = engine, write_files, settings, notify

    @contextmanager
    def load(self, surgery: Surgery) -> Iterator[Loaded]:
        """Load the model from files into the engine."""
        files = self._write_files(surgery)
        without = f" without {len(surgery.removals)} blocks" if surgery.removals else ""
        with task(self._notify, f"Loading {surgery.architecture.source.id}{without} into {self._engine.name}"):
            start = time.perf_counter()
            model = self._engine.load(files, self._settings)
            seconds = time.perf_counter() - start
        self.device = model.device
        tensors = find_weights(files).stored if files.is_dir() else read_gguf(files).tensors
        if not files.is_dir() and not surgery.removals:
            self.dtype = _gguf_dtype(files)
        size = _size(surgery, sum(tensor.size for tensor in tensors), seconds)
        try:
            yield Loaded(size, lambda workload: model.run)
        finally:
            model.close()


def engine_settings(workloads: Sequence[Workload], dtype: torch.dtype, *, models: int) -> EngineSettings:
    """Return how an engine loads models for these workloads."""
    return EngineSettings(
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads(),
        batch_size=max(workload.batch_size for workload in workloads),
        sequence_length=max(workload.prompt_length + workload.new_tokens for workload in workloads),
        models=models,
    )


def _gguf_dtype(file: Path) -> str:
    """Return the data type of most weights: "Q4_1"."""
    by_type: dict[str, int] = {}
    for tensor in read_gguf(file).tensors:
        name = gguf.GGMLQuantizationType(tensor.type).name
        by_type[name] = by_type.get(name, 0) + tensor.size
    return max(by_type, key=lambda name: by_type[name])


def _size(surgery: Surgery, stored: int, load_seconds: float | None = None) -> ModelSize:
    """Return the size of a model; packed weights count as the parameters that they stand for."""
    architecture, unpacked = surgery.architecture, surgery.architecture.skeleton
    if surgery.removals:
        unpacked = architecture.build(architecture.read_config(surgery.prune_config()))
    return ModelSize(
        removals=surgery.removals,
        blocks=len(surgery.kept.blocks),
        parameters=sum(tensor.numel() for tensor in unpacked.parameters()),
        weights_bytes=stored,
        load_seconds=load_seconds,
    )

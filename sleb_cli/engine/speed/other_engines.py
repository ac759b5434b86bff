"""`sleb bench --engine NAME`: the dense model and each size of the pruned one in another inference engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
import transformers

from sleb_cli.engine.device import choose_device, choose_dtype, dtype_name
from sleb_cli.engine.environment import cpu_governor, processor_name
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.gguf.file import read_gguf
from sleb_cli.engine.model.sizes import count_parameters
from sleb_cli.engine.speed.benchmark import threads
from sleb_cli.engine.speed.in_turn import measure
from sleb_cli.engine.speed.timings import DENSE, Compared, Facts, workload_result
from sleb_cli.engine.speed.work import Work, count_work
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify, task
from sleb_cli.requests import AUTO, BenchRequest
from sleb_cli.results import BenchResult, ModelSize, Workload
from sleb_cli.version import __version__
from sleb_plugins import Engine, EngineSettings, LoadedModel, UnsupportedModelError, UsageError

WriteFiles = Callable[[Surgery], Path]
"""Write what the engine reads of the model after a surgery; without removals, return the model's own files."""


def benchmark_engine(
    subject: Subject, engine: Engine, write_files: WriteFiles, request: BenchRequest, notify: Notify
) -> BenchResult:
    """Time each workload on the dense model and on each size of the pruned one, in turn with the dense one.

    Raises:
        UsageError: an option does not apply to this engine, or a number is out of range.
        MachineError: the engine is not installed, or does not run here.
    """
    _require_applicable(request, engine)
    architecture, device = subject.architecture, choose_device(AUTO)
    dtype = choose_dtype(request.dtype or AUTO, architecture.dtype, device)
    workloads = [
        workload.model_copy(update={"engine": engine.name})
        for workload in resolve_workloads(request, subject, device, notify)
    ]
    with threads(request.threads):
        settings = _settings(workloads, dtype_name(dtype), in_pairs=bool(subject.surgery.removals))
        timed = _time(subject, _Loader(engine, write_files, settings, notify), workloads, request)
        return BenchResult(
            schema_version=1,
            sleb_version=__version__,
            kind="bench",
            model=architecture.record,
            dtype=timed.dtype or settings.dtype,
            device=timed.device,
            threads=settings.threads,
            processor=processor_name(device),
            governor=cpu_governor(),
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            dense=timed.sizes[0],
            pruned=tuple(timed.sizes[1:]),
            workloads=tuple(
                workload_result(workload, found, _facts(engine, subject, workload, dtype))
                for workload, found in timed.compared.items()
            ),
        )


def _require_applicable(request: BenchRequest, engine: Engine) -> None:
    given = {
        "--device": request.device != AUTO,
        "--compile": request.compile,
        "--static-cache": request.static_cache,
        "--dtype": request.dtype is not None and engine.reads == "gguf",
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise UsageError(f"{option} does not apply to --engine {engine.name}.", hint=f"Leave out {option}.")


def _settings(workloads: Sequence[Workload], dtype: str, *, in_pairs: bool) -> EngineSettings:
    return EngineSettings(
        dtype=dtype,
        threads=torch.get_num_threads(),
        batch_size=max(workload.batch_size for workload in workloads),
        sequence_length=max(workload.prompt_length + workload.new_tokens for workload in workloads),
        models=2 if in_pairs else 1,
    )


@dataclass(frozen=True)
class _Loaded:
    """A model in the engine, the files it was loaded from, and its size."""

    surgery: Surgery
    files: Path
    model: LoadedModel
    size: ModelSize


@dataclass(frozen=True)
class _Loader:
    """Writes files and loads them."""

    engine: Engine
    write_files: WriteFiles
    settings: EngineSettings
    notify: Notify

    @contextmanager
    def load(self, surgery: Surgery) -> Iterator[_Loaded]:
        """Load the model after this surgery, and free it in the end."""
        files, removals = self.write_files(surgery), surgery.removals
        without = f" without {len(removals)} blocks" if removals else ""
        with task(self.notify, f"Loading {surgery.architecture.source.id}{without} into {self.engine.name}"):
            start = time.perf_counter()
            model = self.engine.load(files, self.settings)
            seconds = time.perf_counter() - start
        size = ModelSize(
            removals=removals,
            blocks=len(surgery.kept.blocks),
            parameters=round(count_parameters(surgery.architecture).without(surgery.removed)),
            weights_bytes=_weights_bytes(files),
            load_seconds=seconds,
        )
        try:
            yield _Loaded(surgery, files, model, size)
        finally:
            model.close()


def _weights_bytes(files: Path) -> int:
    tensors = find_weights(files).stored if files.is_dir() else read_gguf(files).tensors
    return sum(tensor.size for tensor in tensors)


def _dtype_in_files(files: Path) -> str | None:
    """Return the data type of most weights in a GGUF file: "Q4_1"; None for a checkpoint."""
    if files.is_dir():
        return None
    by_type: dict[str, int] = {}
    for tensor in read_gguf(files).tensors:
        name = gguf.GGMLQuantizationType(tensor.type).name
        by_type[name] = by_type.get(name, 0) + tensor.size
    return max(by_type, key=lambda name: by_type[name])


@dataclass(frozen=True)
class _Timed:
    """What was timed: the sizes, the dense one first, and what they were compared in; `dtype` is that of a file."""

    dtype: str | None
    device: str
    sizes: list[ModelSize]
    compared: dict[Workload, list[Compared]]


def _time(subject: Subject, loader: _Loader, workloads: Sequence[Workload], request: BenchRequest) -> _Timed:
    """Time each size in turn with the dense model, two models at once; without sizes, the dense model alone."""
    surgeries = subject.sizes(request)
    with loader.load(Surgery(subject.architecture, ())) as dense:
        compared: dict[Workload, list[Compared]] = {workload: [] for workload in workloads}
        timed = _Timed(_dtype_in_files(dense.files), dense.model.device, [dense.size], compared)
        for surgery in surgeries:
            with loader.load(surgery) as pruned:
                timed.sizes.append(pruned.size)
                _compare([dense, pruned], timed.compared, loader.notify)
        if not surgeries:
            _compare([dense], timed.compared, loader.notify)
    return timed


def _compare(models: Sequence[_Loaded], compared: dict[Workload, list[Compared]], notify: Notify) -> None:
    """Time the dense model, the first one, in turn with the other."""
    architecture = models[0].surgery.architecture
    names = [f"{len(one.surgery.removals)} blocks fewer" if one.surgery.removals else DENSE for one in models]
    runs = {name: one.model.run for name, one in zip(names, models, strict=True)}
    removals = {name: one.surgery.removals for name, one in zip(names, models, strict=True) if name != DENSE}
    for workload, found in compared.items():
        measured = measure(runs, workload, architecture.text_config.vocab_size, notify)
        found.append(Compared(measured, removals))


def _facts(engine: Engine, subject: Subject, workload: Workload, dtype: torch.dtype) -> Facts:
    # A GGUF file has its own data types, so the bytes of the checkpoint are not those that are read.
    work = _work(subject, workload, dtype) if engine.reads == "checkpoint" else None
    return Facts(work=work, engine_version=engine.version() or None)


def _work(subject: Subject, workload: Workload, dtype: torch.dtype) -> Work | None:
    try:
        shape = workload.batch_size, workload.prompt_length, workload.new_tokens
        return count_work(subject.architecture, *shape, dtype)
    except UnsupportedModelError:
        return None

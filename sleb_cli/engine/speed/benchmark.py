"""`sleb bench`: measured speed and memory, the dense model and the pruned ones in turn on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers

from sleb_cli.engine.device import choose_device, free_bytes, free_memory
from sleb_cli.engine.door.subject import sizes
from sleb_cli.engine.environment import cpu_governor, processor_name
from sleb_cli.engine.forward.placement import Placement, choose_dtype
from sleb_cli.engine.forward.streaming import weight_bytes
from sleb_cli.engine.speed.peak_memory import measure_alone
from sleb_cli.engine.speed.runners import Load, Loaded, WriteFiles, engine_settings, load_into, load_with_transformers
from sleb_cli.engine.speed.timing import Measured, Removals, Run, measure, model_name, workload_result
from sleb_cli.engine.speed.transformers_model import prepared
from sleb_cli.engine.speed.workloads import resolve_workloads
from sleb_cli.engine.surgery.subject import Subject
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.events import Notify
from sleb_cli.requests import AUTO, BenchRequest
from sleb_cli.results import BenchResult, ModelSize, Workload
from sleb_cli.version import __version__
from sleb_plugins import Engine


def benchmark(
    subject: Subject, request: BenchRequest, notify: Notify, engine: tuple[Engine, WriteFiles] | None = None
) -> BenchResult:
    """Time each workload on the dense model and on each size of the pruned one, with transformers or an `engine`.

    Raises:
        UsageError: an option does not apply, or a number is out of range.
        MachineError: the engine is not installed or does not run here, or the models cannot be compiled here.
    """
    place, workloads, surgeries = resolve_benchmark(subject, request, notify, engine[0] if engine else None)
    architecture, device, dtype = subject.architecture, place.device, place.dtype
    least = engine[0].least_new_tokens if engine else 0
    with threads(request.threads):
        if engine:
            settings = engine_settings(workloads, dtype, models=2 if subject.surgery.removals else 1, least_new=least)
            load, version = load_into(*engine, settings, notify), engine[0].version() or None
            in_pairs = True
        else:
            load, version = load_with_transformers(dtype, device, notify), transformers.__version__
            in_pairs = architecture.is_quantized

        def timed(runs: Mapping[str, Run], workload: Workload) -> Measured:
            return measure(runs, workload, architecture.text_config.vocab_size, notify)

        measured: dict[Workload, list[Measured]] = {workload: [] for workload in workloads}
        sizes: dict[Removals, ModelSize] = {}
        with load(Surgery(architecture, ()), None) as dense:
            # All sizes together or, if only two models fit, each in turn with the dense one.
            for group in [[surgery] for surgery in surgeries] if in_pairs and surgeries else [surgeries]:
                sizes |= _time_together(load, dense, group, measured, timed)
                free_memory()
            where, attention = {"dtype": dense.dtype, "device": dense.device}, dense.attention
        del dense
        free_memory()  # what runs alone needs it
        memory = {}
        for surgery in [] if engine else [Surgery(architecture, ()), *surgeries]:
            seconds, memory[surgery.removals] = measure_alone(surgery, dtype, device, workloads, notify)
            sizes[surgery.removals] = sizes[surgery.removals].model_copy(update={"load_seconds": seconds})
        return BenchResult(
            schema_version=1,
            sleb_version=__version__,
            kind="bench",
            model=architecture.record,
            **where,
            threads=torch.get_num_threads(),
            processor=processor_name(device),
            governor=cpu_governor(),
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            dense=sizes[()],
            pruned=tuple(sizes[surgery.removals] for surgery in surgeries),
            workloads=tuple(
                workload_result(
                    workload,
                    measured[workload],
                    [surgery.removals for surgery in surgeries],
                    memory={removals: found[number] for removals, found in memory.items()},
                    engine_version=version,
                    attention=attention,
                )
                for number, workload in enumerate(workloads)
            ),
        )


def resolve_benchmark(
    subject: Subject, request: BenchRequest, notify: Notify, engine: Engine | None
) -> tuple[Placement, tuple[Workload, ...], tuple[Surgery, ...]]:
    """Return where the models are, what is timed, and on which sizes; raises like `benchmark`."""
    if engine:
        gguf = ["dtype"] if engine.reads == "gguf" else []
        request.refuse(["device", "compile", *gguf], f"does not apply to --engine {engine.name}")
    device = choose_device(request.device)
    architecture, dtype = subject.architecture, request.dtype or AUTO
    needed = partial(weight_bytes, architecture)
    place = Placement(device, choose_dtype(architecture, dtype, device, needed, free_bytes, notify))  # it runs alone
    least = engine.least_new_tokens if engine else 0
    return place, resolve_workloads(request, subject, device, notify, least), sizes(subject, request)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads; None keeps its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turn(workload: Workload, models: Mapping[str, Any], notify: Notify) -> dict[str, list[float]]:
    """Return the seconds of each timed run of these transformers models, run in turn."""
    vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
    with ExitStack() as stack:
        runs = {name: stack.enter_context(prepared(model, workload)).run for name, model in models.items()}
        rounds = measure(runs, workload, vocabulary, notify).rounds
    return {name: [done[name].seconds for done in rounds] for name in models}


def _time_together(
    load: Load,
    dense: Loaded,
    surgeries: Sequence[Surgery],
    measured: Mapping[Workload, list[Measured]],
    timed: Callable[[Mapping[str, Run], Workload], Measured],
) -> dict[Removals, ModelSize]:
    """Time the dense model with these sizes, add the rounds to those of each workload, and return the sizes."""
    with ExitStack() as stack:
        models = [dense, *(stack.enter_context(load(surgery, dense)) for surgery in surgeries)]
        for workload, found in measured.items():
            with ExitStack() as ready:
                runs = {
                    model_name(model.size.removals): ready.enter_context(model.prepare(workload)).run
                    for model in models
                }
                found.append(timed(runs, workload))
    return {model.size.removals: model.size for model in models}

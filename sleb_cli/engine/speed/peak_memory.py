"""How much memory does a model take at its peak, and how long does it take to load, in a process of
its own?
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any
from unittest import mock

import psutil
import torch

from sleb_cli.engine.device import free_memory, synchronize
from sleb_cli.engine.forward.placement import open_model
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.speed.timing import draw_prompts
from sleb_cli.engine.speed.transformers_model import prepared, weights_bytes
from sleb_cli.engine.surgery.loading import Placement, load_pruned
from sleb_cli.engine.surgery.surgery import Surgery, plan_surgery
from sleb_cli.engine.third_party import quiet_libraries
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.order import SizeKey
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.results import MemoryRecord, Workload
from sleb_plugins.errors import OutOfMemory, is_out_of_memory

SAMPLE_SECONDS = 0.002

CutOptions = tuple[SizeKey, Mapping[str, Any]]
"""The removals and other cuts as `plan_surgery` takes them: another process plans them again."""


def measure_alone(
    surgery: Surgery, placement: Placement, workloads: Sequence[Workload], notify: Notify
) -> tuple[float | None, list[MemoryRecord | None]]:
    """Load a model in a process of its own, and run each workload once; return the seconds and
    memory records.

    All are None if the process runs out of memory; a record also is if the accelerator does not
    report its peak (MPS).
    """
    source, cuts = surgery.architecture.source, (surgery.removals, surgery.other_cuts)
    which = f"without {surgery.description}" if surgery.cuts else "of the dense model"
    with task(notify, f"Peak memory {which}"):
        try:
            with _spawned_process() as process:
                return process.submit(
                    _measure, source, cuts, placement, workloads, torch.get_num_threads()
                ).result()
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not (isinstance(error, BrokenProcessPool) or is_out_of_memory(error)):
                raise
            notify(Notice(f"The peak memory {which} is unknown: its process ran out of memory."))
    return None, [None] * len(workloads)


@contextmanager
def _spawned_process() -> Iterator[ProcessPoolExecutor]:
    context, main = multiprocessing.get_context("spawn"), sys.modules["__main__"]
    # The process imports the main module; a script that calls sleb without a guard would run again.
    no_main = mock.patch.multiple(main, __file__=None, __spec__=None, create=True)
    # Ctrl-C reaches the child too, but the parent handles it.
    ignored = signal.SIGINT, signal.SIG_IGN
    with (
        no_main,
        ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=ignored) as pool,
    ):
        try:
            yield pool
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _measure(
    source: ModelSource,
    cuts: CutOptions,
    placement: Placement,
    workloads: Sequence[Workload],
    threads: int,
) -> tuple[float, list[MemoryRecord | None]]:
    quiet_libraries()
    torch.set_num_threads(threads)
    surgery = plan_surgery(read_architecture(source, load_plugins(), ignore), *cuts)
    start = time.perf_counter()
    if surgery.cuts:
        model = load_pruned(surgery, placement, ignore)
    else:
        model = open_model(surgery.architecture, placement, ignore).model
    synchronize(placement.device)
    seconds = time.perf_counter() - start
    return seconds, [_run_memory(model, placement.device, workload) for workload in workloads]


def _run_memory(model: Any, device: torch.device, workload: Workload) -> MemoryRecord | None:
    prompts = draw_prompts(workload, model.config.get_text_config().vocab_size, 0)
    with prepared(model, workload) as ready:
        if workload.compiled:
            ready.run(prompts, workload.new_tokens)  # compiling takes memory, too, but only once
        free_memory()
        with _watch_memory(device) as peak:
            cache = ready.run_for_cache(prompts, workload.new_tokens)
            synchronize(device)
    peak_bytes, weights = peak(), weights_bytes(model)
    if peak_bytes is None:
        return None
    # On a CPU, the peak is sampled, so it may lie below the sum.
    rest = max(0, peak_bytes - weights - cache)
    return MemoryRecord(
        peak_bytes=peak_bytes, weights_bytes=weights, kv_cache_bytes=cache, rest_bytes=rest
    )


@contextmanager
def _watch_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Watch memory while the body runs; the yielded function returns the peak, or None if it is
    unknown.
    """
    if device.type != "cpu":
        backend = torch.get_device_module(device.type)
        known = hasattr(backend, "max_memory_allocated")
        if known:
            backend.reset_peak_memory_stats(device)
        yield lambda: int(backend.max_memory_allocated(device)) if known else None
        return
    process, done = psutil.Process(), threading.Event()
    samples = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(process.memory_info().rss)

    with ThreadPoolExecutor(1) as watcher:
        watcher.submit(sample)
        try:
            yield lambda: max(samples)
        finally:
            done.set()

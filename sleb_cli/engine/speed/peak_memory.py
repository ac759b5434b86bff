"""Measure the peak memory of a model in a process that holds nothing else."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import psutil
import torch

from sleb_cli.engine.device import synchronize
from sleb_cli.engine.model.architecture import read_architecture
from sleb_cli.engine.model.source import ModelSource
from sleb_cli.engine.speed.workloads import runner
from sleb_cli.engine.surgery.loading import load_dense, load_pruned, quiet_libraries
from sleb_cli.engine.surgery.surgery import plan_surgery
from sleb_cli.events import Notice, Notify, ignore, task
from sleb_cli.plugin_manager import load_plugins
from sleb_cli.results import Workload

SAMPLE_SECONDS = 0.002


def peak_memory_alone(
    source: ModelSource,
    removals: tuple[int, ...],
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    notify: Notify,
) -> int | None:
    """Return the peak bytes of one iteration: allocated on an accelerator, or resident in the process on a CPU.

    Returns None if the accelerator does not say (MPS), or if the process is killed for its memory.
    """
    if device.type != "cpu" and not hasattr(torch.get_device_module(device.type), "max_memory_allocated"):
        return None
    what = f"Peak memory of {workload.name}, {'pruned' if removals else 'dense'}"
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the child too, but the parent handles it.
    alone = ProcessPoolExecutor(1, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with task(notify, what), alone:
        try:
            peak: int = alone.submit(_measure, source, removals, workload, dtype, device).result()
        except BrokenProcessPool:
            notify(Notice(f"{what} could not be measured: the process was killed."))
            return None
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
        return peak


@torch.inference_mode()
def _measure(
    source: ModelSource,
    removals: tuple[int, ...],
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    quiet_libraries()
    architecture = read_architecture(source, load_plugins(), ignore)
    if removals:
        model = load_pruned(plan_surgery(architecture, removals), dtype, device, ignore)
    else:
        model = load_dense(architecture, dtype, device, ignore)
    run = runner(workload, model)
    if device.type != "cpu":
        backend = torch.get_device_module(device.type)
        backend.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return int(backend.max_memory_allocated(device))
    with _watch_resident_bytes() as peak:
        run()
    return peak()


@contextmanager
def _watch_resident_bytes() -> Iterator[Callable[[], int]]:
    """Sample this process's resident memory while the body runs; the yielded function returns the peak."""
    process = psutil.Process()
    samples = [process.memory_info().rss]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(process.memory_info().rss)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield lambda: max(samples)
    finally:
        done.set()
        watcher.join()

"""Measure the peak memory of a model and how long it takes to load, in a process of its own."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch

from sleb_cli.engine.device import free_memory, synchronize
from sleb_cli.engine.forward.ending import Ending, ending_of
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
from sleb_plugins.errors import is_out_of_memory

SAMPLE_SECONDS = 0.002


def measure_alone(
    surgery: Surgery, placement: Placement, workloads: Sequence[Workload], notify: Notify
) -> tuple[float | None, list[MemoryRecord | None]]:
    """Load a model in a process of its own and run each workload; return seconds and memory.

    All are None if the process runs out of memory; a record also is if the accelerator does not
    report its peak (MPS).
    """
    source = surgery.architecture.source
    cuts = (surgery.removals, surgery.other_cuts)
    threads = torch.get_num_threads()
    which = f"without {surgery.description}" if surgery.cuts else "of the dense model"
    with task(notify, f"Peak memory {which}"):
        try:
            measured: tuple[float, list[MemoryRecord | None]] = _in_another_process(
                _measure, source, cuts, placement, workloads, threads
            )
            return measured
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            notify(Notice(f"The peak memory {which} is unknown: its process ran out of memory."))
    return None, [None] * len(workloads)


def _in_another_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `work`, or raise its error; a process that died is out of memory."""
    # multiprocessing would import the main module: a script that calls sleb without a guard would
    # run again.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import answer; answer()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((work, arguments)),
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        raise MemoryError
    result = pickle.loads(done.stdout)  # noqa: S301  from our own process
    if isinstance(result, Exception):
        raise result
    return result


def answer() -> None:
    """Do the work that the parent process sends, and send it the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # the code of a model may print
    work, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301  from our own process
    try:
        result = work(*arguments)
    except Exception as error:
        result = error
    pickle.dump(result, output)
    output.flush()


def _measure(
    source: ModelSource,
    cuts: tuple[SizeKey, Mapping[str, Any]],
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
    ending = ending_of(surgery.architecture, placement.device)
    memory = [_run_memory(model, ending, placement.device, workload) for workload in workloads]
    return seconds, memory


def _run_memory(
    model: Any, ending: Ending, device: torch.device, workload: Workload
) -> MemoryRecord | None:
    prompts = draw_prompts(workload, model.config.get_text_config().vocab_size, 0)
    with prepared(model, ending, workload) as ready:
        if workload.compiled:
            ready.run(prompts, workload.new_tokens)  # compiling takes memory, too, but only once
        free_memory()
        peak = _Peak(device)
        cache = ready.run_for_cache(prompts, workload.new_tokens)
        synchronize(device)
        peak_bytes = peak.read()
    if peak_bytes is None:
        return None
    weights = weights_bytes(model)
    # On a CPU, the peak is sampled, so it may lie below the sum.
    rest = max(0, peak_bytes - weights - cache)
    return MemoryRecord(
        peak_bytes=peak_bytes, weights_bytes=weights, kv_cache_bytes=cache, rest_bytes=rest
    )


class _Peak:
    """The most memory in use from now until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._backend = torch.get_device_module(device.type)
        if device.type == "cpu":
            self._process = psutil.Process()
            self._most = self._process.memory_info().rss
            self._done = threading.Event()
            self._watcher = threading.Thread(target=self._sample, daemon=True)
            self._watcher.start()
        elif hasattr(self._backend, "reset_peak_memory_stats"):
            self._backend.reset_peak_memory_stats(device)

    def read(self) -> int | None:
        """Return the peak in bytes; None where the accelerator does not report it."""
        if self._device.type == "cpu":
            self._done.set()
            self._watcher.join()
            return self._most
        if not hasattr(self._backend, "max_memory_allocated"):
            return None
        return int(self._backend.max_memory_allocated(self._device))

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._most = max(self._most, self._process.memory_info().rss)

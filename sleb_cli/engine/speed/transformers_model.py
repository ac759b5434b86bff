"""Run a model with transformers and time it: a prompt, texts, or generation token by token."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from sleb_cli.engine.device import synchronize
from sleb_cli.engine.forward.ending import Ending, Reader
from sleb_cli.engine.model.generation import generate, with_requires_grad
from sleb_cli.engine.model.padded import PaddedTexts
from sleb_cli.engine.model.sizes import cache_layers, layer_tensors
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_cli.engine.transformers_internals import BaseStreamer
from sleb_cli.results import Workload
from sleb_plugins import MachineError, UnsupportedModelError
from sleb_plugins.engine import TimedRun

# After eight models, torch would run the others without compiling them.
MAX_COMPILED = 256

_NOT_COMPILED = error_saying(
    MachineError,
    "torch.compile does not work for this model on this machine",
    "Leave out --compile.",
)


@contextmanager
def prepared(model: Any, ending: Ending, workload: Workload) -> Iterator[TransformersModel]:
    """Let a model run a workload as transformers loads it, compiled if the workload asks."""
    with with_requires_grad(model), ExitStack() as stack:
        if workload.compiled:
            torch._dynamo.reset()
            stack.enter_context(torch._dynamo.config.patch(cache_size_limit=MAX_COMPILED))
        yield TransformersModel(model, ending, workload)


class TransformersModel:
    """A transformers model and its ending, with the settings of a workload."""

    def __init__(self, model: Any, ending: Ending, workload: Workload) -> None:
        self._model = model
        self._ending = ending
        self._workload = workload
        self._forward = model
        if workload.compiled:
            self._forward = torch.compile(model, dynamic=False)
        self._without_cache = {"use_cache": False}
        accepted = inspect.signature(model.forward).parameters
        if isinstance(ending, Reader) and "use_cache" not in accepted:
            self._without_cache = {}

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> TimedRun:
        """Process the prompts together and generate `new_tokens` for each."""
        ids = torch.tensor(prompts, device=self._model.device)
        clock = _TokenClock()
        synchronize(ids.device)
        start = time.perf_counter()
        self._run(ids, new_tokens, streamer=clock)
        synchronize(ids.device)
        seconds = time.perf_counter() - start
        arrivals = clock.times[1:]  # the first is that of the prompts
        return TimedRun(seconds, tuple(at - start for at in arrivals))

    def run_for_cache(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
        """Return the bytes of the KV cache at its largest in an untimed run; 0 without one."""
        ids = torch.tensor(prompts, device=self._model.device)
        output = self._run(ids, new_tokens, return_dict_in_generate=True)
        if not new_tokens:
            return 0
        size = 0
        for layer in cache_layers(output):
            size += sum(tensor.nbytes for tensor in layer_tensors(layer))
        return size

    @torch.inference_mode()
    def _run(self, ids: Tensor, new_tokens: int, **options: Any) -> Any:
        compiled = self._workload.compiled
        if not new_tokens:
            texts = PaddedTexts(ids, torch.ones_like(ids))
            with translate_errors(_NOT_COMPILED) if compiled else nullcontext():
                output = self._forward(**texts.inputs(), **self._without_cache)
            if isinstance(self._ending, Reader):
                return self._ending.outputs(output, texts)
            return output
        settings = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            eos_token_id=None,
            disable_compile=not compiled,
        )
        refused = error_saying(
            UnsupportedModelError,
            f"{self._model.config.model_type} cannot generate text",
            "Time the prompt alone: --prompt.",
        )
        if compiled:
            settings.cache_implementation = "static"
            settings.compile_config = CompileConfig()
            # By itself, transformers does not compile the decoding on a CPU.
            settings.compile_config._compile_all_devices = True
            refused = _NOT_COMPILED
        return generate(self._model, ids, settings, refused, **options)


# Notes the time at which the tokens of each step reach the host, the prompts first.
class _TokenClock(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def weights_bytes(model: Any) -> int:
    """Return the bytes of all tensors stored in a model, each once; packed weights are buffers."""
    sizes = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            sizes[id(tensor)] = tensor.nbytes
    return sum(sizes.values())

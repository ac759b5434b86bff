"""vLLM, through its engine in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from sleb_cli.engine.speed.engines.packages import PackagedEngine
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_plugins.engine import EngineSettings, LoadedModel, TimedRun
from sleb_plugins.errors import MachineError

_MEMORY_SHARE = 0.9
"""Of a GPU's memory, or of a CPU's free memory, that all models take together: vLLM's default."""


class Vllm(PackagedEngine):
    """vLLM on a checkpoint folder, without its prefix cache."""

    name = "vllm"
    description = "vLLM; reads checkpoints"
    reads = "checkpoint"
    least_new_tokens = 1
    title = "vLLM"
    module = "vllm"
    extra = "vllm"
    loaded = 0
    """How many models are in memory now."""

    def load(self, model: Path, settings: EngineSettings) -> LoadedModel:
        """Load a checkpoint folder."""
        vllm = self.imported()
        refused = error_saying(
            MachineError,
            f"vLLM does not start with {model.name}",
            "Run `vllm serve` on the folder for more; with less memory, measure one at a time.",
        )
        with translate_errors(refused):
            return _LoadedCheckpoint(self, vllm, model, settings)

    def imported(self) -> Any:
        """Import vLLM with an environment in which it logs only errors and reports no use."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        return super().imported()


class _LoadedCheckpoint(LoadedModel):
    def __init__(self, engine: Vllm, vllm: Any, folder: Path, settings: EngineSettings) -> None:
        from vllm.platforms import current_platform

        self._engine = engine
        self._vllm = vllm
        self._runs = 0
        self.device = str(current_platform.device_type)
        self._llm = vllm.LLM(
            str(folder),
            dtype=settings.dtype,
            max_model_len=settings.sequence_length,
            max_num_seqs=settings.batch_size,
            gpu_memory_utilization=_memory_share(self.device, settings.models, engine.loaded),
            enable_prefix_caching=False,
            use_tqdm_on_load=False,
            skip_tokenizer_init=True,
            trust_remote_code=settings.trust_remote_code,
        )
        engine.loaded += 1

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> TimedRun:
        """Submit the prompts at once, and note when the last of them has each new token."""
        max_tokens = max(1, new_tokens)  # vLLM gives at least one
        sampling = self._vllm.SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        self._runs += 1
        made: dict[str, int] = {}
        arrivals: list[float] = []
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            name = f"{self._runs}.{number}"
            made[name] = 0
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                made[output.request_id] = len(output.outputs[0].token_ids)
            now = time.perf_counter() - start
            arrivals += [now] * (min(made.values()) - len(arrivals))
        return TimedRun(arrivals[-1], tuple(arrivals) if new_tokens else ())

    def close(self) -> None:
        """Stop the engine."""
        shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        if shutdown:
            shutdown()
        del self._llm
        self._engine.loaded -= 1


def _memory_share(device: str, models: int, loaded: int) -> float:
    # vLLM takes the whole share at once, weights and all, so each model gets a part.
    if device != "cpu":
        return _MEMORY_SHARE / models
    memory = psutil.virtual_memory()
    return _MEMORY_SHARE * memory.available / memory.total / (models - loaded)

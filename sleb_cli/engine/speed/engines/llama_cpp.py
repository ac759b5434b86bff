"""llama.cpp, through the low-level functions of llama-cpp-python."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sleb_cli.engine.speed.engines.packages import PackagedEngine
from sleb_plugins.engine import EngineSettings, LoadedModel, TimedRun
from sleb_plugins.errors import MachineError, UnsupportedModelError

_BATCH_TOKENS = 2048
"""Of one call, as in llama-bench."""

_ERROR = 3
"""ggml's log level of errors."""


class _Entry(NamedTuple):
    """A token of a batch; logits are computed after the last one of a sequence."""

    token: int
    position: int
    sequence: int
    is_last: bool


class LlamaCpp(PackagedEngine):
    """llama.cpp on a GGUF file, with the data types of the file."""

    name = "llama.cpp"
    description = "llama.cpp, through llama-cpp-python; reads GGUF files"
    reads = "gguf"
    title = "llama.cpp"
    module = "llama_cpp"
    extra = "llama-cpp"

    def load(self, model: Path, settings: EngineSettings) -> LoadedModel:
        """Load a GGUF file, onto the GPU if this build of llama.cpp uses one."""
        return _LoadedGguf(self.imported(), model, settings)


class _LoadedGguf(LoadedModel):
    def __init__(self, llama: Any, file: Path, settings: EngineSettings) -> None:
        self._llama = llama
        self._context = None
        self.device = "gpu" if llama.llama_supports_gpu_offload() else "cpu"
        errors = _collect_errors(llama)  # and silence everything else, now and later
        self._model = llama.llama_model_load_from_file(
            str(file).encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise UnsupportedModelError(
                f"llama.cpp cannot load {file.name}{_because(errors)}.",
                hint="Upgrade llama-cpp-python, or use another engine.",
            )
        # Each sequence takes a multiple of 256 tokens.
        options = llama.llama_context_default_params()
        options.n_ctx = settings.batch_size * 256 * math.ceil(settings.sequence_length / 256)
        options.n_seq_max = settings.batch_size
        options.n_batch = _BATCH_TOKENS
        options.n_threads = options.n_threads_batch = settings.threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            self.close()
            raise MachineError(
                f"llama.cpp cannot make a context for {settings.batch_size} x "
                f"{settings.sequence_length} tokens of {file.name}{_because(errors)}.",
                hint="Use a smaller --batch-size or --prompt-length.",
            )
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> TimedRun:
        """Process the prompts as llama-bench does, in batches up to 2,048 tokens, then decode."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        entries = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                is_last = position == len(prompt) - 1
                entries.append(_Entry(token, position, sequence, is_last))
        with ExitStack() as made:
            prepared = []
            for first in range(0, len(entries), _BATCH_TOKENS):
                chunk = entries[first : first + _BATCH_TOKENS]
                batch = made.enter_context(_new_batch(self._llama, len(chunk)))
                _fill(batch, chunk)
                prepared.append((batch, chunk))
            step = made.enter_context(_new_batch(self._llama, len(prompts)))
            start = time.perf_counter()
            chosen: list[int] = []
            for batch, chunk in prepared:
                chosen += self._decode(batch, chunk)
            arrivals = [time.perf_counter() - start]
            for decoded in range(new_tokens - 1):
                rows = []
                for sequence, prompt in enumerate(prompts):
                    position = len(prompt) + decoded
                    rows.append(_Entry(chosen[sequence], position, sequence, True))
                _fill(step, rows)
                chosen = self._decode(step, rows)
                arrivals.append(time.perf_counter() - start)
        return TimedRun(arrivals[-1], tuple(arrivals) if new_tokens else ())

    def _decode(self, batch: Any, entries: Sequence[_Entry]) -> list[int]:
        """Run a batch; return the likeliest next token of each sequence that ends in it."""
        import numpy as np

        llama = self._llama
        status = llama.llama_decode(self._context, batch)
        if status:
            raise MachineError(
                f"llama.cpp could not process {len(entries)} tokens (status {status}).",
                hint="Use a smaller --batch-size or --prompt-length.",
            )
        llama.llama_synchronize(self._context)
        chosen = []
        for row, entry in enumerate(entries):
            if entry.is_last:
                values = llama.llama_get_logits_ith(self._context, row)
                logits = np.ctypeslib.as_array(values, (self._vocabulary,))
                chosen.append(int(logits.argmax()))
        return chosen

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None


@contextmanager
def _new_batch(llama: Any, tokens: int) -> Iterator[Any]:
    batch = llama.llama_batch_init(tokens, 0, 1)
    try:
        yield batch
    finally:
        llama.llama_batch_free(batch)


def _fill(batch: Any, entries: Sequence[_Entry]) -> None:
    batch.n_tokens = len(entries)
    for row, entry in enumerate(entries):
        batch.token[row] = entry.token
        batch.pos[row] = entry.position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = entry.sequence
        batch.logits[row] = entry.is_last


def _collect_errors(llama: Any) -> list[str]:
    errors: list[str] = []

    def listen(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    # llama.cpp calls it as long as the process lives, so it must not be freed.
    _CALLBACKS.append(llama.llama_log_callback(listen))
    llama.llama_log_set(_CALLBACKS[-1], None)
    return errors


_CALLBACKS: list[Any] = []


def _because(errors: Sequence[str]) -> str:
    return f": {errors[0].rstrip('.')}" if errors else ""

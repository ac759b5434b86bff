"""A model in memory, as lm-eval asks it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sleb_cli.engine.device import input_device
from sleb_cli.engine.model.generation import continue_each, end_tokens
from sleb_cli.engine.process_group import ProcessGroup
from sleb_cli.events import Notify, task
from sleb_plugins import UsageError
from sleb_plugins.errors import is_out_of_memory

AUTO_BATCH = 16
"""How many requests a batch is taken to have where lm-eval looks for the most that fit."""


class Answer(str):
    """What a model wrote; `ended` tells whether it ended by itself, before its tokens ran out."""

    ended = False


class LoadedModel(HFLM):  # type: ignore[misc]
    """A model in memory, which reports its progress and shares batches between processes.

    Each process goes through all batches but computes only its own, so that the batches, and with them the last bits,
    do not depend on the number of processes. What it leaves to others gets NaN as its likelihood, or an empty text.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: how many requests a batch has, or "auto".
        named: the task, and what the model is called, under which progress is reported.
        notify: the listener for events.
        group: the processes.
        models: how many models will answer the same requests; if any, it is told how long that takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | str,
        named: tuple[str, str],
        notify: Notify,
        group: ProcessGroup,
        models: int = 0,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        # If the model is spread over devices, tokens may not go in where its first weight is.
        self._device, self._named, self._notify, self._group = input_device(model), named, notify, group
        self._batches, self._is_probing, self._models = 0, False, models
        self._ends = torch.tensor(sorted(end_tokens(model, tokenizer)), device=self._device)
        self._ended: list[bool] = []

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Return the likelihood of each continuation, and whether it is the most likely one."""
        return self._reported(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> Any:
        """Return the likelihood of each text."""
        return self._reported(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """Return what the model writes after each prompt, each an `Answer`."""
        return self._reported(lambda asked: self._together(lambda: self._written(asked)), requests)

    def _written(self, requests: Sequence[Any]) -> list[Any]:
        ended, advance = defaultdict[str, list[bool]](list), self.cache_hook.add_partial

        # lm-eval tells its cache the answers in the order of batches, and returns them in that of requests.
        def answered(kind: str, request: Any, text: str) -> None:
            ended[request[0]].append(self._ended.pop(0))
            advance()

        self.cache_hook.add_partial = answered
        answers = list(map(Answer, super().generate_until(requests)))
        for request, answer in zip(requests, answers, strict=True):
            answer.ended = ended[request.args[0]].pop(0)
        return answers

    def _reported(self, answer: Callable[[Sequence[Any]], Any], requests: Sequence[Any]) -> Any:
        with task(self._notify, ", ".join(self._named), len(requests), "requests") as advance:
            # lm-eval tells each answer to its cache.
            self.cache_hook = SimpleNamespace(add_partial=lambda *answer: advance())
            return answer(requests)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> Any:
        rate = super()._loglikelihood_tokens
        if (longest := max((len(answer) for *_, answer in requests), default=0)) > self.max_length:
            raise UsageError(
                f"{self._named[0]} has an answer of {longest} tokens, but the model has only "
                f"{self.max_length} positions.",
                hint="Leave the task out.",
            )
        return self._together(lambda: rate(requests, **options))

    def _together(self, answer: Callable[[], list[Any]]) -> list[Any]:
        """Return all answers, each from the process that computed it.

        Raises:
            MemoryError: one of several processes is out of memory, so all have to take smaller batches.
        """
        if self._group.size == 1:
            return answer()
        try:
            own: list[Any] | None = answer()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            own = None
        parts = [part for part in self._group.gather(own) if part is not None]
        if len(parts) < self._group.size:
            raise MemoryError("out of memory")
        return [next(filter(_is_computed, answers), answers[0]) for answers in zip(*parts, strict=True)]

    def _is_own_batch(self) -> bool:
        if self._is_probing:
            return True
        self._batches += 1
        return self._batches % self._group.size == self._group.rank

    def _model_call(self, inps: Tensor, *rest: Any, **options: Any) -> Any:
        if self._is_own_batch():
            return super()._model_call(inps, *rest, **options)
        nothing = torch.full((1,), math.nan, dtype=self.model.dtype, device=inps.device)
        return nothing.expand(*inps.shape, self.model.config.get_text_config().vocab_size)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        # Sampled tokens depend on all that were sampled before, so one process writes them all.
        is_own = self._group.is_main if options.get("do_sample") else self._is_own_batch()
        written = self._continued(context, max_length, stop, **options) if is_own else [context[0, :0]] * len(context)
        self._ended += [bool(torch.isin(tokens, self._ends).any()) for tokens in written]
        return torch.cat([context, pad_sequence(written, True, self.tokenizer.pad_token_id)], 1)

    def _continued(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> list[Tensor]:
        """Return what the model writes after each prompt, up to a stop or further."""
        start = context.shape[1]
        if (options.get("num_beams") or self.model.generation_config.num_beams or 1) > 1:
            options["attention_mask"] = attention_mask
            return list(super()._model_generate(context, max_length, stop, **options)[:, start:])
        if not (options.get("do_sample") or options.get("temperature")):  # as lm-eval takes them
            options |= {"do_sample": False, "temperature": None}

        def run(ids: Tensor, settings: dict[str, Any], **more: Any) -> Any:
            return self.model.generate(ids, pad_token_id=self.tokenizer.pad_token_id, **options, **settings, **more)

        def ended(rows: int) -> Callable[[Tensor], Tensor]:
            stops = stop_sequences_criteria(self.tokenizer, stop, 0, rows)

            def have_ended(added: Tensor) -> Tensor:
                for each in stops:
                    each(added, None)
                seen = torch.tensor([each.done_tracker for each in stops], dtype=torch.bool)
                return seen.any(0) | torch.isin(added, self._ends).any(1).cpu()

            return have_ended

        return continue_each(run, context, attention_mask, max_length - start, ended)

    def _detect_batch_size(self, *rest: Any, **options: Any) -> int:
        self._is_probing = True
        found = super()._detect_batch_size(*rest, **options)
        self._is_probing = False
        return min(self._group.gather(int(found)))


def _is_computed(answer: Any) -> bool:
    return answer != "" or answer.ended if isinstance(answer, Answer) else not math.isnan(answer[0])

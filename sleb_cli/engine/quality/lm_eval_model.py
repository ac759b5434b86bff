"""Answer lm-eval's requests with a model in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sleb_cli.engine.device import input_device
from sleb_cli.engine.lm_eval_internals import HFLM, stop_sequences_criteria
from sleb_cli.engine.model.generation import HaveEnded, continue_each, end_tokens
from sleb_cli.engine.process_group import ProcessGroup, join_dealt
from sleb_cli.events import Advance, Notify, task
from sleb_plugins import UsageError
from sleb_plugins.errors import is_out_of_memory


class Answer(str):
    """Text by a model; `ended` if it ended by itself, before its tokens ran out."""

    ended = False


class LmEvalModel(HFLM):  # type: ignore[misc]
    """A model in memory, which reports its progress and shares requests between processes.

    Args:
        batch_size: requests in a batch, or "auto".
        names: the task's and the model's, under which progress is reported.
        predict: returns the logits of tokens, [batch, positions], in place of a pass of the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | str,
        names: tuple[str, str],
        notify: Notify,
        group: ProcessGroup,
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        # If the model is spread over devices, tokens may not go in where its first weight is.
        self._device = input_device(model)
        self._names = names
        self._notify = notify
        self._group = group
        self._ends = torch.tensor(sorted(end_tokens(model, tokenizer)), device=self._device)
        self._ended: list[bool] = []
        self._advance: Advance
        self._written = 0.0
        self._predict = predict

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Return the likelihood of each continuation, and whether it is the most likely one."""
        return self._share_out(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> Any:
        """Return the likelihood of each text."""
        return self._share_out(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Sequence[Any]) -> Any:
        """Return an `Answer` to each prompt."""
        return self._share_out(self._write, requests)

    def _share_out(
        self, answer: Callable[[Sequence[Any]], list[Any]], requests: Sequence[Any]
    ) -> list[Any]:
        size = self._group.size
        mine = requests[self._group.rank :: size]
        with task(self._notify, ", ".join(self._names), len(mine), "requests") as advance:
            # lm-eval tells each answer to its cache.
            self.cache_hook = SimpleNamespace(add_partial=lambda *answer: advance())
            self._advance = advance
            try:
                computed = answer(mine) if mine else []
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                computed = None  # all processes need to know, to take smaller batches
            shares = [share for share in self._group.gather(computed) if share is not None]
        if len(shares) < size:
            raise MemoryError("out of memory")
        return join_dealt(shares)

    def _write(self, requests: Sequence[Any]) -> list[Any]:
        answers = defaultdict[str, list[Answer]](list)

        # lm-eval tells its cache each answer in the order of batches, which is that of `_ended`.
        def keep(kind: str, request: Any, text: str) -> None:
            answer = Answer(text)
            answer.ended = self._ended.pop(0)
            answers[request[0]].append(answer)

        self.cache_hook.add_partial = keep
        super().generate_until(requests)
        return [answers[request.args[0]].pop(0) for request in requests]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> Any:
        longest = max((len(answer) for *_, answer in requests), default=0)
        if longest > self.max_length:
            raise UsageError(
                f"{self._names[0]} has an answer of {longest} tokens, but the model has only "
                f"{self.max_length} positions.",
                hint="Leave the task out.",
            )
        return super()._loglikelihood_tokens(requests, **options)

    def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
        if self._predict is not None:
            return self._predict(inps)
        logits: Tensor = super()._model_call(inps, **options)
        return logits

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor,
        **options: Any,
    ) -> Tensor:
        if (options.get("num_beams") or self.model.generation_config.num_beams or 1) > 1:
            whole = super()._model_generate(
                context, max_length, stop, attention_mask=attention_mask, **options
            )
            return self._remember_ended(context, list(whole[:, context.shape[1] :]))
        if not (options.get("do_sample") or options.get("temperature")):  # as lm-eval takes them
            options |= {"do_sample": False, "temperature": None}

        def generate(ids: Tensor, settings: dict[str, Any], **more: Any) -> Any:
            return self.model.generate(
                ids, pad_token_id=self.tokenizer.pad_token_id, **options, **settings, **more
            )

        new = max_length - context.shape[1]

        def stop_criterion(rows: int) -> HaveEnded:
            stops = stop_sequences_criteria(self.tokenizer, stop, 0, rows)

            def have_ended(added: Tensor) -> Tensor:
                for stop_at in stops:
                    stop_at(added, None)
                seen = torch.tensor([stop_at.done_tracker for stop_at in stops], dtype=torch.bool)
                ended = seen.any(0) | torch.isin(added, self._ends).any(1).cpu()
                going_on = rows - int(ended.sum())
                self._report_written(len(context) - going_on * (1 - added.shape[1] / new))
                return ended

            return have_ended

        # Texts that have ended leave the batch; a text may go on beyond its stop, where lm-eval
        # cuts it.
        return self._remember_ended(
            context, continue_each(generate, context, attention_mask, new, stop_criterion)
        )

    def _report_written(self, answers: float) -> None:
        """Report how many answers of the batch are written; a share of each that goes on."""
        self._advance(answers - self._written)
        self._written = answers

    def _remember_ended(self, context: Tensor, written: list[Tensor]) -> Tensor:
        self._report_written(len(written))
        self._written = 0.0
        self._ended += [bool(torch.isin(tokens, self._ends).any()) for tokens in written]
        return torch.cat([context, pad_sequence(written, True, self.tokenizer.pad_token_id)], 1)

"""A ridge regression at each gap: the block before it takes over what the removed blocks added.

The dense and the pruned model run side by side on the text, from the bottom up. Much of what the
removed blocks added to the hidden states is a linear function of the inputs of the last matrix in
the block before them, so the regression adds it to that matrix: neither the architecture nor the
cost of inference changes. (ReplaceMe, Shopkhoev et al., arXiv 2505.02819, fits one map for one gap;
the weights of positions, and gaps from what earlier fits left, are ours.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sleb_cli.engine.device import as_float64
from sleb_cli.engine.forward.fork_check import CHECKED_SEQUENCES, why_not_fork
from sleb_cli.engine.forward.memory_needs import states_bytes
from sleb_cli.engine.forward.skipping import Call, SkippableModel
from sleb_cli.engine.forward.stores import SharedInputs, keep_on_device, to_cpu
from sleb_cli.engine.memory import in_smaller_pieces
from sleb_cli.engine.recovery.stage import HIDDEN_STATES, Job, Stage, kept_blocks
from sleb_cli.engine.recovery.variant import run_blocks
from sleb_cli.engine.surgery.surgery import Surgery
from sleb_cli.engine.transformers_internals import Conv1D
from sleb_cli.events import Notice, task
from sleb_cli.plan import ClosedFormRecord, FitRecord, LossesRecord
from sleb_plugins import ModelError, UnsupportedModelError

RIDGE_TASK = "Recovering in closed form"
BATCH_TOKENS = 4096
RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Penalties relative to the squares of each input; the validation text chooses."""
EXACT = 0.02
"""How far from a constant the share of a gradient may be that a module receives: the rounding of
bfloat16.
"""
NEAR = 3.0
"""The same where the rest of the block also reads the module's output."""
SILENT = 0.01
"""Channels that a norm multiplies by less than this share of the mean are not fitted."""


@dataclass(frozen=True)
class Ridge(Stage):
    """A regression at each gap, always the first stage: it starts from the dense values."""

    title = "Recovery"
    task = RIDGE_TASK
    model = "recovered"
    key = "closed_form"
    streams = True

    def needed_bytes(self, surgery: Surgery, dtype: torch.dtype, tokens: int) -> dict[str, int]:
        """Return the bytes of hidden states, and of the sums of the largest fit."""
        width: int = surgery.architecture.text_config.hidden_size
        states = states_bytes(surgery.architecture, dtype, tokens)
        inputs = _most_inputs(surgery)
        # In float64 the sums; in float32 one to factor, its factor, and the solution.
        sums = 8 * (2 * inputs * inputs + 2 * inputs * width)
        # Entering the model, entering a block in both models, and leaving it.
        return {HIDDEN_STATES: 4 * states, "regression sums": sums}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes of all fits at most."""
        width: int = surgery.architecture.text_config.hidden_size
        return len(_gaps(surgery)) * _most_inputs(surgery) * width * stored.itemsize

    def run(
        self, job: Job, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        """Fit the block before each gap; return its new values by parameter."""
        assert not values
        dense = job.dense
        if saved := job.state.find(self.key, ClosedFormRecord):
            job.notify(Notice("Continuing after the fits of an interrupted run."))
            record, tensors = saved
            return {name: _in_place(dense, name, tensors[name]) for name in tensors}, record
        with torch.no_grad():
            sequences = job.validation.sequences[:CHECKED_SEQUENCES].to(dense.device)
            if reason := why_not_fork(dense, sequences):
                raise UnsupportedModelError(
                    f"{dense.model.config.model_type} cannot be recovered: {reason}.",
                    hint="Leave out --recover.",
                )
            size = max(1, BATCH_TOKENS // job.train.sequences.shape[1])
            fit = partial(_fit_gaps, job)
            said = "fitting {} sequences"
            fitted, record = in_smaller_pieces(fit, size, dense.device, job.notify, said)
        job.state.save(self.key, record, fitted)
        return fitted, record

    def fields(self, done: ClosedFormRecord, losses: LossesRecord) -> dict[str, Any]:
        """Return the fits, and the losses with them."""
        return {"closed_form": done, "closed_form_losses": losses}


def _gaps(surgery: Surgery) -> list[tuple[int, int, int]]:
    """Return the block before each gap, the one behind it, and how many are gone, in ascending
    order.

    Without a block before the first gap, the first that stays makes up for what was before it.
    """
    kept = surgery.kept.blocks
    gaps = []
    for block, behind in pairwise([*kept, surgery.architecture.block_count]):
        gone = behind - block - 1
        if block == kept[0]:
            gone += block
        if gone:
            gaps.append((block, behind, gone))
    return gaps


def _fit_gaps(job: Job, size: int) -> tuple[dict[str, Tensor], ClosedFormRecord]:
    dense = job.dense
    surgery = job.settings.surgery
    store = to_cpu if job.settings.on_host else keep_on_device
    values: dict[str, Tensor] = {}
    fits: list[FitRecord] = []
    gaps = _gaps(surgery)
    begin = 0 if 0 in surgery.removed else gaps[0][0]
    with task(job.notify, RIDGE_TASK, gaps[-1][1], "blocks") as advance:
        calls: list[list[Call]] = []
        train = 0
        shared = SharedInputs(dense, store)
        for text in (job.train, job.validation):
            train = len(calls)
            for ids in torch.split(text.sequences.to(dense.device), size):
                calls.append(shared.calls(ids))
        entering = [calls_of_batch[0].entering for calls_of_batch in calls]
        targets = run_blocks(dense, range(begin), calls, entering, store)
        pruned = targets
        advance(begin)
        for block, behind, gone in gaps:
            targets = run_blocks(dense, range(begin, behind), calls, targets, store)
            before = [number for number in range(begin, block) if number not in surgery.removed]
            with dense.replaced(values):
                pruned = run_blocks(dense, before, calls, pruned, store)
            calls_of_block = [calls_of_batch[block] for calls_of_batch in calls]
            gap = Gap(job, block, gone, calls_of_block, train, pruned, targets)
            record, fitted = gap.fit()
            fits.append(record)
            values |= fitted
            with dense.replaced(values):
                pruned = run_blocks(dense, [block], calls, pruned, store)
            advance(behind - begin)
            begin = behind
    return values, ClosedFormRecord(fits=tuple(fits))


@dataclass(frozen=True)
class Matrix:
    """A matrix of `inputs` whose output is added to the hidden states, times `scale`, or that of
    the `norm` behind it.
    """

    name: str
    inputs: int
    scale: float
    norm: str | None = None


@dataclass(frozen=True)
class Gap:
    """A gap to be closed by the block before it.

    Attributes:
        gone: how many blocks are removed there.
        calls: the calls of the block, batch by batch: `train` of them are for training, the others
            for validation.
        pruned: the hidden states that enter the block.
        targets: the dense model's behind the gap.
    """

    job: Job
    block: int
    gone: int
    calls: Sequence[Call]
    train: int
    pruned: Sequence[Tensor]
    targets: Sequence[Tensor]

    @property
    def root(self) -> nn.Module:
        """The block."""
        return self.job.dense.switches[self.block].block

    def fit(self) -> tuple[FitRecord, dict[str, Tensor]]:
        """Return the record of the fit, and the new values; none if nothing lowers the error."""
        values: dict[str, Tensor] = {}
        chosen: float | None = None
        with self.job.dense.loaded(self.block):
            before = self._error({})
            _require_finite(before)
            error = before
            matrices = self.find_matrices()
            if matrices:
                xx, xy = self._sums(matrices)
                for ridge in RIDGES:
                    candidate = self._changed(matrices, _solve(xx, xy, ridge))
                    new_error = self._error(candidate)
                    if new_error < error:
                        error = new_error
                        values = candidate
                        chosen = ridge
        record = FitRecord(
            block=self.block,
            gap=self.gone,
            weights=tuple(matrix.name for matrix in matrices),
            ridge=chosen,
            error_left=error / max(before, 1e-30),
        )
        return record, values

    def _changed(self, matrices: Sequence[Matrix], solution: Tensor) -> dict[str, Tensor]:
        """Return the matrices' values with a solution added, [inputs, outputs]."""
        path = self.job.settings.surgery.architecture.adapter.blocks_path
        values = {}
        sizes = [matrix.inputs for matrix in matrices]
        for matrix, change in zip(matrices, torch.split(solution, sizes), strict=True):
            module = self.root.get_submodule(matrix.name)
            weight = module.get_parameter("weight")
            if not isinstance(module, Conv1D):
                change = change.T
            value = (as_float64(weight) + change).to(self.job.settings.stored)
            values[f"{path}.{self.block}.{matrix.name}.weight"] = value.to(weight.device)
        return values

    def _run(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return what the block's output lacks, and the square root of each position's weight.

        Norms divide hidden states by their size before anything reads them, so errors count
        relative to it. Otherwise the few positions whose states are a thousand times larger, often
        the first, would decide.
        """
        states = self.job.dense.run_block(self.calls[batch], self.pruned[batch]).float()
        target = self.targets[batch].to(states.device).float()
        return (target - states).flatten(0, -2), 1 / _sizes(target)

    def _error(self, values: Mapping[str, Tensor]) -> float:
        """Return the weighted squares that these values leave on the validation text."""
        total = 0.0
        with self.job.dense.replaced(values):
            for batch in range(self.train, len(self.calls)):
                missing, weights = self._run(batch)
                total += float((missing * weights).square().sum())
        return total

    def _sums(self, matrices: Sequence[Matrix]) -> tuple[Tensor, Tensor]:
        """Return X'WX and X'WY of the matrices' inputs X and what is missing, Y, in float64."""
        inputs = sum(matrix.inputs for matrix in matrices)
        width = self.pruned[0].shape[-1]
        zeros = as_float64(torch.zeros(1, device=self.job.dense.places[self.block]))
        xx = zeros.new_zeros(inputs, inputs)
        xy = zeros.new_zeros(inputs, width)
        names = [name for matrix in matrices for name in (matrix.name, matrix.norm) if name]
        for batch in range(self.train):
            with _watching(self.root, names) as (entering, _):
                missing, weights = self._run(batch)
            features = []
            for matrix in matrices:
                x = entering[matrix.name].flatten(0, -2).float() * matrix.scale
                if matrix.norm:
                    # What the norm divides by hardly changes with the matrix.
                    x = x / _sizes(entering[matrix.norm])
                    missing = missing / _gain(self.root.get_submodule(matrix.norm), missing)
                features.append(x * weights)
            x = torch.cat(features, dim=1)
            xx += as_float64(x.T @ x)
            xy += as_float64(x.T @ (missing * weights))
        _require_finite(float(xx.sum() + xy.sum()))
        return xx, xy

    def find_matrices(self) -> list[Matrix]:
        """Find the matrices to fit.

        Which modules add to the hidden states is not looked up by name but tried: if one does, its
        output has the gradient of the block's, times a constant.
        """
        dense = self.job.dense
        inputs = _possible(self.root, self.pruned[0].shape[-1])
        with torch.enable_grad(), _watching(self.root, [*inputs]) as (entering, leaving):
            states = self.pruned[0].to(dense.places[self.block]).detach().requires_grad_()
            result = dense.run_block(self.calls[0], states)
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(result.shape, generator=generator).to(result)
            outputs = {
                name: output
                for name, output in leaving.items()
                if isinstance(output, Tensor) and output.numel() == result.numel()
            }
            gradients = torch.autograd.grad(result, [*outputs.values()], noise, allow_unused=True)
        exact = []
        near = []
        for name, gradient in zip(outputs, gradients, strict=True):
            scale, error = _as_multiple(gradient, noise)
            matrix = Matrix(name, inputs[name], scale)
            if error <= EXACT:
                exact.append(matrix)
            elif error <= NEAR and matrix.inputs:
                near.append(matrix)
        if direct := [matrix for matrix in exact if matrix.inputs]:
            return direct
        for norm in exact:
            for name, output in outputs.items():
                if inputs[name] and torch.equal(output.flatten(), entering[norm.name].flatten()):
                    return [Matrix(name, inputs[name], norm.scale, norm.name)]
        return near[-1:]


def _in_place(dense: SkippableModel, name: str, value: Tensor) -> Tensor:
    """Return a value where the weight lies: elsewhere, kernels may round otherwise."""
    device = dense.model.get_parameter(name).device
    if device.type == "meta":
        device = dense.device
    return value.to(device, copy=True)


def _require_finite(number: float) -> None:
    if not math.isfinite(number):
        raise ModelError(
            "On the text to recover on, the model computes hidden states that are not finite "
            "numbers.",
            hint="Use other text, or a data type with a wider range: --dtype bfloat16 or float32.",
        )


def _as_multiple(gradient: Tensor | None, given: Tensor) -> tuple[float, float]:
    """Return the constant by which a gradient is most nearly the given one, and the error of
    that, relative.
    """
    if gradient is None:
        return 0.0, math.inf
    expected = given.float()
    found = gradient.float().view_as(expected)
    scale = float((found * expected).sum() / expected.square().sum())
    error = float((found - scale * expected).norm())
    return scale, error / (abs(scale) * float(expected.norm()) + 1e-12)


def _solve(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """Return the coefficients that a relative ridge leaves, [inputs, outputs]."""
    squares = xx.diagonal()
    penalized = xx.float()
    # An input that is always zero would make the matrix singular; its coefficient is 0.
    least = squares.mean().clamp_min(1e-20) * 1e-9
    penalized.diagonal().copy_(squares * (1 + ridge) + least)
    factor = torch.linalg.cholesky(penalized)
    return torch.cholesky_solve(xy.float(), factor)


def _sizes(states: Tensor) -> Tensor:
    """Return what a norm divides each position by, [positions, 1]."""
    return states.float().flatten(0, -2).square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


def _gain(norm: nn.Module, like: Tensor) -> Tensor:
    """Return what a norm multiplies each channel by; infinity where that is next to nothing."""
    signs = 1 - 2 * (torch.arange(like.shape[-1], device=like.device) % 2)  # mean 0 and size 1
    weight = norm.get_parameter("weight")
    gain: Tensor = norm(signs.to(weight)).float() * signs
    return gain.masked_fill(gain.abs() < SILENT * gain.abs().mean(), torch.inf)


@contextmanager
def _watching(
    root: nn.Module, names: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Collect the inputs and the outputs of these modules, by name, while the context is open."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Any] = {}

    def keep(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        entering[name] = args[0] if args else next(iter(kwargs.values()))
        leaving[name] = output

    with ExitStack() as hooks:
        for name in names:
            module = root.get_submodule(name)
            hook = module.register_forward_hook(partial(keep, name), with_kwargs=True)
            hooks.enter_context(hook)
        yield entering, leaving


def _possible(root: nn.Module, width: int) -> dict[str, int]:
    """Return the modules that might write hidden states of this width: matrices, with their
    inputs, and norms, with 0.
    """
    inputs = {}
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            continue
        shape = list(weight.shape)
        if isinstance(module, Conv1D):
            shape.reverse()
        if isinstance(module, (nn.Linear, Conv1D)) and shape[0] == width:
            inputs[name] = shape[1]
        elif "norm" in type(module).__name__.lower() and shape == [width]:
            inputs[name] = 0
    return inputs


def _most_inputs(surgery: Surgery) -> int:
    """Return the inputs of the largest fit: attention and the MLP may be parallel."""
    width: int = surgery.architecture.text_config.hidden_size
    inputs = []
    for block in kept_blocks(surgery):
        inputs.append(sum(sorted(_possible(block, width).values())[-2:]))
    return max(inputs)

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
from pydantic import BaseModel
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
from sleb_cli.units import plural
from sleb_plugins import ModelError, UnsupportedModelError

RIDGE_TASK = "Recovering in closed form"
BATCH_TOKENS = 4096
RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Penalties relative to the squares of each input; the validation text chooses."""
ROUNDS = 3
"""Behind a norm, a fit changes what the norm divides by, so it is repeated."""
EXACT = 0.02
"""How far from a constant the share of a gradient may be that a module receives: the rounding of
bfloat16.
"""
NEAR = 3.0
"""The same where the rest of the block also reads the module's output."""
SILENT = 0.01
"""Channels that a norm multiplies by less than this share of the mean are not fitted."""
_SAVED = "closed form"
"""The name of this stage in the saved state."""


class SavedFits(BaseModel, strict=True, extra="forbid"):
    """The fits so far, in order of depth."""

    fits: tuple[FitRecord, ...] = ()


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
        inputs = max(_most_inputs(block, width) for block in kept_blocks(surgery))
        # In float64 the sums; in float32 one to factor, its factor, and the solution.
        sums = 8 * (2 * inputs * inputs + 2 * inputs * width)
        # Entering the model, entering a block in both models, and leaving it.
        return {HIDDEN_STATES: 4 * states, "regression sums": sums}

    def saved_bytes(self, surgery: Surgery, stored: torch.dtype) -> int:
        """Return the bytes of all fits at most."""
        width: int = surgery.architecture.text_config.hidden_size
        inputs = max(_most_inputs(block, width) for block in kept_blocks(surgery))
        return len(_gaps(surgery)) * inputs * width * stored.itemsize

    def run(
        self, job: Job, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], ClosedFormRecord]:
        """Fit the block before each gap; return its new values by parameter."""
        assert not values
        dense = job.dense
        with torch.no_grad():
            sequences = job.validation.sequences[:CHECKED_SEQUENCES].to(dense.device)
            if reason := why_not_fork(dense, sequences):
                raise UnsupportedModelError(
                    f"{dense.model.config.model_type} cannot be recovered: {reason}.",
                    hint="Leave out --recover.",
                )
            size = max(1, BATCH_TOKENS // job.train.sequences.shape[1])
            fit = partial(_fit_gaps, job)
            return in_smaller_pieces(fit, size, dense.device, job.notify, "fitting {} sequences")

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
    saved = _Saved(job)
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
            with dense.replaced(saved.values):
                pruned = run_blocks(dense, before, calls, pruned, store)
            if block not in saved.blocks:
                calls_of_block = [calls_of_batch[block] for calls_of_batch in calls]
                gap = Gap(job, block, gone, calls_of_block, train, pruned, targets)
                saved.add(*gap.fit())
            with dense.replaced(saved.values):
                pruned = run_blocks(dense, [block], calls, pruned, store)
            advance(behind - begin)
            begin = behind
    saved.save()
    return saved.values, ClosedFormRecord(fits=tuple(saved.fits))


class _Saved:
    """The fits so far, with those of an interrupted run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.fits: list[FitRecord] = []
        self.values: dict[str, Tensor] = {}
        if found := job.state.find(_SAVED, SavedFits):
            record, tensors = found
            self.fits = [*record.fits]
            # The values go where weights lie, since fast kernels may round differently at other
            # addresses.
            for name, value in tensors.items():
                device = job.dense.model.get_parameter(name).device
                if device.type == "meta":
                    device = job.dense.device
                self.values[name] = value.to(device, copy=True)
            count = plural(len(self.fits), "fit")
            job.notify(Notice(f"Continuing with {count} of an interrupted run."))
        self.blocks = {fit.block for fit in self.fits}

    def add(self, fit: FitRecord, values: Mapping[str, Tensor]) -> None:
        self.fits.append(fit)
        self.values |= values
        self.job.state.save_if_due(_SAVED, SavedFits(fits=tuple(self.fits)), self.values)

    def save(self) -> None:
        """Save all fits, since what comes next may fail."""
        self.job.state.save(_SAVED, SavedFits(fits=tuple(self.fits)), self.values)


@dataclass(frozen=True)
class Projection:
    """A matrix of `inputs` whose output is added to the hidden states, times `scale`, or behind a
    norm.
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
    def dense(self) -> SkippableModel:
        """The model that has the block."""
        return self.job.dense

    @property
    def root(self) -> nn.Module:
        """The block."""
        return self.dense.switches[self.block].block

    def fit(self) -> tuple[FitRecord, dict[str, Tensor]]:
        """Return the record of the fit, and the new values; none if nothing lowers the error."""
        values: dict[str, Tensor] = {}
        chosen: float | None = None
        with self.dense.loaded(self.block):
            before = self._error(values)
            _require_finite(before)
            error = before
            projections = self._find_projections()
            rounds = ROUNDS if any(projection.norm for projection in projections) else 1
            for _ in range(rounds if projections else 0):
                previous = error
                for ridge, candidate in self._candidates(projections, values):
                    new_error = self._error(candidate)
                    if new_error < error:
                        error = new_error
                        best = candidate
                        chosen = ridge or chosen
                if error == previous:
                    break
                values = best
        record = FitRecord(
            block=self.block,
            gap=self.gone,
            weights=tuple(projection.name for projection in projections),
            ridge=chosen,
            error_left=error / max(before, 1e-30),
        )
        return record, values

    def _name(self, name: str) -> str:
        """Return the name in the model of a parameter of the block."""
        path = self.job.settings.surgery.architecture.adapter.blocks_path
        return f"{path}.{self.block}.{name}"

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return as_float64(values.get(self._name(name), self.root.get_parameter(name)))

    def _changed(
        self, values: Mapping[str, Tensor], name: str, change: Tensor
    ) -> dict[str, Tensor]:
        before = self._value(name, values)
        value = before + change.to(before)
        device = self.root.get_parameter(name).device
        rounded = value.to(self.job.settings.stored).to(device).contiguous()
        return {**values, self._name(name): rounded}

    def _candidates(
        self, projections: Sequence[Projection], values: dict[str, Tensor]
    ) -> Iterator[tuple[float | None, dict[str, Tensor]]]:
        """Return values to try, with their ridges."""
        norm = projections[0].norm
        gain = None
        if norm is not None:
            gain = self._gain(norm, values)
            yield None, self._changed(values, f"{norm}.weight", self._missing_gain(norm, values))
        xx, xy = self._sums(projections, values, gain)
        _require_finite(float(xx.sum() + xy.sum()))
        for ridge in RIDGES:
            solution = _solve(xx, xy, ridge)
            candidate = values
            sizes = [projection.inputs for projection in projections]
            for projection, change in zip(projections, torch.split(solution, sizes), strict=True):
                if not isinstance(self.root.get_submodule(projection.name), Conv1D):
                    change = change.T
                candidate = self._changed(candidate, f"{projection.name}.weight", change)
            yield ridge, candidate

    def _run(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return what the block's output lacks, and the square root of each position's weight.

        Norms divide hidden states by their size before anything reads them, so errors count
        relative to it. Otherwise the few positions whose states are a thousand times larger, often
        the first, would decide.
        """
        states = self.dense.run_block(self.calls[batch], self.pruned[batch]).float()
        target = self.targets[batch].to(states.device).float()
        sizes = target.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
        return (target - states).flatten(0, -2), 1 / sizes.flatten(0, -2)

    def _error(self, values: Mapping[str, Tensor]) -> float:
        """Return the weighted squares that these values leave on the validation text."""
        total = 0.0
        with self.dense.replaced(values):
            for batch in range(self.train, len(self.calls)):
                missing, weights = self._run(batch)
                total += float((missing * weights).square().sum())
        return total

    def _sums(
        self, projections: Sequence[Projection], values: Mapping[str, Tensor], gain: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return X'WX and X'WY of the matrices' inputs X and what is missing, Y, in float64."""
        inputs = sum(projection.inputs for projection in projections)
        width = self.pruned[0].shape[-1]
        zeros = as_float64(torch.zeros(1, device=self.dense.places[self.block]))
        xx = zeros.new_zeros(inputs, inputs)
        xy = zeros.new_zeros(inputs, width)
        names = [projection.name for projection in projections]
        norms = [projection.norm for projection in projections if projection.norm]
        with self.dense.replaced(values):
            for batch in range(self.train):
                with _watching(self.root, [*names, *norms]) as (entering, _):
                    missing, weights = self._run(batch)
                if gain is not None:
                    missing = missing / gain
                features = []
                for projection in projections:
                    feature = entering[projection.name].flatten(0, -2).float()
                    if projection.norm:
                        feature = feature / _size(entering[projection.norm])
                    features.append(feature * projection.scale)
                x = torch.cat(features, dim=1) * weights
                xx += as_float64(x.T @ x)
                xy += as_float64(x.T @ (missing * weights))
        return xx, xy

    def _gain(self, norm: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return what a norm multiplies each channel by; infinity where that is next to nothing."""
        with self.dense.replaced(values), _watching(self.root, [norm]) as (entering, leaving):
            self._run(0)
        states = entering[norm].float().flatten(0, -2)
        normalized = states / _size(entering[norm])
        outputs = leaving[norm].float().flatten(0, -2)
        gain: Tensor = (outputs * normalized).sum(0) / normalized.square().sum(0).clamp_min(1e-12)
        silent = gain.abs() < SILENT * gain.abs().mean()
        return gain.masked_fill(silent, torch.inf)

    def _missing_gain(self, norm: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return how a norm's gains would have to change."""
        products: Tensor | float = 0.0
        squares: Tensor | float = 0.0
        with self.dense.replaced(values):
            for batch in range(self.train):
                with _watching(self.root, [norm]) as (entering, _):
                    missing, weights = self._run(batch)
                normalized = entering[norm].float().flatten(0, -2) / _size(entering[norm])
                normalized = normalized * weights
                products = products + (normalized * missing * weights).sum(0)
                squares = squares + normalized.square().sum(0)
        assert isinstance(squares, Tensor)
        return products / squares.clamp_min(1e-12)

    def _find_projections(self) -> list[Projection]:
        """Find the matrices to fit.

        Which modules add to the hidden states is not looked up by name but tried: if one does, its
        output has the gradient of the block's, times a constant.
        """
        width = self.pruned[0].shape[-1]
        matrices = possible_matrices(self.root, width)
        norms = possible_norms(self.root, width)
        with torch.enable_grad(), _watching(self.root, [*matrices, *norms]) as (entering, leaving):
            states = self.pruned[0].to(self.dense.places[self.block]).detach().requires_grad_()
            result = self.dense.run_block(self.calls[0], states)
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
            projection = Projection(name, matrices.get(name, 0), scale)
            if error <= EXACT:
                exact.append(projection)
            elif error <= NEAR and name in matrices:
                near.append(projection)
        direct = [projection for projection in exact if projection.name in matrices]
        if direct:
            return direct
        for norm in exact:
            for name in matrices:
                entered = entering[norm.name].flatten()
                if name in outputs and torch.equal(outputs[name].flatten(), entered):
                    return [Projection(name, matrices[name], norm.scale, norm.name)]
        return near[-1:]


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


def _size(states: Tensor) -> Tensor:
    """Return what a norm divides each position by, [positions, 1]."""
    return states.float().flatten(0, -2).square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


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


def possible_matrices(root: nn.Module, width: int) -> dict[str, int]:
    """Return the linear maps that might write hidden states of this width, with their inputs."""
    matrices = {}
    for name, module in root.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
            continue
        outputs, inputs = module.weight.shape
        if isinstance(module, Conv1D):
            outputs, inputs = inputs, outputs
        if outputs == width:
            matrices[name] = inputs
    return matrices


def possible_norms(root: nn.Module, width: int) -> list[str]:
    """Return the norms of this width."""
    norms = []
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower()
        if is_norm and isinstance(weight, nn.Parameter) and weight.shape == (width,):
            norms.append(name)
    return norms


def _most_inputs(block: nn.Module, width: int) -> int:
    # Attention and the MLP may be parallel, so that both are fitted at once.
    return sum(sorted(possible_matrices(block, width).values())[-2:])

"""Ridge regression from running sums, without keeping activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU, as_float64, cpu_dtypes

PANEL_COLUMNS = 256
"""Columns of X'X that are computed at once: enough to fill matrix units."""
SKETCH_COLUMNS = 64
"""Random sums of the targets that a ridge is chosen by."""


def ridge_bytes(features: int, outputs: int) -> int:
    """Return the bytes of a ridge regression and the sums to judge it by."""
    # Two pairs of sums in float64; in float32 the matrix to judge by, one to factor, its factor,
    # and the best so far.
    return 8 * (4 * features * features + 4 * features * outputs)


@contextmanager
def bfloat16_products(on: bool) -> Iterator[None]:
    """Let the CPU round factors of float32 products to bfloat16, if it can; sums stay float32."""
    # oneDNN then computes instead of MKL, and decides: it rounds for AMX. For AVX512_BF16 it does
    # not (torch 2.15), but still takes half the time on an AMD EPYC.
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if on and torch.bfloat16 in cpu_dtypes():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Ridge:
    """Weighted least squares from features X to targets Y, by running sums.

    X is [rows, features], and Y [rows, outputs].

    The sums are X'WX (only its upper half), X'WY and Y'WY, in float64, on the CPU if the device has
    no float64. The penalty of a coefficient is `ridge` times its feature's own weighted sum of
    squares, so units of measurement do not matter, and a system is well enough conditioned for
    float32. With `ridge` 1, a lone feature's coefficient is halved.
    """

    def __init__(
        self, features: int, outputs: int, device: torch.device = CPU, *, rounded: bool = False
    ) -> None:
        self.xx = _zeros(device, features, features)
        self.xy = _zeros(device, features, outputs)
        self.yy = _zeros(CPU, 1)
        self._rounded = rounded

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums."""
        return self.xx, self.xy, self.yy

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        root = weights.sqrt()[:, None]
        x = features * root
        y = targets * root
        with bfloat16_products(self._rounded):
            for start in range(0, x.shape[1], PANEL_COLUMNS):
                panel = slice(start, start + PANEL_COLUMNS)
                products = x[:, panel].T @ x[:, start:]
                self.xx[panel, start:] += products.to(self.xx.device)
            products = x.T @ y
            self.xy += products.to(self.xy.device)
        squares = y.square().sum(1)
        self.yy += float(as_float64(squares).sum())

    def factor(self, ridge: float) -> Tensor:
        """Return the upper Cholesky factor of the penalized X'WX, for `solve`."""
        squares = self.xx.diagonal()
        penalized = self.xx.float()
        # A feature that is always zero would make the matrix singular; its coefficient is 0.
        least = squares.mean().clamp_min(1e-20) * 1e-9
        penalized.diagonal().copy_(squares * (1 + ridge) + least)
        factor: Tensor = torch.linalg.cholesky(penalized, upper=True)
        return factor

    def solve(self, factor: Tensor, xy: Tensor) -> Tensor:
        """Return the coefficients for X'WY or sums of its columns, float32."""
        return torch.cholesky_solve(xy.float(), factor, upper=True)

    def products(self) -> Tensor:
        """Return X'WX, whole, in float32."""
        upper = self.xx.float().triu_()
        return upper.add_(upper.triu(1).T)

    def sketch(self) -> Tensor:
        """Return X'WY for a few random sums of the targets, alike in each regression."""
        outputs = self.xy[0].numel()
        if outputs <= SKETCH_COLUMNS:
            return self.xy
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(0, 2, (outputs, SKETCH_COLUMNS), generator=generator)
        signs = bits * 2.0 - 1
        return self.xy @ signs.to(self.xy)


class Gains(Ridge):
    """Ridge regression of each channel alone: Y[:, i] from X[:, i]."""

    def __init__(self, channels: int, device: torch.device = CPU) -> None:
        self.xx = _zeros(device, channels)
        self.xy = _zeros(device, channels)
        self.yy = _zeros(CPU, 1)

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        x = as_float64(features)
        y = as_float64(targets)
        w = as_float64(weights)[:, None]
        self.xx += (w * x * x).sum(0)
        self.xy += (w * x * y).sum(0)
        self.yy += float((w * y * y).sum())

    def factor(self, ridge: float) -> Tensor:
        """Return the penalized sums of squares, for `solve`."""
        return (self.xx * (1 + ridge)).clamp_min(1e-30)

    def solve(self, factor: Tensor, xy: Tensor) -> Tensor:
        """Return the coefficients, float64 [channels]."""
        return xy / factor

    def products(self) -> Tensor:
        """Return X'WX, a diagonal matrix."""
        return self.xx.diag()


def _zeros(device: torch.device, *shape: int) -> Tensor:
    place = as_float64(torch.empty(0, device=device)).device
    return torch.zeros(shape, dtype=torch.float64, device=place)


@dataclass(frozen=True)
class BestRidge:
    """The ridge with the least error on the validation text, and its coefficients in float64.

    The error is the weighted sum of squares that is left of the targets.
    """

    ridge: float
    error: float
    coefficients: Tensor


@dataclass(frozen=True)
class _Attempt:
    ridge: float
    error_change: float
    factor: Tensor


def best_ridge(train: Ridge, validation: Ridge, ridges: tuple[float, ...]) -> BestRidge:
    """Return the best of these ridges, which are in ascending order."""
    products = validation.products()
    train_sketch = train.sketch()
    validation_sketch = validation.sketch()

    def attempt(ridge: float) -> _Attempt:
        factor = train.factor(ridge)
        coefficients = train.solve(factor, train_sketch)
        return _Attempt(ridge, _error_change(products, coefficients, validation_sketch), factor)

    # The error has one minimum, so ridges are tried from the middle on, towards less error. A
    # sketch of the targets suffices; only the best ridge is solved for all of them.
    middle = len(ridges) // 2
    best = attempt(ridges[middle])
    for side in (ridges[middle + 1 :], ridges[:middle][::-1]):
        if best.ridge != ridges[middle]:
            break  # the minimum is on the other side
        for ridge in side:
            candidate = attempt(ridge)
            if candidate.error_change >= best.error_change:
                break
            best = candidate
        candidate = best  # frees the other factor, which is as large as the sums
    coefficients = train.solve(best.factor, train.xy).double()
    error = float(validation.yy) + _error_change(products, coefficients, validation.xy)
    return BestRidge(best.ridge, error, coefficients)


def _error_change(products: Tensor, coefficients: Tensor, xy: Tensor) -> float:
    coefficients = coefficients.double()
    # The sum over outputs of b'X'WXb - 2b'X'WY: |Y - Xb|^2 - |Y|^2 with the weights W.
    fitted = (products @ coefficients.to(products)).double()
    change = fitted - 2 * xy
    return float((coefficients * change).sum())

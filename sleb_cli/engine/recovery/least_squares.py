"""Ridge regression from running sums: no activation is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sleb_cli.engine.device import CPU, as_float64

PANEL_COLUMNS = 512
"""Columns of X'X that are computed at once: enough to fill matrix units."""


def ridge_bytes(features: int, outputs: int) -> int:
    """Return the memory for a ridge regression and the sums to judge it by, in bytes of float64.

    There are two pairs of sums, the matrix to factor and its factor, the coefficients and the best ones so far.
    """
    return 8 * (4 * features * features + 4 * features * outputs)


def gram(x: Tensor) -> Tensor:
    """Return X'X of rows [rows, features]. Its upper half is computed panel by panel, the lower half is copied."""
    features = x.shape[1]
    found = x.new_empty(features, features)
    for start in range(0, features, PANEL_COLUMNS):
        end = min(start + PANEL_COLUMNS, features)
        found[start:end, start:] = x[:, start:end].T @ x[:, start:]
        found[end:, start:end] = found[start:end, end:].T
    return found


class Ridge:
    """Weighted least squares from features X [rows, features] to targets Y [rows, outputs], from running sums.

    The sums are X'WX, X'WY and Y'WY, in float64, on the CPU if the device has no float64. The penalty of a coefficient
    is `ridge` times its feature's own weighted sum of squares, so units of measurement do not matter: with `ridge` 1,
    the coefficient of a lone feature is halved.
    """

    def __init__(self, features: int, outputs: int, device: torch.device = CPU) -> None:
        self._make((features, features), (features, outputs), device)

    def _make(self, xx: tuple[int, ...], xy: tuple[int, ...], device: torch.device) -> None:
        place = as_float64(torch.empty(0, device=device)).device
        self.xx = torch.zeros(xx, dtype=torch.float64, device=place)
        self.xy = torch.zeros(xy, dtype=torch.float64, device=place)
        self.yy = torch.zeros(1, dtype=torch.float64)
        self.tensors = self.xx, self.xy, self.yy

    @property
    def bytes_to_solve(self) -> int:
        """About how much memory it takes to solve, with the sums to judge it by."""
        return 4 * (self.xx.nbytes + self.xy.nbytes)

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        root = weights.sqrt()[:, None]
        x, y = features * root, targets * root
        self.xx += as_float64(gram(x))
        self.xy += as_float64(x.T @ y)
        self.yy += float(as_float64(y.square().sum(1)).sum())

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients, float64 in the shape of X'WY."""
        own = self.xx.diagonal()
        # A feature that is always zero would make the matrix singular; its coefficient is 0.
        penalized = self.xx.clone()
        penalized.diagonal().add_(ridge * own + own.mean().clamp_min(1e-30) * 1e-9)
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(penalized))

    def error(self, coefficients: Tensor) -> float:
        """Return the weighted sum of squares that these coefficients leave of Y; they may be fitted to other rows."""
        left = self._times(coefficients) - 2 * self.xy
        return float(self.yy) + float((coefficients * left).sum())

    def _times(self, coefficients: Tensor) -> Tensor:
        return self.xx @ coefficients


class Gains(Ridge):
    """The same regression for each channel alone: Y[:, i] from X[:, i]."""

    def __init__(self, channels: int, device: torch.device = CPU) -> None:
        self._make((channels,), (channels,), device)

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        x, y, w = as_float64(features), as_float64(targets), as_float64(weights)[:, None]
        self.xx += (w * x * x).sum(0)
        self.xy += (w * x * y).sum(0)
        self.yy += float((w * y * y).sum())

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients, float64 [channels]."""
        return self.xy / (self.xx * (1 + ridge)).clamp_min(1e-30)

    def _times(self, coefficients: Tensor) -> Tensor:
        return self.xx * coefficients


def best_ridge(train: Ridge, validation: Ridge, ridges: tuple[float, ...]) -> tuple[float, float, Tensor]:
    """Return the ridge that leaves the least error on the validation text, that error, and the coefficients.

    The error has one minimum, so ridges are tried from the middle on, towards less error.
    """

    def tried(ridge: float) -> tuple[float, float, Tensor]:
        fitted = train.solve(ridge)
        return ridge, validation.error(fitted), fitted

    middle = len(ridges) // 2
    best = tried(ridges[middle])
    for side in (ridges[middle + 1 :], ridges[:middle][::-1]):
        if best[0] == ridges[middle]:
            for ridge in side:  # one after the other, since coefficients are as large as the weights in float64
                found = tried(ridge)
                if found[1] >= best[1]:
                    break
                best = found
    return best

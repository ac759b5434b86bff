"""Ridge regression from running sums: no activation is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sleb_cli.engine.device import as_float64

PANEL_COLUMNS = 512
"""Columns of X'X that are computed at once: enough to fill matrix units."""


def ridge_bytes(features: int, outputs: int) -> int:
    """Return how much memory a ridge regression and the sums to judge it by take, in bytes of float64.

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


class Sums:
    """Sums over rows of features X and targets Y, weighted by W, in float64: X'WX, X'WY and Y'WY; no row is kept."""

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None
        self.yy = 0.0

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        raise NotImplementedError

    def add_sums(self, xx: Tensor, xy: Tensor, yy: Tensor | float) -> None:
        """Add sums over other rows; the first ones are kept, not copied."""
        self.xx = xx if self.xx is None else self.xx.add_(xx)
        self.xy = xy if self.xy is None else self.xy.add_(xy)
        self.yy += float(yy)

    @property
    def tensors(self) -> list[Tensor]:
        """What is to be sent to add it elsewhere."""
        assert self.xx is not None
        assert self.xy is not None
        return [self.xx, self.xy, torch.tensor([self.yy], dtype=torch.float64)]


class Ridge(Sums):
    """Weighted least squares from features X [rows, features] to targets Y [rows, outputs], in float64.

    Only X'WX, X'WY and Y'WY are held, on the CPU if the rows' device has no float64. The penalty of a coefficient is
    `ridge` times its feature's own weighted sum of squares, so units of measurement do not matter: with `ridge` 1, the
    coefficient of a lone feature is halved.
    """

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        root = weights.sqrt()[:, None]
        x, y = features * root, targets * root
        self.add_sums(as_float64(gram(x)), as_float64(x.T @ y), float(as_float64(y.square().sum(1)).sum()))

    @property
    def bytes_to_solve(self) -> int:
        """About how much memory it takes, with the sums to judge it by."""
        return ridge_bytes(*self.xy.shape) if self.xy is not None else 0

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients, float64 [features, outputs]."""
        assert self.xx is not None
        assert self.xy is not None
        own = self.xx.diagonal()
        # A feature that is always zero would make the matrix singular; its coefficient is 0.
        penalty = torch.diag(ridge * own + own.mean().clamp_min(1e-30) * 1e-9)
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(self.xx + penalty))

    def error(self, coefficients: Tensor) -> float:
        """Return the weighted sum of squares that these coefficients leave of Y; they may be fitted to other rows."""
        assert self.xx is not None
        assert self.xy is not None
        return self.yy + float((coefficients * (self.xx @ coefficients - 2 * self.xy)).sum())


class Gains(Sums):
    """The same regression for each channel alone: Y[:, i] from X[:, i]."""

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add some rows; `weights` is [rows]."""
        x, y, w = as_float64(features), as_float64(targets), as_float64(weights)[:, None]
        self.add_sums((w * x * x).sum(0), (w * x * y).sum(0), float((w * y * y).sum()))

    @property
    def bytes_to_solve(self) -> int:
        """About how much memory it takes, with the sums to judge it by."""
        return 48 * len(self.xy) if self.xy is not None else 0

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients, float64 [channels]."""
        assert self.xx is not None
        assert self.xy is not None
        return self.xy / (self.xx * (1 + ridge)).clamp_min(1e-30)

    def error(self, coefficients: Tensor) -> float:
        """Return the weighted sum of squares that these coefficients leave of Y."""
        assert self.xx is not None
        assert self.xy is not None
        return self.yy + float((coefficients * (self.xx * coefficients - 2 * self.xy)).sum())

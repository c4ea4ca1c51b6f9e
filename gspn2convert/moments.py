"""Second moments of what a mixer is fitted on, accumulated over batches in float64.

With equal neighbours and lam = 1 a scan is a fixed spatial operator, so it commutes with any map of the
channels: scans of the full tokens, taken once, serve every choice of the proxy projection.

Shapes: B batch, M patches, C channels, H W grid, S scanned channels, Q global features, F = 4S + Q + 1 features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_kernels import line_scan
from gspn2_kernels.gated import DIRECTIONS


def scan_features(a: Tensor, segment: int) -> Tensor:
    """Scans of every channel in four directions, each over its number of lines.

    Args:
        a: (B, H, W, S) patches.
        segment: lines after which a scan restarts, 0 for none.

    Returns:
        (B, H W, 4S), direction-major.
    """
    batch, height, width, channels = a.shape
    ones = a.new_ones(()).expand(batch, height, width, DIRECTIONS, channels)
    logits = a.new_zeros(()).expand(batch, height, width, DIRECTIONS, 1, 3)
    y = line_scan(a, ones, logits, ones, segment)
    lines = [min(segment, size) if segment else size for size in (height, height, width, width)]
    return (y / a.new_tensor(lines).unsqueeze(-1)).flatten(1, 2).flatten(2)


class Moments:
    """Sums of products of features with each other and with targets.

    Features are [scans (4S) | global features (Q) | 1]. Global features belong to the image, the same for all
    its patches, so their products are formed once an image.

    Attributes:
        gram: (F, F) float64.
        cross: (F, X) float64, X targets.
    """

    def __init__(self, gram: Tensor, cross: Tensor, scans: int) -> None:
        self.gram, self.cross, self.scans = gram, cross, scans

    @classmethod
    def empty(cls, scans: int, global_features: int, targets: int, device: torch.device) -> Moments:
        """Zeros for `scans` = 4S and `global_features` = Q."""
        size = scans + global_features + 1
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        return cls(gram, gram.new_zeros(size, targets), scans)

    def add_gram(self, scans: Tensor, shared: Tensor) -> None:
        """Add the features of a batch: scans (B, M, 4S) and global features (B, Q)."""
        n, patches = self.scans, scans.shape[1]
        shared = F.pad(shared, (0, 1), value=1.0).double()
        between = scans.sum(1, dtype=torch.float64).T @ shared
        flat = scans.flatten(0, 1)
        self.gram[:n, :n] += flat.T @ flat
        self.gram[:n, n:] += between
        self.gram[n:, :n] += between.T
        self.gram[n:, n:] += patches * shared.T @ shared

    def add_cross(self, scans: Tensor, shared: Tensor, targets: Tensor) -> None:
        """Add the products of the features with targets (B, M, X)."""
        n = self.scans
        shared = F.pad(shared, (0, 1), value=1.0).double()
        self.cross[:n] += scans.flatten(0, 1).T @ targets.flatten(0, 1)
        self.cross[n:] += shared.T @ targets.sum(1, dtype=torch.float64)

    def project(self, down: Tensor) -> Moments:
        """The moments after the proxy projection `down` (S, R): features [scans (4R) | global | 1]."""
        rest = self.gram.shape[0] - self.scans
        eye = torch.eye(rest, dtype=self.gram.dtype, device=self.gram.device)
        basis = torch.block_diag(*[down.to(self.gram)] * DIRECTIONS, eye)
        return Moments(basis.T @ self.gram @ basis, basis.T @ self.cross, DIRECTIONS * down.shape[1])


def ridge_solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Coefficients (F, X) of least squares with the penalty `ridge * diag(gram)`; the last feature, 1, goes free.

    The diagonal penalty is the expected damage of multiplicative noise of variance `ridge` on the features:
    it keeps opposite scans, nearly collinear, from fitting with large cancelling coefficients.
    """
    penalty = ridge * gram.diagonal().clone()
    penalty[-1] = 0
    # Directions that the data never show get a coefficient of zero instead of a singular system.
    floor = 1e-10 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(gram + torch.diag(penalty + floor), cross)


def local_moments(a: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel moments of the 3x3 neighbourhood, for the LPU.

    Args:
        a: (B, H, W, C) patches.
        residual: (B, H, W, C) what the LPU is to explain.

    Returns:
        (C, 9, 9) and (C, 9) sums in float64.
    """
    height, width, channels = a.shape[1:]
    padded = F.pad(a, (0, 0, 1, 1, 1, 1))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    windows = torch.stack(shifts, -1).permute(3, 0, 1, 2, 4).reshape(channels, -1, 9)
    target = residual.permute(3, 0, 1, 2).reshape(channels, -1, 1)
    return (windows.mT @ windows).double(), (windows.mT @ target).squeeze(-1).double()

"""The GSPN-2 mixer that stands where an attention layer stood.

    y = sum_d U_d [u_d * scan_d(w_d, lam_d * (a D))] / lines_d + LPU(a) + G [mean(a), prefix] + gated prefix + b

The four scans in a small proxy dimension with channel-shared weights and the LPU follow GSPN-2 (sections 3.2
and 4.2); the global branch G and the exact prefix read go beyond it.

Shapes: B batch, N = P + H W tokens, P prefix tokens, C channels, R proxy dimension, H W grid, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from gspn2_kernels import line_scan, local_perception, local_residual
from gspn2convert.prefix import PrefixRead

DIRECTIONS = 4
NEIGHBOURS = 3


class Gspn2Mixer(nn.Module):
    """Four-direction line scan in a proxy dimension, with local, global and prefix parts.

    Args:
        attention: timm `Attention` that is replaced. Its projections serve the prefix read, so their
            inherited weights stay where there are prefix tokens.
        has_prefix: whether class or register tokens precede the patches.
        proxy_dim: R, channels of the scan.
        groups: G, groups of proxy channels that share propagation weights; 1 is the paper's form.
        segment: lines after which a scan restarts (GSPN-local); 0 scans the whole grid.
        lpu: local perception unit, a depthwise 3x3 convolution.
        global_branch: linear map of the mean patch and the first prefix token, added to every patch.
        prefix: "exact" reads the prefix tokens with the teacher's attention, "pool" with uniform weights.
        prefix_gate: whether patches read the prefix tokens.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        has_prefix: bool,
        proxy_dim: int,
        groups: int = 1,
        segment: int = 0,
        lpu: bool = True,
        global_branch: bool = True,
        prefix: str = "exact",
        prefix_gate: bool = True,
    ) -> None:
        super().__init__()
        weight = attention.qkv.weight
        dim, device, dtype = weight.shape[1], weight.device, weight.dtype
        self.proxy_dim, self.groups, self.segment = proxy_dim, groups, segment
        self.down = nn.Linear(dim, proxy_dim, bias=False, device=device, dtype=dtype)
        # Predicting from a wide latent costs R (8R + 12) instead of C (8R + 12); a narrow one knows too little.
        self.from_latent = 16 * proxy_dim >= dim
        packed = 2 * DIRECTIONS * proxy_dim + DIRECTIONS * groups * NEIGHBOURS
        self.control = nn.Linear(proxy_dim if self.from_latent else dim, packed, device=device, dtype=dtype)
        self.prefix: PrefixRead | None = None
        if has_prefix:
            self.prefix = PrefixRead(attention, exact=prefix == "exact", gate=prefix_gate)
        self.lpu = (
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, device=device, dtype=dtype) if lpu else None
        )
        self.shared: nn.Linear | None = None
        if global_branch:
            self.shared = nn.Linear((1 + has_prefix) * dim, dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(DIRECTIONS * proxy_dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as an unweighted scan: lam = u = 1, equal neighbours, no content dependence, silent side branches."""
        scan = 2 * DIRECTIONS * self.proxy_dim
        nn.init.zeros_(self.control.weight)
        with torch.no_grad():
            self.control.bias.zero_()[:scan] = 1.0
        for branch in (self.lpu, self.shared):
            if branch is not None:
                nn.init.zeros_(branch.weight)
        if self.prefix is not None:
            self.prefix.reset_parameters()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are new: all but the attention weights that the prefix read took over."""
        named = self.named_parameters()
        return {name: p for name, p in named if not name.startswith("prefix.") or name.startswith("prefix.log_sum.")}

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, N, C) tokens after the block's first norm, prefix tokens first.
            grid: H, W of the patches; N - H W tokens before them are prefix tokens.

        Returns:
            (B, N, C), in place of the attention layer's output, before LayerScale.
        """
        base, row, prefix_out = self._read(x, grid)
        if self.lpu is not None:
            base = local_perception(self._patches(x, grid), self.lpu.weight, base)
        out = base.flatten(1, 2)
        if row is not None:
            out = out + row.unsqueeze(1)
        return out if prefix_out is None else torch.cat([prefix_out, out], 1)

    def add_to(self, residual: Tensor, x: Tensor, grid: tuple[int, int], gamma: Tensor | None) -> Tensor:
        """Compute residual + gamma * self(x, grid) in fewer passes over memory, for inference.

        Args:
            residual: (B, N, C) stream of the block.
            x: As in `forward`.
            grid: As in `forward`.
            gamma: LayerScale (C,), or None for 1.
        """
        base, row, prefix_out = self._read(x, grid)
        weight = None if self.lpu is None else self.lpu.weight
        out = local_residual(self._patches(x, grid), weight, base, row, self._patches(residual, grid), gamma)
        if prefix_out is None:
            return out.flatten(1, 2)
        scaled = prefix_out if gamma is None else gamma * prefix_out
        return torch.cat([residual[:, : scaled.shape[1]] + scaled, out.flatten(1, 2)], 1)

    def _read(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All parts but the LPU: for each patch (B, H, W, C), for all patches alike (B, C), for prefix tokens."""
        patches = self._patches(x, grid)
        base = self.propagate(patches)
        row = None
        if self.shared is not None:
            summary = [patches.mean((1, 2))] + ([x[:, 0]] if self.prefix is not None else [])
            row = self.shared(torch.cat(summary, -1))
        if self.prefix is None:
            return base, row, None
        prefix_out, share = self.prefix(x, x.shape[1] - grid[0] * grid[1])
        return base if share is None else base + share.unflatten(1, grid), row, prefix_out

    @staticmethod
    def _patches(x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) without the prefix, on their grid (B, H, W, C)."""
        return x[:, x.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)

    def propagate(self, a: Tensor) -> Tensor:
        """The scan of patches (B, H, W, C) on their grid, merged; the merge's bias included."""
        height, width = a.shape[1], a.shape[2]
        latent = self.down(a)
        # Three products instead of one: each result is contiguous, which the scan reads fastest, and no gradient of
        # a part has to be copied into that of the whole.
        scan = DIRECTIONS * self.proxy_dim
        sizes = [scan, scan, DIRECTIONS * self.groups * NEIGHBOURS]
        parts = zip(self.control.weight.split(sizes), self.control.bias.split(sizes), strict=True)
        source = latent if self.from_latent else a
        lam, u, logits = (F.linear(source, weight, bias) for weight, bias in parts)
        y = line_scan(
            latent,
            lam.unflatten(-1, (DIRECTIONS, self.proxy_dim)),
            logits.unflatten(-1, (DIRECTIONS, self.groups, NEIGHBOURS)),
            u.unflatten(-1, (DIRECTIONS, self.proxy_dim)),
            self.segment,
        )
        return F.linear(y.flatten(-2), self.merge_weight(height, width), self.proj.bias)

    def merge_weight(self, height: int, width: int) -> Tensor:
        """Weight (C, 4R) of the merge, each direction over its number of lines.

        A scan adds up its lines; divided by them it is a mean, as attention is, and keeps its size
        when the image grows.
        """
        # Symbolic while a model is exported with dynamic sizes.
        lines: list[Any] = [torch.sym_min(self.segment, size) if self.segment else size for size in (height, width)]
        vertical, horizontal = self.proj.weight.chunk(2, 1)
        return torch.cat([vertical / lines[0], horizontal / lines[1]], 1)

"""The GSPN-2 mixer that stands where an attention layer stood.

    y = sum_d U_d [u_d * scan_d(w_d, lam_d * (a D))] / lines_d + LPU(a) + G [mean(a), prefix] + read + b

The four scans in a small proxy dimension with channel-shared weights and the LPU follow GSPN-2 (sections 3.2
and 4.2); the global branch G, the exact prefix read, and what patches read of prefix tokens and regions go beyond it.

Shapes: B batch, N = P + H W tokens, P prefix tokens, C channels, R proxy dimension, H W grid, G groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gspn2_kernels import Normed, beside, divide, gated_scan, local_perception, merge, norm_tokens, project
from gspn2_kernels.gated import DIRECTIONS, NEIGHBOURS
from gspn2_kernels.operands import at_most, autocast
from gspn2convert.prefix import PrefixRead

# What a backward does not compute anew, within what it does.
_KEEP_SCANS = partial(
    create_selective_checkpoint_contexts,
    [torch.ops.gspn2.line_scan.default, torch.ops.gspn2.line_scan_train.default],
)


class Gspn2Mixer(nn.Module):
    """Four-direction line scan in a proxy dimension, with local, global and prefix parts.

    Args:
        attention: timm `Attention` that is replaced. Its projections serve the prefix read, so their
            inherited weights stay where there are prefix tokens or regions.
        has_prefix: whether class or register tokens precede the patches.
        proxy_dim: R, channels of the scan.
        groups: G, groups of proxy channels that share propagation weights; 1 is the paper's form.
        segment: lines after which a scan restarts (GSPN-local); 0 scans the whole grid.
        lpu: local perception unit, a depthwise 3x3 convolution.
        global_branch: linear map of the mean patch and the first prefix token, added to every patch.
        prefix: "exact" reads the prefix tokens with the teacher's attention, "pool" with uniform weights.
        prefix_gate: whether patches read the prefix tokens.
        regions: rows and columns of equal parts of the image, whose means patches read with the teacher's attention; 0
            to 16, 0 for none.

    Raises:
        ValueError: of `prefix`, `segment` or `regions`.
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
        regions: int = 0,
    ) -> None:
        super().__init__()
        weight = attention.qkv.weight
        dim, device, dtype = weight.shape[1], weight.device, weight.dtype
        if prefix not in ("exact", "pool") or not isinstance(segment, int) or not 0 <= segment < 1 << 31:
            raise ValueError(f"prefix {prefix!r}, segment {segment!r}: expected exact or pool, and 0 to 2^31 - 1 lines")
        self.proxy_dim, self.groups, self.segment, self.regions = proxy_dim, groups, segment, regions
        self.down = nn.Linear(dim, proxy_dim, bias=False, device=device, dtype=dtype)
        # Predicting from a wide latent costs R (8R + 12) instead of C (8R + 12); a narrow one knows too little.
        # C-GSPN predicts from a latent of C/18.
        self.from_latent = 18 * proxy_dim >= dim
        packed = 2 * DIRECTIONS * proxy_dim + DIRECTIONS * groups * NEIGHBOURS
        self.control = nn.Linear(proxy_dim if self.from_latent else dim, packed, device=device, dtype=dtype)
        self.prefix: PrefixRead | None = None
        self.has_prefix = has_prefix
        if has_prefix or regions:
            exact = prefix == "exact"
            self.prefix = PrefixRead(attention, has_prefix=has_prefix, exact=exact, gate=prefix_gate, regions=regions)
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
        # Once, and not for each of the products that read the tokens, nor for the gradient of each.
        (x,) = autocast(x.device.type, x)
        prefix = x.shape[1] - grid[0] * grid[1]
        patches = x[:, prefix:].unflatten(1, grid)
        out = F.linear(self.scan(x, grid).flatten(-2), divide(self.proj.weight, self._lines(grid)))
        if self.lpu is not None:
            out = local_perception(patches, self.lpu.weight, out)
        row = self._row(patches.mean((1, 2)), x[:, :prefix])
        prefix_out, share, values = (None, None, None) if self.prefix is None else self.prefix(x, grid)
        out = out.flatten(1, 2)
        if share is not None and values is not None:
            out = torch.baddbmm(out, share, values) if values.ndim == 3 else out + share @ values
        out = out + row.unsqueeze(1)
        return out if prefix_out is None else torch.cat([prefix_out, out], 1)

    def add_to(self, residual: Tensor, norm: nn.LayerNorm, grid: tuple[int, int], gamma: Tensor | None) -> Tensor:
        """Compute residual + gamma * self(norm(residual), grid) in fewer passes over memory, for inference.

        Args:
            residual: (B, N, C) stream of the block.
            norm: the block's first norm.
            grid: as in `forward`.
            gamma: LayerScale (C,), or None for 1.
        """
        prefix = residual.shape[1] - grid[0] * grid[1]
        normed = norm_tokens(residual, norm.weight, norm.bias, norm.eps, prefix)
        (row, prefix_out, share, values), y = beside(
            residual, lambda: self._read(normed, grid), lambda: self._scan_normed(normed, grid)
        )
        filters, lines = None if self.lpu is None else self.lpu.weight, self._lines(grid)
        values = None if values is None else values.expand(y.shape[0], -1, -1)
        return merge(normed, y, self.proj.weight, lines, filters, share, values, row, gamma, prefix_out)

    def _read(
        self, normed: Normed, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What patches get beside their scans, and the prefix tokens: a row, `merge` says what else."""
        row = self._row(normed.mean, normed.first)
        return row, *((None, None, None) if self.prefix is None else self.prefix.of_normed(normed, grid))

    def _scan_normed(self, normed: Normed, grid: tuple[int, int]) -> Tensor:
        """The four scans (B, H, W, 4, R) of the patches, each times its gate."""
        if type(self.down) is nn.Linear:
            latent = project(normed, self.down.weight)
        else:  # with an adapter, for example
            latent = self.down(normed.written()[:, normed.first.shape[1] :])
        return self._gated_scan(latent, latent if self.from_latent else normed, grid)

    def _row(self, mean: Tensor, first: Tensor) -> Tensor:
        """What all patches of an image get (B, C), by the mean patch (B, C) and the prefix tokens (B, P, C)."""
        if self.shared is None:
            return self.proj.bias.expand(mean.shape[0], -1)
        summary = torch.cat([mean, first[:, 0]], -1) if self.has_prefix else mean
        return F.linear(summary, self.shared.weight, self.proj.bias)

    def scan(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The four scans (B, H, W, 4, R) of tokens (B, N, C), each times its gate."""
        latent = self.down(x)
        source = latent if self.from_latent else x
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._gated_scan(latent, source, grid)
        # lam, u and logits are 8 R + 12 G numbers a patch, and a product of R: the backward makes them again.
        out: Tensor = checkpoint(
            *(self._gated_scan, latent, source, grid),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_KEEP_SCANS,
        )
        return out

    def _gated_scan(self, latent: Tensor, source: Tensor | Normed, grid: tuple[int, int]) -> Tensor:
        """The scans of the latent (B, N, R), each times its gate.

        Inputs' scale, gate and logits are linear in the source: the latent, or the normed tokens. Where prefix tokens
        are left out, N = H W.
        """
        control = self.control.weight, self.control.bias
        return gated_scan(latent, source, *control, grid, self.groups, self.segment)

    def _lines(self, grid: tuple[int, int]) -> list[Any]:
        """How many lines a scan adds up, along the columns and along the rows; symbolic in an export for any size."""
        return [at_most(size, self.segment) if self.segment else size for size in grid]

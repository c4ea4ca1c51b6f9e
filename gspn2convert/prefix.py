"""Exact reading of class and register tokens, in time linear in the number of tokens, and of an image's regions.

GSPN-2 leaves class tokens to future work. Here the prefix tokens keep the teacher's own softmax
attention over all tokens, with its inherited weights. Only P queries exist, so the key and value
projections fold into them: no key or value of a patch is ever formed, and the cost is O(P N C) a head.
Patches read the prefix tokens back through one gate a head. Where they read regions too, the means of K equal parts
of the image stand for all patches in the teacher's attention, O(K N C) a head.

Shapes: B batch, N = P + M tokens, P prefix tokens, M = H W patches, C channels, h heads, d head dimension, K regions,
S tokens that patches read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from gspn2_kernels import Normed, read_prefix


class PrefixRead(nn.Module):
    """What prefix tokens read from all tokens, and what patches read from the prefix tokens and from regions.

    Takes over the projections of the attention layer that it replaces.

    Args:
        attention: timm `Attention`; its qkv, q_norm, k_norm and proj modules become part of this one.
        has_prefix: whether there are prefix tokens.
        exact: True for the teacher's softmax; False pools all tokens uniformly.
        gate: whether patches read the prefix tokens.
        regions: rows and columns of regions whose means patches read, 0 for none.
    """

    def __init__(
        self, attention: Attention, *, has_prefix: bool = True, exact: bool, gate: bool, regions: int = 0
    ) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scale
        self.has_prefix, self.exact = has_prefix, exact and has_prefix
        self.gate, self.regions = gate and has_prefix, regions
        self.qkv: nn.Linear = attention.qkv
        self.q_norm: nn.Module = attention.q_norm
        self.k_norm: nn.Module = attention.k_norm
        self.proj: nn.Linear = attention.proj
        weight = self.qkv.weight
        self.log_sum: nn.Linear | None = None
        if self.gate and not regions:
            self.log_sum = nn.Linear(weight.shape[1], self.num_heads, device=weight.device, dtype=weight.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Silence what is not inherited: without a fit, the gate weighs a prefix token as if the patches scored 0."""
        if self.log_sum is not None:
            nn.init.zeros_(self.log_sum.weight)
            nn.init.zeros_(self.log_sum.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Read in both directions.

        Args:
            x: (B, N, C) normalised tokens, prefix tokens first.
            grid: H, W of the patches.

        Returns:
            (B, P, C), equal to the rows of the teacher's attention output when `exact`, None without prefix tokens;
            then, None where patches read nothing, how much each patch takes, (B, M, S h), of S h values (B, S h, C):
            the product of the two is the share of what is read in the patches' attention output.
        """
        prefix = x.shape[1] - grid[0] * grid[1]
        if not (self.exact or self.gate or self.regions):
            return self._read(x, prefix, None), None, None
        tokens = x[:, :prefix]
        if self.regions:
            tokens = torch.cat([tokens, region_means(x[:, prefix:].unflatten(1, grid), self.regions)], 1)
        projected = _by_rows(self.qkv, tokens)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        first = 0 if self.gate else prefix
        query, key, value = query[:, :prefix], key[:, first:], value[:, first:]
        read, gate = (self._folded_scores if self._folds() else self._scores)(x, query, key)
        out = self._read(x, prefix, read) if self.has_prefix else None
        if gate is None:
            return out, None, None
        # Softmax over the prefix tokens and the mass of all patches, exact where log_sum is; or the means of regions.
        share = gate.softmax(2, dtype=torch.float32).to(x.dtype).flatten(2)
        weight = self.proj.weight.view(-1, self.num_heads, self.head_dim)
        values = torch.einsum("bphd,chd->bphc", value, weight)
        if self.log_sum is not None:
            # The mass of the patches brings nothing.
            values = torch.cat([values, values.new_zeros(values.shape[0], 1, *values.shape[2:])], 1)
        return out, share, values.flatten(1, 2)

    def of_normed(self, normed: Normed, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same of normed tokens, for inference: where they are not written, and can stay so, by kernels.

        All that is done is small, and launches of its own would take longer than what they do.
        """
        if normed.tokens is not None or not self._folds() or not self.exact or self.log_sum is None:
            return self(normed.written(), grid)
        weights = (self.qkv.weight, self.qkv.bias, self.proj.weight, self.log_sum.weight, self.log_sum.bias)
        projected = _by_rows(self.qkv, normed.first)
        inner, share, values = read_prefix(normed, projected, *weights, self.num_heads, self.scale)
        return _by_rows(self.proj, inner), share, values

    def _folds(self) -> bool:
        """Whether queries and keys are linear in the tokens, so that one side's fold into the other's weight."""
        return isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)

    def log_sum_exp(self, x: Tensor, prefix: int) -> Tensor:
        """The true log-sum-exp of each patch's attention scores over all patches, which the gate predicts.

        Quadratic in M; used by the fit alone.

        Returns:
            (B, M, h).
        """
        patches = x[:, prefix:]
        q = self.q_norm(self._heads(patches, 0)).transpose(1, 2)
        k = self.k_norm(self._heads(patches, 1)).transpose(1, 2)
        return (self.scale * q @ k.transpose(2, 3)).logsumexp(-1).transpose(1, 2)

    def _folded_scores(self, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scores of all tokens for the prefix tokens, and of what patches read for the patches.

        All are products of tokens with vectors that depend on the read tokens alone: one product makes them, and
        reads the tokens once.

        Args:
            x: (B, N, C).
            query: (B, P, h, d), of the prefix tokens.
            key: (B, S, h, d), of the tokens that patches read.

        Returns:
            (B, N, P h) and padding, None when not `exact`; (B, M, S, h), the mass last where there is one, or None if
            patches read nothing.
        """
        prefix, rows, columns = query.shape[1], [], 0
        weight, bias = self._weights()
        if self.gate or self.regions:
            # Keys fold into the weights of patches' queries.
            rows = [torch.einsum("bshd,hdc->bshc", self.scale * key, weight[0]).flatten(1, 2)]
            columns = key.shape[1] * self.num_heads
        if self.log_sum is not None:
            rows.append(self.log_sum.weight.expand(x.shape[0], -1, -1))
            columns += self.num_heads
        if self.exact:
            # Queries fold into the weights of keys, whose bias shifts all scores of a query alike: the softmax does
            # not see it. Products with columns in other than eights are slow ones on a GPU.
            folded = torch.einsum("bphd,hdc->bphc", self.scale * query, weight[1]).flatten(1, 2)
            rows += [x.new_zeros(x.shape[0], -columns % 8, x.shape[2]), folded]
            rows += [x.new_zeros(x.shape[0], -prefix * self.num_heads % 8, x.shape[2])]
        scores = x @ torch.cat([part for part in rows if part.shape[1]], 1).mT
        read = scores[..., columns + -columns % 8 :] if self.exact else None
        if not columns:
            return read, None
        gate = scores[:, prefix:, :columns].unflatten(2, (-1, self.num_heads))
        level = key.new_zeros(key.shape[:3]) if bias is None else self.scale * (key * bias[0]).sum(-1)
        level = self._weigh(level, 1, x.shape[1] - prefix)
        if self.log_sum is not None:
            level = torch.cat([level, self.log_sum.bias.expand(x.shape[0], 1, -1)], 1)
        return read, gate + level.unsqueeze(1)

    def _scores(self, x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The same where queries or keys are normed, which takes those of the patches."""
        prefix, read = query.shape[1], None
        if self.exact:
            keys = self.k_norm(self._heads(x, 1))
            read = torch.einsum("bphd,bnhd->bnph", self.scale * self.q_norm(query), keys).flatten(2)
        if not (self.gate or self.regions):
            return read, None
        patches = x[:, prefix:]
        queries = self.scale * self.q_norm(self._heads(patches, 0))
        gate = self._weigh(torch.einsum("bmhd,bshd->bmsh", queries, self.k_norm(key)), 2, patches.shape[1])
        if self.log_sum is not None:
            gate = torch.cat([gate, self.log_sum(patches).unsqueeze(2)], 2)
        return read, gate

    def _weigh(self, scores: Tensor, dim: int, patches: int) -> Tensor:
        """Raise the scores of regions, the last along a dimension: each stands for a part of the patches."""
        if not self.regions:
            return scores
        regions = self.regions**2
        alone, raised = scores.split([scores.shape[dim] - regions, regions], dim)
        share = scores.new_full((), patches, dtype=torch.float32) / regions
        return torch.cat([alone, raised + share.log().to(scores.dtype)], dim)

    def _read(self, x: Tensor, prefix: int, scores: Tensor | None) -> Tensor:
        """What prefix tokens read (B, P, C), by their scores of all tokens or, when not `exact`, uniformly."""
        if self.exact:
            assert scores is not None
            # Softmax along memory, then back to rows of heads: whatever N is, the product's rows are aligned.
            weights = scores.mT.softmax(-1, dtype=torch.float32).to(x.dtype).mT.contiguous()
            pooled = (weights.mT @ x)[:, : prefix * self.num_heads].unflatten(1, (prefix, self.num_heads))
        else:
            pooled = x.mean(1, keepdim=True).unsqueeze(2).expand(-1, prefix, self.num_heads, -1)
        weight, bias = self._weights()
        read = torch.einsum("bphc,hdc->bphd", pooled, weight[2])
        if bias is not None:
            read = read + bias[2]
        return _by_rows(self.proj, read.flatten(2))

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Weights (3, h, d, C) and biases (3, h, d) of query, key and value."""
        shape = (3, self.num_heads, self.head_dim)
        return self.qkv.weight.view(*shape, -1), None if self.qkv.bias is None else self.qkv.bias.view(shape)

    def _heads(self, x: Tensor, which: int) -> Tensor:
        """Project tokens (B, n, C) to the heads' queries (0) or keys (1), (B, n, h, d)."""
        weight, bias = self._weights()
        projected = F.linear(x, weight[which].flatten(0, 1), None if bias is None else bias[which].flatten())
        return projected.unflatten(-1, (self.num_heads, self.head_dim))


def region_means(patches: Tensor, regions: int) -> Tensor:
    """Means of the equal parts of a grid.

    Args:
        patches: (B, H, W, C).
        regions: rows and columns of parts; a patch on a border counts on both sides by its share.

    Returns:
        (B, regions^2, C), row by row.
    """
    rows, columns = (_overlaps(size, regions, patches) for size in patches.shape[1:3])
    means = rows @ (columns @ patches).flatten(2)
    return means.unflatten(2, (regions, -1)).flatten(1, 2)


def _overlaps(size: int, regions: int, like: Tensor) -> Tensor:
    """What each position of a line (size,) is of each of its equal parts, (regions, size); each part's sum is 1."""
    edges = torch.arange(regions + 1, device=like.device, dtype=torch.float32).unsqueeze(1) * size / regions
    start = torch.arange(size, device=like.device, dtype=torch.float32)
    overlap = torch.minimum(start + 1, edges[1:]) - torch.maximum(start, edges[:-1])
    return (overlap.clamp_min(0) * regions / size).to(like.dtype)


def _by_rows(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Apply a linear layer to tokens (B, P, C) as to rows of a matrix.

    An ONNX graph multiplies those by the weight as it is, and transposes it for tokens. Where images are padded in the
    graph, P is a symbol there, which torch can't flatten.
    """
    if not isinstance(tokens.shape[1], int):
        return linear(tokens)
    rows: Tensor = linear(tokens.flatten(0, 1))
    return rows.unflatten(0, tokens.shape[:2])

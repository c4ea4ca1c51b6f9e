"""Exact reading of class and register tokens, in time linear in the number of tokens.

GSPN-2 leaves class tokens to future work. Here the prefix tokens keep the teacher's own softmax
attention over all tokens, with its inherited weights. Only P queries exist, so the key and value
projections fold into them: no key or value of a patch is ever formed, and the cost is O(P N C) a head.
Patches read the prefix tokens back through one gate a head.

Shapes: B batch, N = P + M tokens, P prefix tokens, M patches, C channels, h heads, d head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn


class PrefixRead(nn.Module):
    """What prefix tokens read from all tokens, and what patches read from the prefix tokens.

    Takes over the projections of the attention layer that it replaces.

    Args:
        attention: timm `Attention`; its qkv, q_norm, k_norm and proj modules become part of this one.
        exact: True for the teacher's softmax; False pools all tokens uniformly.
        gate: whether patches read the prefix tokens.
    """

    def __init__(self, attention: Attention, *, exact: bool, gate: bool) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scale
        self.exact = exact
        self.qkv: nn.Linear = attention.qkv
        self.q_norm: nn.Module = attention.q_norm
        self.k_norm: nn.Module = attention.k_norm
        self.proj: nn.Linear = attention.proj
        weight = self.qkv.weight
        self.log_sum: nn.Linear | None = None
        if gate:
            self.log_sum = nn.Linear(weight.shape[1], self.num_heads, device=weight.device, dtype=weight.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Silence what is not inherited: without a fit, the gate weighs a prefix token as if the patches scored 0."""
        if self.log_sum is not None:
            nn.init.zeros_(self.log_sum.weight)
            nn.init.zeros_(self.log_sum.bias)

    def forward(self, x: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
        """Read in both directions.

        Args:
            x: (B, N, C) normalised tokens, prefix tokens first.
            prefix: P, at least 1.

        Returns:
            (B, P, C), equal to the rows of the teacher's attention output when `exact`, and (B, M, C),
            the share of the prefix tokens in the patches' attention output, or None without a gate.
        """
        return self._read_all(x, prefix), self._read_prefix(x, prefix) if self.log_sum is not None else None

    def log_sum_exp(self, x: Tensor, prefix: int) -> Tensor:
        """The true log-sum-exp of each patch's attention scores over all patches, which the gate predicts.

        Quadratic in M; used by the fit alone.

        Returns:
            (B, M, h).
        """
        query, key, _ = self._weights()
        patches = x[:, prefix:]
        q = self.q_norm(self._heads(patches, query)).transpose(1, 2)
        k = self.k_norm(self._heads(patches, key)).transpose(1, 2)
        return (self.scale * q @ k.transpose(2, 3)).logsumexp(-1).transpose(1, 2)

    def _read_all(self, x: Tensor, prefix: int) -> Tensor:
        batch, tokens, channels = x.shape
        query, key, value = self._weights()
        if self.exact:
            q = self.scale * self.q_norm(self._heads(x[:, :prefix], query))
            if isinstance(self.k_norm, nn.Identity):
                # A key's bias shifts all scores of a query alike: the softmax does not see it.
                folded = torch.einsum("bphd,hdc->bphc", q, key[0]).reshape(batch, -1, channels)
                scores = folded @ x.transpose(1, 2)
            else:
                k = self.k_norm(self._heads(x, key))
                scores = torch.einsum("bphd,bnhd->bphn", q, k).reshape(batch, -1, tokens)
            pooled = scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ x
            pooled = pooled.view(batch, prefix, self.num_heads, channels)
        else:
            pooled = x.mean(1, keepdim=True).unsqueeze(2).expand(batch, prefix, self.num_heads, channels)
        read = torch.einsum("bphc,hdc->bphd", pooled, value[0])
        if value[1] is not None:
            read = read + value[1]
        out: Tensor = self.proj(read.flatten(2))
        return out

    def _read_prefix(self, x: Tensor, prefix: int) -> Tensor:
        assert self.log_sum is not None
        query, key, value = self._weights()
        patches = x[:, prefix:]
        k = self.scale * self.k_norm(self._heads(x[:, :prefix], key))
        if isinstance(self.q_norm, nn.Identity):
            folded = torch.einsum("bphd,hdc->bhpc", k, query[0])
            scores = torch.einsum("bmc,bhpc->bmhp", patches, folded)
            if query[1] is not None:
                scores = scores + torch.einsum("bphd,hd->bhp", k, query[1]).unsqueeze(1)
        else:
            scores = torch.einsum("bmhd,bphd->bmhp", self.q_norm(self._heads(patches, query)), k)
        # Softmax over the prefix tokens and the mass of all patches: exact where log_sum is.
        scores = torch.cat([scores, self.log_sum(patches).unsqueeze(-1)], -1)
        share = scores.softmax(-1, dtype=torch.float32)[..., :prefix].to(x.dtype)
        v = self._heads(x[:, :prefix], value)
        out_weight = self.proj.weight.view(-1, self.num_heads, self.head_dim)
        projected = torch.einsum("bphd,chd->bhpc", v, out_weight)
        return share.flatten(2) @ projected.flatten(1, 2)

    def _weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weights (h, d, C) and biases (h, d) of query, key and value."""
        shape = (3, self.num_heads, self.head_dim)
        weight = self.qkv.weight.view(*shape, -1)
        if self.qkv.bias is None:
            return [(weight[i], None) for i in range(3)]
        bias = self.qkv.bias.view(shape)
        return [(weight[i], bias[i]) for i in range(3)]

    def _heads(self, x: Tensor, part: tuple[Tensor, Tensor | None]) -> Tensor:
        """Project tokens (B, n, C) to heads (B, n, h, d)."""
        weight, bias = part
        projected = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return projected.unflatten(-1, (self.num_heads, self.head_dim))

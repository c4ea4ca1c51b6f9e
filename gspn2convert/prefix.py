"""Exact reading of class and register tokens in time linear in the number of tokens, and of an image's regions.

GSPN-2 leaves class tokens to future work. Here the prefix tokens keep the teacher's own softmax
attention over all tokens, with its inherited weights. Only P queries exist, so the key and value
projections fold into them: no key or value of a patch is ever formed, and the cost is O(P N C) a head.
Patches read the prefix tokens back through one gate a head. Or they attend to the prefix tokens and to the means of
equal parts of the image, its regions, each of which stands for its patches: the teacher's attention at a low
resolution, and linear in the patches too.

Shapes: B batch, N = P + M tokens, P prefix tokens, M = H W patches, C channels, h heads, d head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from gspn2_kernels import Normed, read_prefix
from gspn2convert.regions import region_means


class PrefixRead(nn.Module):
    """What prefix tokens read from all tokens, and what patches read from the prefix tokens and from regions.

    Takes over the projections of the attention layer that it replaces.

    Args:
        attention: timm `Attention`; its qkv, q_norm, k_norm and proj modules become part of this one.
        has_prefix: whether there are prefix tokens.
        exact: True for the teacher's softmax; False pools all tokens uniformly.
        gate: whether patches read the prefix tokens.
        regions: rows and columns of regions that patches read, 0 for none.

    Raises:
        ValueError: of `regions`.
    """

    def __init__(
        self, attention: Attention, *, has_prefix: bool = True, exact: bool, gate: bool, regions: int = 0
    ) -> None:
        super().__init__()
        if type(regions) is not int or not 0 <= regions <= 16:
            raise ValueError(f"regions {regions!r}: expected an integer from 0 to 16")
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scale
        self.exact = exact and has_prefix
        self.gate = gate and has_prefix
        self.has_prefix, self.regions = has_prefix, regions
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
            then, None where patches read nothing, how much each patch takes, (B, M, S), of S values (B, S, C), or
            (S, C) for those of all images: the product of the two is what is read in the patches' attention output.
        """
        prefix = x.shape[1] - grid[0] * grid[1]
        out, share, values = self._exchange(x, prefix) if self.has_prefix else (None, None, None)
        if self.regions:
            share, values = self._attend(x, prefix, grid)
        return out, share, values

    def _exchange(self, x: Tensor, prefix: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What prefix tokens read, and what patches read of them through the gate: as `forward`."""
        if not self.exact and self.log_sum is None:
            return self._read(x, prefix, None), None, None
        projected = _by_rows(self.qkv, x[:, :prefix])
        query, key, value = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        read, gate = self._folded_scores(x, query, key) if self._folds() else self._scores(x, query)
        out = self._read(x, prefix, read)
        if gate is None:
            return out, None, None
        # Softmax over the prefix tokens and the mass of all patches: exact where log_sum is.
        share = gate.softmax(2, dtype=torch.float32).to(x.dtype).flatten(2)
        weight = self.proj.weight.view(-1, self.num_heads, self.head_dim)
        # The mass of the patches brings nothing.
        values = torch.einsum("bphd,chd->bphc", value, weight)
        nothing = values.new_zeros(values.shape[0], 1, *values.shape[2:])
        return out, share, torch.cat([values, nothing], 1).flatten(1, 2)

    def _attend(self, x: Tensor, prefix: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What patches read by attention to prefix tokens and regions (B, M, h d), and its projection (h d, C)."""
        patches = x[:, prefix:]
        tokens = region_means(patches.unflatten(1, grid), self.regions)
        count = tokens.shape[1]
        if self.gate:
            tokens = torch.cat([x[:, :prefix], tokens], 1)
        # Of all tokens: a slice would be copied for the product.
        query = self._heads(x, 0)[:, prefix:].transpose(1, 2)
        key, value = (self._heads(tokens, which).transpose(1, 2) for which in (1, 2))
        # A region stands for its patches. What rounding adds to its level is added to that of prefix tokens as well.
        wide = torch.promote_types(query.dtype, torch.float32)
        exact = (query.new_full((1,), patches.shape[1], dtype=wide) / count).log()
        level = exact.to(query.dtype)
        levels = torch.cat([(level - exact).to(query.dtype).expand(tokens.shape[1] - count), level.expand(count)])
        query, key = self.q_norm(query), self.k_norm(key)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=levels.expand(1, 1, 1, -1), scale=self.scale)
        # Without gradients a view of a weight seems to need one, which those who follow modules stumble over.
        weight = self.proj.weight if torch.is_grad_enabled() else self.proj.weight.detach()
        return read.transpose(1, 2).flatten(2), weight.T

    def of_normed(self, normed: Normed, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same of normed tokens, for inference: where they are not written, and can stay so, by kernels.

        All that is done is small, and launches of its own would take longer than what they do.
        """
        if normed.tokens is not None or not self._folds() or not self.exact or not self.gate:
            return self(normed.written(), grid)
        weight = self.qkv.weight
        if self.log_sum is None:
            log_sum = (weight.new_zeros(self.num_heads, weight.shape[1]), weight.new_zeros(self.num_heads))
        else:
            log_sum = (self.log_sum.weight, self.log_sum.bias)
        projected = _by_rows(self.qkv, normed.first)
        weights = (weight, self.qkv.bias, self.proj.weight, *log_sum)
        inner, share, values = read_prefix(normed, projected, *weights, self.num_heads, self.scale)
        if self.regions:
            # Instead of the gate's, which come with what prefix tokens read.
            share, values = self._attend(normed.written(), normed.first.shape[1], grid)
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
        """Scores of all tokens for the prefix tokens, and of prefix tokens and mass for the patches.

        All are products of tokens with vectors that depend on the prefix tokens alone: one product makes them, and
        reads the tokens once.

        Args:
            x: (B, N, C).
            query: (B, P, h, d), of the prefix tokens.
            key: (B, P, h, d), of the prefix tokens.

        Returns:
            (B, N, P h) and padding, None when not `exact`; (B, M, P + 1, h), the mass last, or None without a gate.
        """
        prefix, rows, first = query.shape[1], [], 0
        weight, bias = self._weights()
        # Keys of prefix tokens fold into the weights of patches' queries; and queries into those of keys, whose bias
        # shifts all scores of a query alike: the softmax does not see it.
        folded = torch.einsum("sbphd,shdc->bsphc", self.scale * torch.stack([key, query]), weight[:2])
        if self.log_sum is not None:
            rows = [folded[:, 0].flatten(1, 2), self.log_sum.weight.expand(x.shape[0], -1, -1)]
            first = (prefix + 1) * self.num_heads
        if self.exact:
            # Products with columns in other than eights are slow ones on a GPU.
            rows += [x.new_zeros(x.shape[0], -first % 8, x.shape[2]), folded[:, 1].flatten(1, 2)]
            rows += [x.new_zeros(x.shape[0], -prefix * self.num_heads % 8, x.shape[2])]
        scores = x @ torch.cat([part for part in rows if part.shape[1]], 1).mT
        read = scores[..., first + -first % 8 :] if self.exact else None
        if self.log_sum is None:
            return read, None
        gate = scores[:, prefix:, :first].unflatten(2, (prefix + 1, self.num_heads))
        constant = key.new_zeros(key.shape[:3]) if bias is None else self.scale * (key * bias[0]).sum(-1)
        level = torch.cat([constant, self.log_sum.bias.expand(x.shape[0], 1, -1)], 1)
        return read, gate + level.unsqueeze(1)

    def _scores(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same where queries or keys are normed, which takes those of the patches."""
        prefix = query.shape[1]
        key = self.k_norm(self._heads(x, 1))
        read = torch.einsum("bphd,bnhd->bnph", self.scale * self.q_norm(query), key).flatten(2)
        if self.log_sum is None:
            return read, None
        patches = x[:, prefix:]
        gate = torch.einsum("bmhd,bphd->bmph", self.scale * self.q_norm(self._heads(patches, 0)), key[:, :prefix])
        return read, torch.cat([gate, self.log_sum(patches).unsqueeze(2)], 2)

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
        """Project tokens (B, n, C) to the heads' queries (0), keys (1) or values (2), (B, n, h, d)."""
        weight, bias = self._weights()
        projected = F.linear(x, weight[which].flatten(0, 1), None if bias is None else bias[which].flatten())
        return projected.unflatten(-1, (self.num_heads, self.head_dim))


def _by_rows(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Apply a linear layer to tokens (B, P, C) as to rows of a matrix.

    An ONNX graph multiplies those by the weight as it is, and transposes it for tokens. Where images are padded in the
    graph, P is a symbol there, which torch can't flatten.
    """
    if not isinstance(tokens.shape[1], int):
        return linear(tokens)
    rows: Tensor = linear(tokens.flatten(0, 1))
    return rows.unflatten(0, tokens.shape[:2])

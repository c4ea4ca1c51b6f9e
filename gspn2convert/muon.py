"""Muon, an optimizer of weight matrices (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

PyTorch's own fails where a matrix is spread over more processes than it has rows, and gives other steps to spread ones,
for it iterates on the parts in bfloat16. Here each process iterates on the whole; matrices of one shape go together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gspn2convert.fsdp import own, part, whole

# Of x, x x^T x and (x x^T)^2 x: they bring singular values from 0.005 to 1 into 0.7 to 1.2 in so many steps.
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5
# The root mean square of AdamW's steps, about: with it, learning rates and weight decay are those of AdamW (Liu et al.,
# 2025, arXiv 2502.16982).
SIZE = 0.2


class Muon(Optimizer):
    """Steps that are orthogonal matrices, next to the momentum of the gradient.

    Args:
        groups: parameter groups of matrices, each with its learning rate "lr", a number or a tensor, and its
            "weight_decay".
        momentum: decay of the average of gradients.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float = 0.95) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    # Without the closure that other optimizers take: `MuonAdamW`, which calls this, has none.
    def step(self) -> None:  # type: ignore[override]
        """Change the matrices by their gradients, which are overwritten: that takes one kernel for all."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self._change(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def _change(self, matrices: list[nn.Parameter], lr: float | Tensor, decay: float, momentum: float) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages = [self._average(matrix) for matrix in matrices]
        own_gradients, own_averages = ([own(tensor) for tensor in tensors] for tensors in (gradients, averages))
        torch._foreach_lerp_(own_averages, own_gradients, 1 - momentum)
        torch._foreach_lerp_(own_gradients, own_averages, momentum)  # Nesterov's
        directions = [whole(gradient) for gradient in gradients]
        scale = lr * SIZE * max(matrices[0].shape) ** 0.5
        steps = orthogonal(torch.stack(directions)).mul_(-scale)
        parts = [own(part(step, matrix)) for step, matrix in zip(steps.unbind(), matrices, strict=True)]
        weights = [own(matrix.detach()) for matrix in matrices]
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, parts)

    def _average(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average: Tensor = state["momentum_buffer"]
        return average


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (K, M, N) near 1, by an iteration of Newton and Schulz.

    On a GPU it computes in bfloat16: the values vary by a third anyway.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    return (x.mT if tall else x).to(matrices.dtype)

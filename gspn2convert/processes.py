"""What the processes of a run do together where each holds whole models and an equal share of the batch.

A recorded pass makes all its gradients at once, so that there is no backward left behind which DDP could hide their
exchange. One all-reduce of all of them takes less time than its buckets (recipes/README.md, *two GPUs*).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def several() -> bool:
    """Whether the run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_mean(x: Tensor) -> Tensor:
    """Average a tensor over the processes, in place."""
    if several():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def anywhere(wish: bool, device: torch.device) -> bool:
    """Whether any process has a wish; all have to ask at once."""
    if not several():
        return wish
    wishes = torch.tensor(float(wish), device=device)
    dist.all_reduce(wishes)
    return bool(wishes)


def start_alike(module: nn.Module) -> None:
    """Give a module the first process's weights and buffers in all of them."""
    if several():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over the processes, in place; the same parameters have one in each."""
    if not several():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = world_mean(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])

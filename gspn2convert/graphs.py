"""A training pass recorded as a CUDA graph, forward and backward.

A small ViT is thousands of short kernels, which a CPU cannot launch as fast as a GPU runs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pass = Callable[..., dict[str, Tensor]]


class _Pass(nn.Module):
    """A pass as a module of what trains in it, which is what CUDA graphs are made of."""

    def __init__(self, run: Pass, trained: Sequence[nn.Module]) -> None:
        super().__init__()
        self._run, self._trained = run, nn.ModuleList(trained)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self._run(*inputs)


def record(run: Pass, trained: Sequence[nn.Module], inputs: Iterable[tuple[Tensor, ...]]) -> dict[int, Pass]:
    """Record a pass once for each number of inputs, on a GPU, under the autocast that is in force.

    Has to come before DDP wraps anything: the hooks that DDP sets on parameters run on another stream.

    Args:
        run: the pass; it gives scalars by name, each with a gradient.
        trained: the modules whose parameters it trains.
        inputs: example inputs, whose shapes all later ones must have. The graphs keep them as their own. The pass that
            gives a gradient to most parameters comes first: gradients stay on the stream of the recording that made
            them first, and DDP wants one stream.

    Returns:
        The recorded passes by the number of their inputs.
    """
    dtype, wanted = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    # Gradients belong to the stream of the recording and not to that of the replays, in all graphs made this way.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    pool = torch.cuda.graph_pool_handle()  # of one memory, for the graphs never run at once
    graphs: dict[int, Any] = {}
    # Weights in low precision must be made anew in each replay, not kept from the recording.
    with torch.autocast("cuda", dtype, wanted, cache_enabled=False):
        for each in inputs:
            module = _Pass(run, trained)
            graphs[len(each)] = torch.cuda.make_graphed_callables(module, each, allow_unused_input=True, pool=pool)
    return graphs

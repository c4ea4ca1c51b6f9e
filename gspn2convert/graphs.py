"""What training does at every step, recorded as CUDA graphs: a pass forward and backward, and an optimizer's step.

A small ViT is thousands of short kernels, which a CPU cannot launch as fast as a GPU runs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Pass = Callable[..., dict[str, Tensor]]

# Places of gradients for which there may be a graph: two passes, and what comes before they are at rest.
MOST = 8


class _Pass(nn.Module):
    """A pass as a module of what trains in it, which is what CUDA graphs are made of."""

    def __init__(self, run: Pass, trained: Sequence[nn.Module]) -> None:
        super().__init__()
        self._run, self._trained = run, nn.ModuleList(trained)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self._run(*inputs)


def record(run: Pass, trained: Sequence[nn.Module], inputs: Iterable[tuple[Tensor, ...]]) -> dict[int, Pass]:
    """Record a pass once for each number of inputs, on a GPU, under the autocast that is in force.

    Args:
        run: the pass; it gives scalars by name, each with a gradient.
        trained: the modules whose parameters it trains.
        inputs: example inputs, whose shapes all later ones must have. The graphs keep them as their own.

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


@contextmanager
def compiled(methods: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Have methods of modules compiled inside a `with`: what is recorded there runs fewer and longer kernels.

    Afterwards modules have those of their class again, so that nothing else is compiled for its shapes.
    """
    methods = list(methods)
    # A function is compiled for a handful of cases only, and those of earlier stages and sizes are over.
    torch.compiler.reset()
    # Advice to those who write kernels.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._(inductor|dynamo)")
    try:
        for module, name in methods:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
        yield
    finally:
        for module, name in methods:
            vars(module).pop(name, None)


class RecordedSteps:
    """An optimizer's steps on a GPU, replayed from a graph.

    A recorded pass leaves its gradients in one place, and other passes in others: there is a graph for each place. The
    first step from a place is taken as it is, since an optimizer makes its state in it; and so are those from further
    places than MOST, which would be of passes that are not recorded.

    Args:
        optimizer: with `capturable` steps, its learning rates tensors.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> None:
        """Change the weights by their gradients."""
        place = tuple(0 if p.grad is None else p.grad.data_ptr() for p in self._parameters)
        if place not in self._graphs:
            if len(self._graphs) < MOST:
                self._graphs[place] = None
            self._optimizer.step()
            return
        graph = self._graphs[place]
        if graph is None:
            self._graphs[place] = graph = torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._optimizer.step()
        graph.replay()

"""Models spread over the processes of a run (FSDP2).

Each process holds a part of every weight, and of its gradient, moments and average. The weights of a block are
together for the time in which it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit
from gspn2convert.vit import PASSES, attention_sites, blocks


def shard(module: nn.Module, vits: Iterable[VisionTransformer], device: torch.device) -> None:
    """Spread a module over all processes, in place and for good.

    Args:
        module: what a step calls.
        vits: models that it uses, as submodules or not. Each block is gathered by itself, and so is each mixer, which
            stage 1 calls outside of its block.
        device: where this process computes; its parts move there.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for vit in vits:
        for block, site in zip(blocks(vit), attention_sites(vit), strict=True):
            if isinstance(site, Gspn2Mixer):
                fully_shard(site, mesh=mesh)
            fully_shard(block, mesh=mesh)
        # By default the model that is called first would stay gathered, and not see that its weights change.
        fully_shard(vit, mesh=mesh, reshard_after_forward=True)
        for name in PASSES:
            register_fsdp_forward_method(vit, name)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded; then every process has to ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all, or its part where it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device of another one and sharded if that is."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def lend(
    student: Gspn2Vit, taught: VisionTransformer, *others: VisionTransformer, sharded: bool
) -> Iterator[tuple[Gspn2Vit, VisionTransformer]]:
    """Lend the first two models to a stage, inside a `with`, or, where it shards them for good, copies of them.

    Then all models wait in the memory of the host; at the end they are back on their device, and the student has the
    weights of its copy.

    Args:
        student: to train.
        taught: the teacher as the student sees it.
        others: that a stage does not need.
        sharded: whether the stage shards its models.
    """
    if not sharded:
        yield student, taught
        return
    device, models = next(student.parameters()).device, (student, taught, *others)
    for model in models:
        model.cpu()
    learner = copy.deepcopy(student)
    try:
        yield learner, copy.deepcopy(taught)
        weights = student.state_dict()
        for name, value in learner.state_dict().items():
            weights[name].copy_(whole(value))
    finally:
        for model in models:
            model.to(device)

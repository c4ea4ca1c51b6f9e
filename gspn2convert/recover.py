"""Stages 2 and 3: the student as a whole learns to give the teacher's final tokens and logits.

On a GPU the passes of a step are replayed as CUDA graphs: forward and backward a small ViT is thousands of short
kernels, which a CPU cannot launch as fast as the GPU runs them.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from gspn2convert.losses import cosine_loss, kl, normalised_difference, similarity, smooth_l1
from gspn2convert.model import Gspn2Vit
from gspn2convert.recipe import Recover, RecoverLosses
from gspn2convert.stage import Group, Objective, Terms, frozen_tokens
from gspn2convert.taps import Taps
from gspn2convert.vit import final_tokens, grid_size, has_head

# One token of so many gives the mixer term. Of all tokens it took two fifths of a step (ViT-S, H100).
TAPPED = 4


class RecoverStage(Objective):
    """End-to-end recovery of final tokens and logits; all parameters train.

    Early on, the attention outputs of the converted layers are a target too (C-GSPN's PP loss), each through a
    linear adapter that starts as the identity and is dropped after the stage.

    Args:
        student: see `Objective`.
        teacher: see `Objective`.
        losses: weights of the terms.
        statistics: `channel_statistics` of the teacher's final tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, student: Gspn2Vit, teacher: VisionTransformer, losses: RecoverLosses, statistics: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__(student, teacher)
        student.requires_grad_(True)
        self.losses = losses
        self.with_logits = has_head(student) and losses.logits > 0
        self.register_buffer("mean", statistics[0].clone())
        self.register_buffer("std", statistics[1].clone())
        self._graphs: dict[int, Callable[..., Terms]] = {}  # by the number of their inputs
        self._recorded = torch.Size()  # shape of the images that they take
        self.adapters = nn.ModuleDict()
        if losses.mixer > 0:
            self.adapters.update({str(site): _identity(student.embed_dim, self.mean) for site in self.mixers})

    def groups(self, spec: Recover) -> list[Group]:
        """Mixers and adapters at `mixer_lr`, all that is inherited at `lr`."""
        new = {id(parameter) for mixer in self.mixers.values() for parameter in mixer.own_parameters().values()}
        named = list(self.student.named_parameters())
        fresh = [(name, value) for name, value in named if id(value) in new]
        inherited = [(name, value) for name, value in named if id(value) not in new]
        ratio, decay = spec.final_lr_ratio, spec.weight_decay
        return [
            *self.group([*fresh, *self.adapters.named_parameters()], spec.mixer_lr, ratio * spec.mixer_lr, decay),
            *self.group(inherited, spec.lr, ratio * spec.lr, decay),
        ]

    def forward(self, images: Tensor, progress: float) -> Terms:
        """Loss of one batch.

        Args:
            images: (B, 3, height, width), normalised.
            progress: share of the stage that is done, 0 to 1; the mixer term fades with it.

        Returns:
            "loss" and its terms before weighting: "prefix" (with prefix tokens), "patch", "smooth_l1",
            "similarity" (where it is asked for), "mixer" (until it has faded), "logits" (with a head).
        """
        weights, inputs = self.weights(progress), [images]
        if "mixer" in weights:
            inputs.append(tapped_tokens(progress, self._tokens(images)).to(images.device))
        assert not self._graphs or images.shape == self._recorded, "a graph would read other images as its own"
        terms = self._graphs.get(len(inputs), self.terms)(*inputs)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def terms(self, images: Tensor, tapped: Tensor | None = None) -> Terms:
        """Terms of the loss before weighting.

        Args:
            images: (B, 3, height, width), normalised.
            tapped: numbers of the tokens that give the mixer term, int64; None to leave it out.
        """
        sites = list(self.mixers) if tapped is not None else []
        with torch.no_grad(), Taps(self.teacher, sites) as theirs:
            target = self.target(images)
            target_logits = self.teacher.forward_head(target) if self.with_logits else None
        with Taps(self.student, sites) as ours:
            output = final_tokens(self.student, images)
        patch, target_patch = output[:, self.prefix :], target[:, self.prefix :]
        terms = {
            "patch": cosine_loss(patch, target_patch),
            "smooth_l1": smooth_l1(patch, target_patch, self.mean, self.std),
        }
        if self.prefix:
            terms["prefix"] = cosine_loss(output[:, : self.prefix], target[:, : self.prefix])
        if self.losses.similarity > 0:
            terms["similarity"] = similarity(patch, target_patch)
        if target_logits is not None:
            terms["logits"] = kl(self.student.forward_head(output), target_logits, self.losses.temperature)
        if tapped is not None:
            differences = []
            for site in sites:
                student, teacher = (taps.outputs[site].index_select(1, tapped) for taps in (ours, theirs))
                differences.append(normalised_difference(self.adapters[str(site)](student), teacher))
            terms["mixer"] = torch.stack(differences).mean()
        return terms

    def record(self, images: Tensor) -> None:
        """Record CUDA graphs of the passes, with the mixer term and without it.

        Has to come before DDP wraps the stage: the hooks that DDP sets on parameters run on another stream.

        Args:
            images: (B, 3, height, width) of the shape of all batches to come; it becomes the graphs' input.
        """
        inputs: list[tuple[Tensor, ...]] = []
        if "mixer" in self.weights(0.0):
            # First, for gradients stay on the stream of the recording that made them first, and DDP wants one stream.
            inputs.append((images, tapped_tokens(0.0, self._tokens(images)).to(images.device)))
        inputs.append((images,))
        dtype, wanted = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # The gradients' stream is that of the recording, not that of the replays: it is so in every such graph.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        self._recorded = images.shape
        pool = torch.cuda.graph_pool_handle()  # of one memory, for the graphs never run at once
        # Weights in low precision must be made anew in each replay, not kept from the recording.
        with torch.autocast("cuda", dtype, wanted, cache_enabled=False):
            for each in inputs:
                graph: Any = torch.cuda.make_graphed_callables(_Terms(self), each, allow_unused_input=True, pool=pool)
                self._graphs[len(each)] = graph

    def forget(self) -> None:
        """Free the graphs."""
        self._graphs.clear()

    def _tokens(self, images: Tensor) -> int:
        return self.prefix + math.prod(grid_size(self.student, *images.shape[-2:]))

    def target(self, images: Tensor) -> Tensor:
        """Final tokens (B, N, C) that the student is to give for images (B, 3, height, width)."""
        return frozen_tokens(self.teacher, images)

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term; the mixer's falls linearly to 0 at `mixer_until`, from where on it is left out."""
        losses = self.losses
        weights = {
            "prefix": losses.prefix,
            "patch": losses.patch,
            "smooth_l1": losses.smooth_l1,
            "similarity": losses.similarity,
            "logits": losses.logits,
        }
        if losses.mixer > 0 and progress < losses.mixer_until:
            weights["mixer"] = losses.mixer * (1 - progress / losses.mixer_until)
        return weights


class _Terms(nn.Module):
    """The terms of a stage as a module of what trains in it, which is what CUDA graphs are made of."""

    def __init__(self, stage: RecoverStage) -> None:
        super().__init__()
        self.student, self.adapters = stage.student, stage.adapters
        self._terms = stage.terms

    def forward(self, *inputs: Tensor) -> Terms:
        """See `RecoverStage.terms`."""
        return self._terms(*inputs)


def tapped_tokens(progress: float, count: int) -> Tensor:
    """Numbers of those of `count` tokens that give the mixer term at a step; int64, as many at every step.

    Others at other steps, and the same in all processes.
    """
    first = random.Random(progress).randrange(count)
    return (first + TAPPED * torch.arange(max(1, count // TAPPED))) % count


@torch.no_grad()
def channel_statistics(batches: Iterable[Tensor], prefix: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the patches in batches of tokens (B, P + M, C), the first P prefix tokens."""
    tokens = []
    for batch in batches:
        patches = batch[:, prefix:].flatten(0, 1).double()
        tokens.append((len(patches), patches.mean(0), patches.square().mean(0)))
    total = sum(count for count, _, _ in tokens)
    mean = torch.stack([count / total * part for count, part, _ in tokens]).sum(0)
    square = torch.stack([count / total * part for count, _, part in tokens]).sum(0)
    std = (square - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies must not divide by zero; it counts like the average one.
    std = torch.where(std > 1e-6 * std.mean(), std, std.mean().clamp_min(1e-6))
    return mean.float(), std.float()


def _identity(dim: int, like: Tensor) -> nn.Linear:
    adapter = nn.Linear(dim, dim, device=like.device)
    nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    return adapter

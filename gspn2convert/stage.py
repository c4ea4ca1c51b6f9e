"""The training stages: what trains, and the loss of one batch.

Stage 1, align: every mixer alone learns to give what the attention gave, on the teacher's own inputs.
Stage 2, recover: the student as a whole learns to give the teacher's final tokens and logits.
Stage 3, curriculum: the same at larger and larger sizes.

All run the student in eval mode, gradients and all: dropout and stochastic depth stay off, so that a step
depends on weights and images alone and a resumed run repeats it exactly.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm.models import VisionTransformer
from torch import Tensor, nn

from gspn2convert.losses import (
    cosine_loss,
    kl,
    normalised_difference,
    relative_error,
    similarity,
    smooth_l1,
    variance,
)
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit
from gspn2convert.recipe import Align, Recover, RecoverLosses
from gspn2convert.taps import Taps
from gspn2convert.vit import attention_sites, final_tokens, grid_size, has_head, layer_scale, num_prefix

# One token of so many gives the mixer term. Of all tokens it took two fifths of a step (ViT-S, H100).
TAPPED = 4

Terms = dict[str, Tensor]
Group = dict[str, Any]  # a parameter group of a torch optimizer, with its "peak" and "final" learning rate


class Objective(nn.Module):
    """What the stages share.

    Args:
        student: put into eval mode.
        teacher: same architecture with its attention, on the same device as the images. It is no submodule:
            optimizers, DDP and checkpoints do not see it.
    """

    def __init__(self, student: Gspn2Vit, teacher: VisionTransformer) -> None:
        super().__init__()
        self.student = student.eval()
        self._teacher = (teacher.eval(),)
        mixers = dict(enumerate(attention_sites(student)))
        self.mixers = {site: mixer for site, mixer in mixers.items() if isinstance(mixer, Gspn2Mixer)}
        self.prefix = num_prefix(student)
        assert self.mixers, "no converted layers: nothing to train"

    @property
    def teacher(self) -> VisionTransformer:
        """The frozen teacher."""
        return self._teacher[0]

    def groups(self, spec: Any) -> list[Group]:  # noqa: ANN401 - each stage has a spec type of its own
        """Parameter groups of what trains, with their peak and final learning rates."""
        raise NotImplementedError

    def _group(self, named: Iterable[tuple[str, nn.Parameter]], peak: float, final: float, decay: float) -> list[Group]:
        """Split by weight decay: vectors, and what timm exempts (position embeddings, prefix tokens), get none."""
        exempt = self.student.no_weight_decay()
        split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in named:
            split[parameter.ndim < 2 or name in exempt].append(parameter)
        rates = {"lr": peak, "peak": peak, "final": final}
        return [
            {"params": part, "weight_decay": each, **rates}
            for part, each in zip(split, (decay, 0.0), strict=True)
            if part
        ]


class AlignStage(Objective):
    """Layer-wise alignment: one teacher pass gives every converted layer its input and its target.

    The mixers' own parameters train; what they inherited for the prefix read stays as it is, since on the
    teacher's inputs it is exact already.
    """

    def __init__(self, student: Gspn2Vit, teacher: VisionTransformer) -> None:
        super().__init__(student, teacher)
        student.requires_grad_(False)
        for mixer in self.mixers.values():
            for parameter in mixer.own_parameters().values():
                parameter.requires_grad_(True)

    def groups(self, spec: Align) -> list[Group]:
        """One learning rate for all mixers."""
        trained = ((name, value) for name, value in self.student.named_parameters() if value.requires_grad)
        return self._group(trained, spec.lr, spec.final_lr, spec.weight_decay)

    def forward(self, images: Tensor, progress: float) -> Terms:
        """Loss of one batch.

        Args:
            images: (B, 3, height, width), normalised.
            progress: unused; the loss is the same throughout.

        Returns:
            "loss", the mean over layers of the patches' relative error behind LayerScale, and "layer.I", each of them.
        """
        with torch.no_grad(), Taps(self.teacher, self.mixers) as taps:
            final_tokens(self.teacher, images)
        grid = grid_size(self.student, *images.shape[-2:])
        gammas = [layer_scale(self.student.blocks[site]) for site in self.mixers]
        targets = [taps.outputs[site][:, self.prefix :] for site in self.mixers]
        spreads = batch_spread(targets, gammas)
        errors = {}
        for (site, mixer), target, gamma, spread in zip(self.mixers.items(), targets, gammas, spreads, strict=True):
            output = mixer(taps.inputs[site], grid)[:, self.prefix :]
            errors[f"layer.{site}"] = relative_error(output, target, gamma, spread)
        return {"loss": torch.stack(list(errors.values())).mean(), **errors}


class RecoverStage(Objective):
    """End-to-end recovery of final tokens and logits; all parameters train.

    Early on, the attention outputs of the converted layers are a target too (C-GSPN's PP loss), each through a
    linear adapter that starts as the identity and is dropped after the stage.

    Args:
        student: see `Objective`.
        teacher: see `Objective`.
        losses: weights of the terms.
        statistics: `channel_statistics` of the teacher's patch tokens.
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
            *self._group([*fresh, *self.adapters.named_parameters()], spec.mixer_lr, ratio * spec.mixer_lr, decay),
            *self._group(inherited, spec.lr, ratio * spec.lr, decay),
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
        weights = self.weights(progress)
        sites = [site for site in self.mixers if "mixer" in weights]
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
        if sites:
            some = (slice(None), tapped_tokens(progress, output.shape[1]))
            pairs = [(self.adapters[str(site)](ours.outputs[site][some]), theirs.outputs[site][some]) for site in sites]
            terms["mixer"] = torch.stack([normalised_difference(*pair) for pair in pairs]).mean()
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def target(self, images: Tensor) -> Tensor:
        """Final tokens (B, N, C) that the student is to give for images (B, 3, height, width)."""
        return final_tokens(self.teacher, images)

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


def tapped_tokens(progress: float, count: int) -> slice:
    """Those of `count` tokens that give the mixer term at a step: others at other steps, the same in all processes."""
    return slice(random.Random(progress).randrange(min(TAPPED, count)), None, TAPPED)


@torch.no_grad()
def channel_statistics(teacher: VisionTransformer, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the teacher's final patch tokens over some batches of images."""
    prefix, tokens = num_prefix(teacher), []
    for images in batches:
        patches = final_tokens(teacher, images)[:, prefix:].flatten(0, 1).double()
        tokens.append((len(patches), patches.mean(0), patches.square().mean(0)))
    total = sum(count for count, _, _ in tokens)
    mean = torch.stack([count / total * part for count, part, _ in tokens]).sum(0)
    square = torch.stack([count / total * part for count, _, part in tokens]).sum(0)
    std = (square - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies must not divide by zero; it counts like the average one.
    std = torch.where(std > 1e-6 * std.mean(), std, std.mean().clamp_min(1e-6))
    return mean.float(), std.float()


@torch.no_grad()
def batch_spread(targets: list[Tensor], gammas: list[Tensor | None]) -> Tensor:
    """Denominators of the relative errors, one a layer, over the batch of all processes together."""
    means = _world_mean(torch.stack([target.float().mean((0, 1)) for target in targets]))
    spreads = [variance(*each) for each in zip(targets, gammas, means, strict=True)]
    return _world_mean(torch.stack(spreads))


def _world_mean(x: Tensor) -> Tensor:
    """Average over the processes of a run, each of which holds an equal share of the batch."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def _identity(dim: int, like: Tensor) -> nn.Linear:
    adapter = nn.Linear(dim, dim, device=like.device)
    nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    return adapter

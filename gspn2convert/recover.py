"""Stages 2 and 3: the student as a whole learns to give the teacher's final tokens and logits.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import math
import random

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from gspn2convert.graphs import record
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
        deviations: `token_deviations` of the teacher.
    """

    deviations: Tensor

    def __init__(
        self, student: Gspn2Vit, teacher: VisionTransformer, losses: RecoverLosses, deviations: Tensor
    ) -> None:
        super().__init__(student, teacher)
        student.requires_grad_(True)
        self.losses = losses
        self.with_logits = has_head(student) and losses.logits > 0
        self.register_buffer("deviations", deviations.clone())
        self.adapters = nn.ModuleDict()
        if losses.mixer > 0:
            self.adapters.update({str(site): _identity(student.embed_dim, deviations) for site in self.mixers})

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
            images: (B, channels, height, width), normalised.
            progress: share of the stage that is done, 0 to 1; the mixer term fades with it.

        Returns:
            "loss" and its terms before weighting: "patch", "smooth_l1", "prefix" and "prefix_smooth_l1" (with prefix
            tokens), "similarity" (where it is asked for), "mixer" (until it has faded), "logits" (with a head).
        """
        weights, inputs = self.weights(progress), [images]
        if "mixer" in weights:
            inputs.append(tapped_tokens(progress, self._tokens(images)).to(images.device))
        terms = self.run(self.terms, *inputs)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def terms(self, images: Tensor, tapped: Tensor | None = None) -> Terms:
        """Terms of the loss before weighting.

        Args:
            images: (B, channels, height, width), normalised.
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
            "smooth_l1": smooth_l1(patch, target_patch, self.deviations[-1]),
        }
        if self.prefix:
            prefix, target_prefix = output[:, : self.prefix], target[:, : self.prefix]
            terms["prefix"] = cosine_loss(prefix, target_prefix)
            terms["prefix_smooth_l1"] = smooth_l1(prefix, target_prefix, self.deviations[:-1])
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

    def record(self, images: Tensor, steps: int) -> None:
        """Record the passes with the mixer term and without it, see `graphs.record`."""
        inputs: list[tuple[Tensor, ...]] = []
        if "mixer" in self.weights(0.0):
            inputs.append((images, tapped_tokens(0.0, self._tokens(images)).to(images.device)))
        inputs.append((images,))
        with self.compiled(steps):
            self.recorded = record(self.terms, [self.student, self.adapters], inputs)
        self.recorded_shape = images.shape

    def _tokens(self, images: Tensor) -> int:
        return self.prefix + math.prod(grid_size(self.student, *images.shape[-2:]))

    def target(self, images: Tensor) -> Tensor:
        """Final tokens (B, N, C) that the student is to give for images (B, channels, height, width)."""
        return frozen_tokens(self.teacher, images)

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each term; the mixer's falls linearly to 0 at `mixer_until`, from where on it is left out."""
        losses = self.losses
        weights = {
            "prefix": losses.prefix,
            "patch": losses.patch,
            "smooth_l1": losses.smooth_l1,
            "prefix_smooth_l1": losses.smooth_l1,
            "similarity": losses.similarity,
            "logits": losses.logits,
        }
        if losses.mixer > 0 and progress < losses.mixer_until:
            weights["mixer"] = losses.mixer * (1 - progress / losses.mixer_until)
        return weights


def tapped_tokens(progress: float, count: int) -> Tensor:
    """Numbers of those of `count` tokens that give the mixer term at a step; int64, as many at every step.

    Others at other steps, and the same in all processes.
    """
    first = random.Random(progress).randrange(count)
    return (first + TAPPED * torch.arange(max(1, count // TAPPED))) % count


def _identity(dim: int, like: Tensor) -> nn.Linear:
    adapter = nn.Linear(dim, dim, device=like.device)
    nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    return adapter

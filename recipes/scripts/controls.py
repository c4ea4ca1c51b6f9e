"""Students to compare a conversion with: one whose scan is silent, one whose attention is initialised afresh."""

import copy
from collections.abc import Iterator

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from gspn2convert.convert import convert
from gspn2convert.data import ImageSet, batches, split_images
from gspn2convert.images import spread
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.recipe import Recipe
from gspn2convert.vit import attention_sites, data_config


def without_scan(teacher: VisionTransformer, recipe: Recipe, images: ImageSet) -> Gspn2Vit:
    """Fit a student as stage 0 does, then switch the scan's output off for good: its merge is 0 and stays 0."""
    train, unseen = split_images(images, recipe)
    on_gpu = teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen = spread(train, recipe.fit.images), spread(unseen, recipe.fit.held_out)
    calibration, held_out = ((pixels for pixels, _ in _plain(images, teacher, each, recipe)) for each in chosen)
    student, _ = convert(on_gpu, recipe, calibration, held_out)
    for mixer in attention_sites(student):
        assert isinstance(mixer, Gspn2Mixer)
        nn.init.zeros_(mixer.proj.weight)
        mixer.proj.weight.register_hook(torch.zeros_like)
    return student


def _plain(
    images: ImageSet, teacher: VisionTransformer, chosen: list[int], recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    size = recipe.fit.batch_size
    return batches(
        images, data_config(teacher), indices=chosen, batch_size=size, augment=None, seed=recipe.seed, workers=8
    )


class FreshAttention(Gspn2Mixer):
    """An attention layer that learns as a mixer does.

    Args:
        attention: the teacher's; its shape is taken, its weights are not.
    """

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.regions = 0
        self.attention = copy.deepcopy(attention)
        for layer in (self.attention.qkv, self.attention.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters: all are new."""
        return dict(self.named_parameters())

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix tokens (B, N, C)."""
        mixed: Tensor = self.attention(x)
        return mixed

    def add_to(self, residual: Tensor, norm: nn.LayerNorm, grid: tuple[int, int], gamma: Tensor | None) -> Tensor:
        """Compute residual + gamma * self(norm(residual))."""
        mixed = self(norm(residual), grid)
        return residual + (mixed if gamma is None else mixed * gamma)


def with_fresh_attention(teacher: VisionTransformer, recipe: Recipe, images: ImageSet) -> Gspn2Vit:
    """The teacher with new attention layers: what the same budget gives the operator that is replaced."""
    student = build_student(teacher, range(len(teacher.blocks)), recipe.mixer.resolve(teacher.embed_dim))
    for block, attention in zip(student.blocks, attention_sites(teacher), strict=True):
        assert isinstance(attention, Attention)
        block.attn = FreshAttention(attention)
    return student

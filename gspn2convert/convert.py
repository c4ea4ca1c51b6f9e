"""Stage 0: copy a ViT, put mixers where attention was, and fit each in closed form.

Memory beyond the two models: the hidden tokens of all calibration images, once (images * N * C * 4 bytes; 1.2 GB
for 2048 images of a ViT-B at 224 px), and the moments of one layer ((4C + 2C + 1)^2 * 8 bytes, 170 MB for ViT-B).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from gspn2convert.errors import UserError
from gspn2convert.fit import Grid, fit_closed_form, fit_gate, fit_random, fit_svd, patches
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.recipe import Fit, Recipe
from gspn2convert.vit import check_vit, embed, grid_size, layer_scale

logger = logging.getLogger(__name__)

# Every candidate of a layer: its name and the mixer's own parameters.
Candidates = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the fit of one layer came to.

    Attributes:
        layer: index of the block.
        method: the candidate that was taken, by held-out error.
        errors: held-out relative error of each candidate: squared error over variance of the patches'
            attention output, both behind LayerScale.
    """

    layer: int
    method: str
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """Held-out relative error of the method taken."""
        return self.errors[self.method]


@torch.no_grad()
def convert(
    teacher: nn.Module,
    recipe: Recipe,
    images: Iterable[Tensor],
    held_out: Iterable[Tensor],
    keep: Sequence[int] = (),
    *,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> tuple[Gspn2Vit, list[LayerReport]]:
    """Convert a ViT without training.

    Args:
        teacher: timm VisionTransformer in eval mode; it is not changed.
        recipe: mixer, fit method and seed.
        images: calibration batches (B, channels, height, width), normalised as the teacher expects, all of one size.
        held_out: batches that the fit does not see, for the reported errors.
        keep: blocks that keep attention.
        on_layer: called with each layer's report and the number of layers done.

    Returns:
        The student in eval mode, and a report for each converted layer. Deterministic for `recipe.seed`.

    Raises:
        UserError: the teacher is no supported ViT, or there are no images.
    """
    vit = check_vit(teacher)
    layers = [i for i in range(len(vit.blocks)) if i not in keep]
    student = build_student(vit, layers, recipe.mixer.resolve(vit.embed_dim))
    hidden, grid = _embed_all(vit, images)
    unseen, _ = _embed_all(vit, held_out)
    reports = []
    for index, block in enumerate(vit.blocks):
        if index in layers:
            mixer = student.get_submodule(f"blocks.{index}.attn")
            assert isinstance(mixer, Gspn2Mixer)
            reports.append(_fit_layer(index, mixer, block, hidden, unseen, grid, recipe))
            logger.debug("layer %d: %s, held-out error %.3f", index, reports[-1].method, reports[-1].error)
            if on_layer is not None:
                on_layer(reports[-1], len(reports))
        for tokens in (hidden, unseen):
            for i, x in enumerate(tokens):
                tokens[i] = block(x)  # one by one, so that all are held once
    return student, reports


def _embed_all(vit: VisionTransformer, images: Iterable[Tensor]) -> tuple[list[Tensor], Grid]:
    """First block's tokens of all batches, and their grid; the pixels are let go."""
    device, grid, hidden = next(vit.parameters()).device, None, []
    for batch in images:
        grid = grid_size(vit, *batch.shape[-2:])
        hidden.append(embed(vit, batch.to(device)))
    if grid is None:
        raise UserError("no images for the fit: it needs some to fit on and some held out; give at least ten")
    return hidden, grid


def _fit_layer(
    index: int,
    mixer: Gspn2Mixer,
    block: nn.Module,
    hidden: list[Tensor],
    unseen: list[Tensor],
    grid: Grid,
    recipe: Recipe,
) -> LayerReport:
    """Fit the candidates, keep the best on the held-out images."""
    gamma, norm, attention = layer_scale(block), block.get_submodule("norm1"), block.get_submodule("attn")
    assert isinstance(attention, Attention)

    def samples(tokens: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for x in tokens:
            normed = norm(x)
            yield normed, attention(normed)

    candidates = _candidates(index, mixer, attention, lambda: samples(hidden), grid, gamma, recipe)
    errors = _held_out_errors(mixer, candidates, samples(unseen), grid, gamma)
    method = min(errors, key=lambda name: errors[name])
    mixer.load_state_dict(candidates[method], strict=False)
    return LayerReport(layer=index, method=method, errors=errors)


def _candidates(
    index: int,
    mixer: Gspn2Mixer,
    attention: Attention,
    samples: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    grid: Grid,
    gamma: Tensor | None,
    recipe: Recipe,
) -> Candidates:
    """Parameters of the mixer by each method, the recipe's own first; one gate serves them all."""
    fit: Fit = recipe.fit
    fresh = own_parameters(mixer)
    second = fit_gate(mixer, samples, grid)
    gate = {name: value for name, value in own_parameters(mixer).items() if name.startswith("prefix.")}
    candidates: Candidates = {}
    if fit.method == "closed_form":
        fit_closed_form(mixer, samples, grid, gamma, second, ridge=fit.ridge, rounds=fit.rounds)
        candidates["closed_form"] = own_parameters(mixer)
    if fit.method != "random":
        mixer.load_state_dict(fresh | gate, strict=False)
        fit_svd(mixer, attention, second)
        candidates["svd"] = own_parameters(mixer)
    mixer.load_state_dict(fresh | gate, strict=False)
    fit_random(mixer, torch.Generator().manual_seed(recipe.seed + index))
    candidates["random"] = own_parameters(mixer)
    return candidates


def own_parameters(mixer: Gspn2Mixer) -> dict[str, Tensor]:
    """Copies of the mixer's parameters that are not inherited from the teacher."""
    return {name: value.detach().clone() for name, value in mixer.own_parameters().items()}


def _held_out_errors(
    mixer: Gspn2Mixer,
    candidates: Candidates,
    samples: Iterator[tuple[Tensor, Tensor]],
    grid: Grid,
    gamma: Tensor | None,
) -> dict[str, float]:
    """Relative error of the patches' output for each candidate."""
    wrong = dict.fromkeys(candidates, 0.0)
    total = square = torch.zeros((), dtype=torch.float64)
    count, first = 0, None
    for x, y in samples:
        target = patches(y, grid)
        scaled = (target if gamma is None else target * gamma).double()
        first = scaled[:1, :1].clone() if first is None else first
        scaled = scaled - first  # sums of squares lose no digits to a mean, and a constant has none but exact zeros
        total, square = total + scaled.sum((0, 1)), square + scaled.square().sum()
        count += scaled.shape[0] * scaled.shape[1]
        for name, parameters in candidates.items():
            mixer.load_state_dict(parameters, strict=False)
            difference = patches(mixer(x, grid), grid) - target
            wrong[name] += float((difference if gamma is None else difference * gamma).double().square().sum())
    # A single patch has no variance: its error is told as it is, not divided by nothing.
    variance = float(square - total.square().sum() / count) or 1.0
    return {name: value / variance for name, value in wrong.items()}

"""Losses between a student and its teacher: pure functions, computed in float32.

Shapes: B batch, N tokens, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each token with its counterpart, averaged over (..., C)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def smooth_l1(student: Tensor, teacher: Tensor, deviation: Tensor) -> Tensor:
    """Smooth L1 of (..., C) in units of the teacher's deviation, (C,) or anything that broadcasts.

    Without that the few channels with large values, common in pretrained ViTs, would be all that counts.
    """
    difference = (student.float() - teacher.float()) / deviation
    return F.smooth_l1_loss(difference, torch.zeros_like(difference))


@torch.no_grad()
def token_deviations(batches: Iterable[Tensor], prefix: int) -> Tensor:
    """Standard deviations (P + 1, C) of batches of final tokens (B, P + M, C), the first P of them prefix tokens.

    A row for each prefix token, over images, and a last one for the patches, over images and places. Images are few, or
    alike, where patches are many: no row is below a tenth of the last.
    """
    parts = []
    for batch in batches:
        tokens = batch.double()
        kinds = [*tokens[:, :prefix].unbind(1), tokens[:, prefix:].flatten(0, 1)]
        moments = [torch.stack([kind.mean(0), kind.square().mean(0)]) for kind in kinds]
        parts.append((len(tokens), torch.stack(moments)))
    total = sum(count for count, _ in parts)
    mean, square = torch.stack([count / total * part for count, part in parts]).sum(0).unbind(1)
    deviations = (square - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies must not divide by zero; it counts like the average one.
    average = deviations.mean(1, keepdim=True)
    deviations = torch.where(deviations > 1e-6 * average, deviations, average.clamp_min(1e-6))
    return torch.maximum(deviations, 0.1 * deviations[-1]).float()


def variance(teacher: Tensor, gamma: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """Squared length of `gamma * (teacher - mean)`, averaged over tokens: what a constant would get wrong.

    Args:
        teacher: (..., C).
        gamma: (C,) LayerScale, None for 1.
        mean: (C,); None for the mean of `teacher` itself.
    """
    tokens = teacher.float().flatten(0, -2)
    return _power(tokens - (tokens.mean(0) if mean is None else mean), gamma)


def relative_error(
    student: Tensor, teacher: Tensor, gamma: Tensor | None = None, spread: Tensor | None = None
) -> Tensor:
    """||gamma (s - t)||^2 / ||gamma (t - mean t)||^2 over all tokens of (..., C).

    0 is exact, 1 is no better than the teacher's mean. LayerScale weighs the channels, since only what passes
    it reaches the residual stream.

    Args:
        student: (..., C) attention output of the student.
        teacher: the same of the teacher.
        gamma: (C,) LayerScale of the block, None for 1.
        spread: the denominator per token where it is known already, for example of a batch that several
            processes share; None for `variance(teacher, gamma)`.
    """
    spread = variance(teacher, gamma) if spread is None else spread
    # An output that is constant, or switched off by a gamma of 0, has nothing to explain.
    return _power(student.float() - teacher.float(), gamma) / spread.clamp_min(torch.finfo(torch.float32).tiny)


def normalised_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of (..., C) tokens, each normalised over its channels: scale and offset do not count."""
    shape = student.shape[-1:]
    return F.mse_loss(F.layer_norm(student.float(), shape), F.layer_norm(teacher.float(), shape))


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines that all pairs of tokens of an image have, averaged over (B, N, C).

    Relations between patches, and not the tokens alone, are kept ("activation matching" of ViT-Linearizer). The
    N x N cosines are never there: ||S S' - T T'||^2 = ||S' S||^2 - 2 ||S' T||^2 + ||T' T||^2.
    """
    s, t = (F.normalize(tokens.float(), dim=-1) for tokens in (student, teacher))
    with torch.autocast(s.device.type, enabled=False):  # what remains is a small difference of large numbers
        power = [(a.mT @ b).square().sum((1, 2)) for a, b in ((s, s), (s, t), (t, t))]
    return (power[0] - 2 * power[1] + power[2]).mean() / s.shape[1] ** 2


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened logits (B, K), averaged over images (Hinton et al., 2015)."""
    student = F.log_softmax(student_logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _power(tokens: Tensor, gamma: Tensor | None) -> Tensor:
    scaled = tokens if gamma is None else tokens * gamma.float()
    return scaled.square().sum(-1).mean()

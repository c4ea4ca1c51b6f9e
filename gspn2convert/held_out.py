"""How near a student is to its teacher on images that no stage has seen; quick enough to ask in mid-training.

Shapes: B batch, N = P + M tokens, P prefix tokens, C channels, L classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gspn2convert.images import spread
from gspn2convert.losses import kl, token_deviations
from gspn2convert.vit import final_tokens, has_head, num_prefix


class HeldOut:
    """Held-out images with what the teacher makes of them, which is computed once.

    Args:
        teacher: frozen ViT; it decides the device.
        batches: normalised images (B, channels, height, width), kept with the teacher's final tokens.
    """

    def __init__(self, teacher: VisionTransformer, batches: Iterable[Tensor]) -> None:
        device = next(teacher.parameters()).device
        self.prefix = num_prefix(teacher)
        self.with_logits = has_head(teacher)
        self.images = [batch.to(device) for batch in batches]
        with torch.no_grad():
            self.tokens = [final_tokens(teacher, batch) for batch in self.images]
            self.logits = [self._logits(teacher, tokens) for tokens in self.tokens]

    def deviations(self) -> Tensor:
        """`losses.token_deviations` of the teacher's final tokens."""
        return token_deviations(self.tokens, self.prefix)

    def sample(self, count: int) -> HeldOut:
        """At most `count` of the images, from all over the set."""
        total = sum(map(len, self.images))
        if count >= total:
            return self
        chosen, size, part = spread(range(total), count), len(self.images[0]), copy.copy(self)
        # In full batches again: a few images of each would take as many passes as all of them.
        part.images, part.tokens, part.logits = (
            list(torch.cat(batches)[chosen].split(size)) for batches in (self.images, self.tokens, self.logits)
        )
        return part

    @torch.no_grad()
    def compare(self, student: VisionTransformer, *, with_kl: bool = False) -> dict[str, float]:
        """Compare a student in its present state, in eval mode.

        Args:
            student: of the teacher's architecture, on its device.
            with_kl: with a head, tell KL(teacher || student) of the logits as well.

        Returns:
            `patch_cosine` and, with prefix tokens, `prefix_cosine`: means over final tokens; `cosine`, the mean of
            these; `agreement` of the first guesses, 0..1, with a head; `kl` where it is asked for.
        """
        training = student.training
        student.eval()
        sums, count, same, divergence = {"prefix_cosine": 0.0, "patch_cosine": 0.0}, 0, 0, 0.0
        for images, target, theirs in zip(self.images, self.tokens, self.logits, strict=True):
            tokens = final_tokens(student, images)
            cosines = cosine_similarity(tokens.float(), target.float(), dim=-1).double()
            sums["patch_cosine"] += float(cosines[:, self.prefix :].mean(1).sum())
            if self.prefix:
                sums["prefix_cosine"] += float(cosines[:, : self.prefix].mean(1).sum())
            if self.with_logits:
                ours = self._logits(student, tokens)
                same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                divergence += float(kl(ours, theirs, 1.0)) * len(images) if with_kl else 0.0
            count += len(images)
        student.train(training)
        scores = {name: total / count for name, total in sums.items() if self.prefix or name == "patch_cosine"}
        scores["cosine"] = sum(scores.values()) / len(scores)
        if self.with_logits:
            scores |= {"agreement": same / count} | ({"kl": divergence / count} if with_kl else {})
        return scores

    def _logits(self, model: VisionTransformer, tokens: Tensor) -> Tensor:
        """Logits (B, L) of final tokens; without a head there are none, L = 0."""
        return model.forward_head(tokens) if self.with_logits else tokens.new_zeros(len(tokens), 0)

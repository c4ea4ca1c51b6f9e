"""How near a student is to its teacher on images that no stage has seen; quick enough to ask in mid-training.

Shapes: B batch, N = P + M tokens, P prefix tokens, C channels, L classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity

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
            self.guesses = [self._guess(teacher, tokens) for tokens in self.tokens]

    @torch.no_grad()
    def compare(self, student: VisionTransformer) -> dict[str, float]:
        """Compare a student in its present state, in eval mode.

        Returns:
            `patch_cosine` and, with prefix tokens, `prefix_cosine`: means over final tokens; `cosine`, the mean of
            these; `agreement` of the first guesses, 0..1, with a head.
        """
        training = student.training
        student.eval()
        sums, count, same = {"prefix_cosine": 0.0, "patch_cosine": 0.0}, 0, 0
        for images, target, guess in zip(self.images, self.tokens, self.guesses, strict=True):
            tokens = final_tokens(student, images)
            cosines = cosine_similarity(tokens.float(), target.float(), dim=-1).double()
            sums["patch_cosine"] += float(cosines[:, self.prefix :].mean(1).sum())
            if self.prefix:
                sums["prefix_cosine"] += float(cosines[:, : self.prefix].mean(1).sum())
            same += int((self._guess(student, tokens) == guess).sum()) if self.with_logits else 0
            count += len(images)
        student.train(training)
        scores = {name: total / count for name, total in sums.items() if self.prefix or name == "patch_cosine"}
        scores["cosine"] = sum(scores.values()) / len(scores)
        return scores | ({"agreement": same / count} if self.with_logits else {})

    def _guess(self, model: VisionTransformer, tokens: Tensor) -> Tensor:
        """First guess of each image, (B,); without a head there is none to make."""
        if not self.with_logits:
            return tokens.new_zeros(len(tokens), dtype=torch.long)
        return model.forward_head(tokens).argmax(-1)

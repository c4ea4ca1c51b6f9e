"""How near a student is to its teacher, and how well both do on labelled images.

Shape letters: B batch, N tokens, C channels, M images, L classes.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from gspn2convert.data import ImageSet, batches
from gspn2convert.errors import UserError
from gspn2convert.vit import data_config, final_tokens, has_head, num_prefix

NEIGHBOURS = 20
# Temperature of the vote in the usual k-NN protocol for self-supervised ViTs (Wu et al., CVPR 2018).
VOTE_TEMPERATURE = 0.07

_COSINE_BINS = 20_000
_KNN_CHUNK = 1024

_log = logging.getLogger(__name__)


class CosineSummary:
    """Mean and 5th percentile of many cosines in constant memory (the percentile to 1e-4)."""

    def __init__(self) -> None:
        """Start with no values."""
        self._sum = 0.0
        self._bins = torch.zeros(_COSINE_BINS, dtype=torch.int64)

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Count the cosine of each pair of vectors, both (B, N, C)."""
        cosines = cosine_similarity(student.float(), teacher.float(), dim=-1).flatten().double().cpu()
        self._sum += cosines.sum().item()
        places = ((cosines + 1.0) / 2.0 * _COSINE_BINS).long().clamp(0, _COSINE_BINS - 1)
        self._bins += torch.bincount(places, minlength=_COSINE_BINS)

    def summary(self) -> dict[str, float]:
        """Return `mean` and `p5`, the value that 5 % of the cosines do not exceed."""
        count = int(self._bins.sum())
        rank = max(1, -(-count * 5 // 100))
        place = int(torch.searchsorted(self._bins.cumsum(0), rank))
        return {"mean": self._sum / count, "p5": (place + 0.5) / _COSINE_BINS * 2.0 - 1.0}


def image_features(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """Return one unit vector per image, (B, C): the class token, or the mean patch where there is none."""
    pooled = tokens[:, 0] if model.has_class_token else tokens[:, num_prefix(model) :].mean(dim=1)
    return normalize(pooled.float(), dim=-1)


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Classify unit vectors by the vote of their nearest training vectors, weighted by exp(cosine / temperature).

    Args:
        train: training features (M, C), unit length.
        train_labels: their classes (M,), int64.
        test: features to classify (M', C), unit length.
        test_labels: their classes (M',).

    Returns:
        The share of right answers, 0..1.
    """
    neighbours = min(NEIGHBOURS, len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for start in range(0, len(test), _KNN_CHUNK):
        chunk = slice(start, start + _KNN_CHUNK)
        cosines, nearest = (test[chunk] @ train.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(cosines), classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[nearest], (cosines.double() / VOTE_TEMPERATURE).exp())
        right += int((votes.argmax(dim=1) == test_labels[chunk]).sum())
    return right / len(test)


@dataclass
class _Seen:
    """What one model made of the images so far: features (M, C) and first guesses (M,)."""

    model: VisionTransformer
    features: list[Tensor] = field(default_factory=list)
    guesses: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor) -> None:
        self.features.append(image_features(self.model, tokens).cpu())
        if has_head(self.model):
            self.guesses.append(self.model.forward_head(tokens).argmax(dim=-1).cpu())


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The models side by side on the same pixels, `student` first and `teacher` if there is one."""

    models: dict[str, VisionTransformer]
    device: torch.device
    batch_size: int
    workers: int

    def over(self, images: ImageSet) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the final tokens of each model, (B, N, C), and the labels, (B,)."""
        for model in self.models.values():
            model.to(self.device).eval()
        indices = range(len(images))
        for pixels, labels in batches(
            images,
            data_config(self.models["student"]),
            indices=indices,
            batch_size=self.batch_size,
            augment=None,
            seed=0,
            workers=self.workers,
        ):
            on_device = pixels.to(self.device)
            yield {name: final_tokens(model, on_device) for name, model in self.models.items()}, labels

    def features(self, images: ImageSet) -> tuple[dict[str, Tensor], Tensor]:
        """Return each model's features (M, C) and the labels (M,)."""
        seen, labels = {name: _Seen(model) for name, model in self.models.items()}, []
        for tokens, batch_labels in self.over(images):
            labels.append(batch_labels)
            for name in seen:
                seen[name].add(tokens[name])
        return {name: torch.cat(one.features) for name, one in seen.items()}, torch.cat(labels)


@torch.inference_mode()
def evaluate(
    student: VisionTransformer,
    teacher: VisionTransformer | None,
    images: ImageSet,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    knn_images: ImageSet | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Compare two models on the same pixels (the student's own data config).

    Args:
        student: converted ViT.
        teacher: what it was converted from; without it the comparisons are left out.
        images: images to evaluate on.
        batch_size: images per forward pass.
        device: where to run; the models are moved there.
        knn_images: labelled training images; with them both models also get a k-NN accuracy.
        workers: processes that read images.

    Returns:
        `images`; `top1` and `teacher_top1` where the labels are the model's classes; `agreement` of the two
        first guesses where both have the same classes; `prefix_cosine` (with prefix tokens) and `patch_cosine`
        of the final tokens, each with `mean` and `p5`; `knn` and `teacher_knn` with `knn_images`. Shares are 0..1.

    Raises:
        UserError: if there are no images, or k-NN is asked for and an image set has no labels.
    """
    _check(images, knn_images)
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    run = _Run(models=models, device=torch.device(device), batch_size=batch_size, workers=workers)
    seen, labels = {name: _Seen(model) for name, model in models.items()}, []
    cosines = _TokenCosines(num_prefix(student))
    for tokens, batch_labels in run.over(images):
        labels.append(batch_labels)
        for name in seen:
            seen[name].add(tokens[name])
        if teacher is not None:
            cosines.add(tokens["student"], tokens["teacher"])
    truth = torch.cat(labels)
    result = {"images": len(truth), **_top1(seen, images, truth)}
    if teacher is not None:
        result |= _agreement(seen) | cosines.summary()
    if knn_images is not None:
        train, train_labels = run.features(knn_images)
        for name, one in seen.items():
            accuracy = knn_accuracy(train[name], train_labels, torch.cat(one.features), truth)
            result[_key(name, "knn")] = accuracy
    return result


class _TokenCosines:
    """Cosines of the final tokens of two models, prefix tokens and patches apart."""

    def __init__(self, prefix_tokens: int) -> None:
        self._prefix_tokens = prefix_tokens
        self._prefix, self._patch = CosineSummary(), CosineSummary()

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Count one batch of tokens, both (B, N, C)."""
        first = self._prefix_tokens
        self._prefix.add(student[:, :first], teacher[:, :first])
        self._patch.add(student[:, first:], teacher[:, first:])

    def summary(self) -> dict[str, Any]:
        prefix = {"prefix_cosine": self._prefix.summary()} if self._prefix_tokens else {}
        return {**prefix, "patch_cosine": self._patch.summary()}


def _check(images: ImageSet, knn_images: ImageSet | None) -> None:
    for one in (images, knn_images):
        if one is not None and not len(one):
            raise UserError(f"data {one.name!r}: no images to evaluate on")
        if knn_images is not None and one is not None and one.label_names is None:
            raise UserError(f"data {one.name!r}: k-NN needs labelled images, and these have no labels; leave --knn out")


def _top1(seen: dict[str, _Seen], images: ImageSet, labels: Tensor) -> dict[str, float]:
    result = {}
    for name, one in seen.items():
        classes = class_of_label(one.model, images.label_names) if one.guesses else None
        if classes is not None:
            result[_key(name, "top1")] = _share(torch.cat(one.guesses) == classes[labels])
    return result


def class_of_label(model: VisionTransformer, label_names: list[str] | None) -> Tensor | None:
    """Return the model's class for each label of the data, (L,), None where they cannot be matched.

    Labels are matched by name where the model knows its classes' names, otherwise by their order, if there
    are as many of them as classes.
    """
    if label_names is None:
        return None
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    known = cfg.get("label_names")
    if known is not None and set(label_names) <= set(known):
        return torch.tensor([known.index(label) for label in label_names])
    if known is None and len(label_names) == model.num_classes:
        return torch.arange(model.num_classes)
    _log.warning("no top-1: the data's %d labels are not the model's %d classes", len(label_names), model.num_classes)
    return None


def _agreement(seen: dict[str, _Seen]) -> dict[str, float]:
    student, teacher = seen["student"], seen["teacher"]
    if not (student.guesses and teacher.guesses and student.model.num_classes == teacher.model.num_classes):
        return {}
    return {"agreement": _share(torch.cat(student.guesses) == torch.cat(teacher.guesses))}


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def _key(model: str, figure: str) -> str:
    return figure if model == "student" else f"{model}_{figure}"

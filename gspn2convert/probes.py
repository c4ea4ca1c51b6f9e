"""What features of images are worth, and how alike two models' features are; pure functions, on any device.

Shape letters: M images or tokens, C channels, L classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, one_hot

from gspn2convert.images import spread

NEIGHBOURS = 20
# Temperature of the vote in the usual k-NN protocol for self-supervised ViTs (Wu et al., CVPR 2018).
VOTE_TEMPERATURE = 0.07

COMMON_NEIGHBOURS = 10
COMMON_NEIGHBOURS_IMAGES = 20_000

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Strengths of the linear probe's ridge, in means of the diagonal of the features' Gram matrix."""

_COSINE_BINS = 20_000
_CHUNK = 1024
_CHUNK_COSINES = 2**26  # a quarter of a GiB of them


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


class TokenCosines:
    """Cosines of the final tokens of two models, prefix tokens and patches apart."""

    def __init__(self, prefix_tokens: int) -> None:
        """Start with no tokens."""
        self._prefix_tokens = prefix_tokens
        self._prefix, self._patch = CosineSummary(), CosineSummary()

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Count one batch of tokens, both (B, N, C)."""
        first = self._prefix_tokens
        self._prefix.add(student[:, :first], teacher[:, :first])
        self._patch.add(student[:, first:], teacher[:, first:])

    def summary(self) -> dict[str, dict[str, float]]:
        """Return `prefix_cosine`, where there are such tokens, and `patch_cosine`."""
        prefix = {"prefix_cosine": self._prefix.summary()} if self._prefix_tokens else {}
        return {**prefix, "patch_cosine": self._patch.summary()}


class Cka:
    """Linear centred kernel alignment of two models' features, of any number of tokens in the memory of (2C)^2.

    It is |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred features with Frobenius norms (Kornblith et al., ICML 2019): 1 where
    one is the other turned and scaled, 0 where no channel of one goes with any of the other.
    """

    def __init__(self) -> None:
        """Start with no features."""
        self._count = 0
        self._first = self._sum = self._gram = torch.zeros(())

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Count the features of the same tokens, (M, C) and (M, C'), C and C' being the same in each call."""
        both = torch.cat([student.double(), teacher.double()], dim=1)
        if not self._count:
            self._first, self._channels = both[0].clone(), student.shape[1]
        # From the first token on: sums of squares lose no digits to a large mean, and constants are exactly 0.
        both -= self._first
        self._count += len(both)
        self._sum = self._sum.to(both) + both.sum(dim=0)
        self._gram = self._gram.to(both) + both.T @ both

    def value(self) -> float:
        """Return the alignment, 0..1; 0 where the features of a model are constant, as they tell nothing."""
        centred = self._gram - torch.outer(self._sum, self._sum) / self._count
        own, other = slice(None, self._channels), slice(self._channels, None)
        within = centred[own, own].norm() * centred[other, other].norm()
        return (centred[own, other].square().sum() / within).item() if within != 0.0 else 0.0


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Classify by the vote of the nearest training images by cosine, weighted by exp(cosine / temperature).

    Args:
        train: training features (M, C), of any length.
        train_labels: their classes (M,), int64.
        test: features to classify (M', C).
        test_labels: their classes (M',).

    Returns:
        The share of right answers, 0..1.
    """
    neighbours = min(NEIGHBOURS, len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for rows, cosines in _cosines(test, train):
        nearest = cosines.topk(neighbours, dim=1)
        votes = torch.zeros(len(cosines), classes, dtype=torch.float64, device=cosines.device)
        weights = (nearest.values.double() / VOTE_TEMPERATURE).exp()
        votes.scatter_add_(1, train_labels[nearest.indices], weights)
        right += int((votes.argmax(dim=1) == test_labels[rows]).sum())
    return right / len(test)


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Classify by ridge regression of the one-hot labels on standardised features.

    The strength of the ridge is the one of `RIDGES` that is best on a tenth of the training images, drawn with a fixed
    seed, after a fit to the rest; of equally good ones the strongest. Then all training images are fitted. The test
    images decide nothing.

    Args:
        train: training features (M, C), M > 1.
        train_labels: their classes (M,), int64.
        test: features to classify (M', C).
        test_labels: their classes (M',).

    Returns:
        The share of right answers, 0..1.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    # Drawn, since images often lie sorted by class.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    kept, held_out = order[len(train) // 10 or 1 :], order[: len(train) // 10 or 1]
    trial = _Ridge(train[kept], train_labels[kept], classes)
    scores = [trial.accuracy(train[held_out], train_labels[held_out], ridge) for ridge in RIDGES]
    best = max(range(len(RIDGES)), key=lambda place: (scores[place], place))
    return _Ridge(train, train_labels, classes).accuracy(test, test_labels, RIDGES[best])


class _Ridge:
    """Sums over training features (M, C) and labels (M,) in float64, from which a fit of any strength is had."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        count, channels = features.shape
        zeros = features.new_zeros(channels, dtype=torch.float64)
        self._mean = sum((part.double().sum(0) for part in features.split(_CHUNK)), zeros) / count
        squares = ((part.double() - self._mean).square().sum(0) for part in features.split(_CHUNK))
        deviation = (sum(squares, zeros) / count).sqrt()
        # Channels that do not vary but in their last digits stay as they are: nearly 0.
        self._scale = torch.where(deviation > 1e-6 * self._mean.abs(), deviation, 1.0)
        self._offset = torch.bincount(labels, minlength=classes).double() / count
        self._gram, self._moment = zeros.new_zeros(channels, channels), zeros.new_zeros(channels, classes)
        for part, truth in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
            standard = self._standard(part)
            self._gram += standard.T @ standard
            self._moment += standard.T @ (one_hot(truth, classes).double() - self._offset)

    def accuracy(self, features: Tensor, labels: Tensor, ridge: float) -> float:
        """Share of right answers with a ridge of that many means of the Gram matrix's diagonal."""
        level = self._gram.diagonal().mean()
        penalty = ridge * torch.where(level > 0, level, 1.0) * torch.ones_like(self._mean)
        weights = torch.linalg.solve(self._gram + penalty.diag(), self._moment)
        right = 0
        for part, truth in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
            guesses = (self._standard(part) @ weights + self._offset).argmax(dim=1)
            right += int((guesses == truth).sum())
        return right / len(features)

    def _standard(self, features: Tensor) -> Tensor:
        return (features.double() - self._mean) / self._scale


def neighbour_agreement(student: Tensor, teacher: Tensor) -> float:
    """Share of the ten nearest other images, by cosine, that two models have in common, averaged over the images.

    Args:
        student: features (M, C) of more than ten images; of more than 20,000, that many from all over are compared.
        teacher: features (M, C') of the same images.

    Returns:
        0..1; about 10 / (M - 1) for features that have nothing to do with each other.
    """
    assert len(student) == len(teacher) > COMMON_NEIGHBOURS
    chosen = torch.tensor(spread(range(len(student)), COMMON_NEIGHBOURS_IMAGES), device=student.device)
    count = len(chosen)
    pair = student[chosen], teacher[chosen]
    common = 0
    for (rows, ours), (_, theirs) in zip(*(_cosines(one, one) for one in pair), strict=True):
        itself = torch.arange(count, device=student.device)[rows, None]
        first, second = (
            one.scatter(1, itself, -torch.inf).topk(COMMON_NEIGHBOURS, dim=1).indices for one in (ours, theirs)
        )
        common += int((first[:, :, None] == second[:, None, :]).sum())
    return common / (count * COMMON_NEIGHBOURS)


def _cosines(features: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of the features' rows with their cosines to all others."""
    features, others = normalize(features.float(), dim=-1), normalize(others.float(), dim=-1)
    step = max(1, min(_CHUNK, _CHUNK_COSINES // len(others)))
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        yield rows, features[rows] @ others.T

"""How near a student is to its teacher, and how well both do on labelled images.

Shape letters: B batch, N tokens, C channels, M images, L classes.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from gspn2convert.data import ImageSet, batches
from gspn2convert.errors import UserError
from gspn2convert.images import spread
from gspn2convert.probes import (
    COMMON_NEIGHBOURS,
    Cka,
    TokenCosines,
    knn_accuracy,
    linear_accuracy,
    neighbour_agreement,
)
from gspn2convert.taps import Taps
from gspn2convert.vit import blocks, data_config, describe_tokens, final_tokens, has_head, num_prefix

CKA_IMAGES = 256

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CKA_BATCH = 8  # the tokens after every block of both models are there at once
_PROBES = {"knn": knn_accuracy, "linear": linear_accuracy}

_log = logging.getLogger(__name__)


def image_features(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """Return one vector per image, (B, C) in float32: the class token, or the mean patch where there is none."""
    pooled = tokens[:, 0] if model.has_class_token else tokens[:, num_prefix(model) :].mean(dim=1)
    return pooled.float()


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
    precision: str
    batch_size: int
    workers: int
    config: dict[str, Any]

    def over(
        self, images: ImageSet, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the final tokens of each model, (B, N, C) in float32, and the labels, (B,)."""
        dtype = _AUTOCAST[self.precision]
        for model in self.models.values():
            model.to(self.device).eval()
        for pixels, labels in batches(
            images,
            self.config,
            indices=range(len(images)) if indices is None else indices,
            batch_size=self.batch_size,
            augment=None,
            seed=0,
            workers=self.workers,
        ):
            on_device = pixels.to(self.device)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                tokens = {name: final_tokens(model, on_device).float() for name, model in self.models.items()}
            yield tokens, labels

    def see(self, images: ImageSet, cosines: TokenCosines | None = None) -> tuple[dict[str, _Seen], Tensor]:
        """Return what each model made of the images, and the labels (M,); cosines count the tokens of both."""
        seen, labels = {name: _Seen(model) for name, model in self.models.items()}, []
        for tokens, batch_labels in self.over(images):
            labels.append(batch_labels)
            for name in seen:
                seen[name].add(tokens[name])
            if cosines is not None:
                cosines.add(tokens["student"], tokens["teacher"])
        return seen, torch.cat(labels)


@torch.inference_mode()
def evaluate(
    student: VisionTransformer,
    teacher: VisionTransformer | None,
    images: ImageSet,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    knn_images: ImageSet | None = None,
    linear_images: ImageSet | None = None,
    cka: bool = False,
    workers: int = 0,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare two models on the same pixels (the student's own data config), both by the same protocol.

    Args:
        student: converted ViT.
        teacher: what it was converted from; without it the comparisons are left out.
        images: images to evaluate on.
        batch_size: images per forward pass.
        device: where to run; the models are moved there.
        precision: "fp32", "bf16" or "fp16", the latter two by autocast of the tokens; heads and scores stay in float32.
        knn_images: labelled training images; with them both models also get a k-NN accuracy.
        linear_images: labelled training images; with them both models also get the accuracy of a linear probe.
        cka: also compare the patch tokens after each block, on at most 256 of the images, from all over the set.
        workers: processes that read images.
        config: how images are made ready, see `vit.data_config`; the student's own by default.

    Returns:
        `images`; `top1` where the labels are the model's classes; `knn` with `knn_images`, `linear` with
        `linear_images`; each of these also as `teacher_...` and, where there are both and the teacher's is not 0, as
        `..._kept`, the student's share of the teacher's. With a teacher: `agreement` of the two first guesses where
        both have the same classes; `prefix_cosine` (with prefix tokens) and `patch_cosine` of the final tokens, each
        with `mean` and `p5`; `neighbour_agreement` on more than 10 images, the share of an image's 10 nearest that the
        models have in common (over 20,000 images from all over the set where there are more); `cka`, one figure per
        block, where asked for. Shares and CKA are 0..1; what is kept may be more.

    Raises:
        UserError: there are no images; k-NN or a linear probe is asked for and a set has no labels, or the training
            images are those evaluated on or have other classes; the teacher is of another shape, or CKA has none.
    """
    _check_models(student, teacher, precision, cka)
    wanted = {"knn": knn_images, "linear": linear_images}
    _check_images(images, [one for one in wanted.values() if one is not None])
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    where = torch.device(device)
    if where.type == "cpu":  # a run of several processes names it "cpu:0", which is another place to torch
        where = torch.device("cpu")
    how: dict[str, Any] = {"precision": precision, "batch_size": batch_size, "workers": workers}
    run = _Run(models=models, device=where, config=config or data_config(student), **how)
    cosines = None if teacher is None else TokenCosines(num_prefix(student))
    seen, truth = run.see(images, cosines)
    features = {name: torch.cat(one.features).to(where) for name, one in seen.items()}
    result: dict[str, Any] = {"images": len(truth), **_both("top1", _top1(seen, images, truth))}
    if cosines is not None:
        result |= _agreement(seen) | cosines.summary() | _common_neighbours(features)
    result |= _probe(run, images, features, truth, wanted)
    return result | ({"cka": _block_cka(run, images)} if cka else {})


def _probe(
    run: _Run, images: ImageSet, features: dict[str, Tensor], truth: Tensor, wanted: dict[str, ImageSet | None]
) -> dict[str, float]:
    """Score features (M, C) of each model and labels (M,) by the training images of each figure that is wanted."""
    result: dict[str, float] = {}
    for training in dict.fromkeys(one for one in wanted.values() if one is not None):
        learnt, labels = run.see(training)
        kept, told = _with_class(training, labels), _with_class(images, truth)
        labels, asked = labels[kept].to(run.device), _labels_of(training, images, truth[told]).to(run.device)
        known = {name: torch.cat(one.features)[kept].to(run.device) for name, one in learnt.items()}
        own = {name: one[told.to(run.device)] for name, one in features.items()}
        for figure in (figure for figure, one in wanted.items() if one is training):
            score = _PROBES[figure]
            result |= _both(figure, {name: score(known[name], labels, own[name], asked) for name in known})
    return result


def _with_class(images: ImageSet, labels: Tensor) -> Tensor:
    """Tell which of the labels (M,) name a class."""
    if not (known := labels >= 0).any():
        raise UserError(f"data {images.name!r}: all labels are -1, so leave --knn and --linear out")
    return known


def _labels_of(training: ImageSet, images: ImageSet, labels: Tensor) -> Tensor:
    """Return the images' labels (M,) as the training images count their classes."""
    known, names = training.label_names, images.label_names
    assert known is not None
    assert names is not None
    return labels if known == names else torch.tensor([known.index(name) for name in names])[labels]


def _block_cka(run: _Run, images: ImageSet) -> list[float]:
    """Compare the patch tokens after each block."""
    depth = len(blocks(run.models["student"]))
    sums = [Cka() for _ in range(depth)]
    with contextlib.ExitStack() as open_taps:
        taps = [open_taps.enter_context(Taps(model, range(depth), blocks)) for model in run.models.values()]
        firsts = [num_prefix(model) for model in run.models.values()]
        few = replace(run, batch_size=min(run.batch_size, _CKA_BATCH))
        for _ in few.over(images, spread(range(len(images)), CKA_IMAGES)):
            for block, one in enumerate(sums):
                ours, theirs = (tap.outputs[block][:, p:].flatten(0, 1) for tap, p in zip(taps, firsts, strict=True))
                one.add(ours, theirs)
    return [one.value() for one in sums]


def _check_models(student: VisionTransformer, teacher: VisionTransformer | None, precision: str, cka: bool) -> None:
    if precision not in _AUTOCAST:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(_AUTOCAST)}")
    if teacher is None:
        if cka:
            raise UserError("CKA compares a student with its teacher, and there is none; leave --cka out, or name one")
        return
    ours, theirs = describe_tokens(student), describe_tokens(teacher)
    if ours != theirs:
        raise UserError(f"the student has {ours}, the teacher {theirs}; name the teacher that it was converted from")


def _check_images(images: ImageSet, training: Sequence[ImageSet]) -> None:
    for one in (images, *training):
        if not len(one):
            raise UserError(f"data {one.name!r}: no images to evaluate on")
        if training and one.label_names is None:
            raise UserError(
                f"data {one.name!r}: k-NN and a linear probe need labelled images, and these have no labels; "
                "leave --knn and --linear out"
            )
    for one in training:
        if one is images or one.same_as(images):
            raise UserError(
                f"data {one.name!r}: its training images are the very ones to evaluate on, so --knn and --linear would "
                "flatter; give data with a train and a test split and evaluate on the latter, or leave them out"
            )
        unknown = sorted(set(images.label_names or ()) - set(one.label_names or ()))
        if unknown:
            raise UserError(
                f"data {one.name!r}: class {unknown[0]!r} is in the images to evaluate on, but in no training image; "
                "leave --knn and --linear out"
            )


def _top1(seen: dict[str, _Seen], images: ImageSet, labels: Tensor) -> dict[str, float]:
    result, known = {}, labels >= 0  # -1 is of images whose class is not told, as in the test split of ImageNet
    for name, one in seen.items():
        classes = class_of_label(one.model, images.label_names) if one.guesses else None
        if classes is not None and bool(known.any()):
            result[name] = _share(torch.cat(one.guesses)[known] == classes[labels[known]])
    return result


def class_of_label(model: VisionTransformer, label_names: list[str] | None) -> Tensor | None:
    """Return the model's class for each label of the data, (L,), None where they cannot be matched.

    Labels are matched by name where the model knows its classes' names, otherwise by their order, if there
    are as many of them as classes.
    """
    if not label_names or not model.num_classes:
        return None
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    known = cfg.get("label_names")
    if known is not None and set(label_names) <= set(known):
        return torch.tensor([known.index(label) for label in label_names])
    if known is None and len(label_names) == model.num_classes:
        return torch.arange(model.num_classes)
    classes = f"{model.num_classes} classes" + (f" ({known[0]}, ...)" if known else "")
    labels = f"{len(label_names)} labels ({label_names[0]}, ...)"
    _log.warning("no top-1: the data's %s are not the model's %s", labels, classes)
    return None


def _agreement(seen: dict[str, _Seen]) -> dict[str, float]:
    student, teacher = seen["student"], seen["teacher"]
    if not (student.guesses and teacher.guesses and student.model.num_classes == teacher.model.num_classes):
        return {}
    return {"agreement": _share(torch.cat(student.guesses) == torch.cat(teacher.guesses))}


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def _common_neighbours(features: dict[str, Tensor]) -> dict[str, float]:
    if len(features["student"]) <= COMMON_NEIGHBOURS:
        return {}
    return {"neighbour_agreement": neighbour_agreement(features["student"], features["teacher"])}


def _both(figure: str, scores: dict[str, float]) -> dict[str, float]:
    """Name the scores of student and teacher, and what share of the teacher's the student has kept."""
    result = {figure if name == "student" else f"{name}_{figure}": score for name, score in scores.items()}
    if scores.get("teacher") and "student" in scores:
        result[f"{figure}_kept"] = scores["student"] / scores["teacher"]
    return result

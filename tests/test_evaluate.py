"""Accuracy, agreement, cosines and k-NN against numbers by hand and against timm's own way."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import cosine_similarity

from gspn2convert.data import open_images
from gspn2convert.errors import UserError
from gspn2convert.evaluate import CosineSummary, class_of_label, evaluate, image_features, knn_accuracy
from gspn2convert.model import build_student

CLASSES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture
def folder(tmp_path):
    """Noise of a different brightness for each class, 3 to 5 test images of each."""
    noise = np.random.default_rng(0)
    for split, extra in (("train", 5), ("test", 0)):
        for label, name in enumerate(CLASSES):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for index in range(3 + label % 3 + extra):
                pixels = noise.integers(0, 56, (40, 52, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return tmp_path


@pytest.fixture
def student(tiny_teacher):
    return build_student(tiny_teacher, [1], {"proxy_dim": 4})


def on_circle(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def pictures(folder, model):
    """All test images as timm's own transform makes them, and their labels."""
    transform = create_transform(**resolve_model_data_config(model))
    files = [(file, label) for label, name in enumerate(CLASSES) for file in sorted((folder / "test" / name).iterdir())]
    pixels = torch.stack([transform(Image.open(file)) for file, _ in files])
    return pixels, torch.tensor([label for _, label in files])


def test_cosines_have_the_mean_and_percentile_of_the_angles():
    # 200 angles; 5 % of them, the 10 widest, are 90 to 81 degrees.
    angles = torch.cat([torch.arange(81.0, 91.0), torch.linspace(0, 60, 190)]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    summary = CosineSummary()
    for part in vectors.split(70):
        summary.add(part[None], torch.tensor([2.0, 0.0]).expand(1, len(part), 2))
    found = summary.summary()
    assert found["mean"] == pytest.approx(angles.cos().mean().item(), abs=1e-6)
    assert found["p5"] == pytest.approx(math.cos(math.radians(81)), abs=1e-4)


def test_cosines_reach_both_ends():
    summary = CosineSummary()
    summary.add(torch.ones(1, 1, 3), torch.ones(1, 1, 3))
    assert summary.summary() == {"mean": pytest.approx(1.0), "p5": pytest.approx(1.0, abs=1e-4)}
    summary.add(torch.ones(1, 1, 3), -torch.ones(1, 1, 3))
    assert summary.summary() == {"mean": pytest.approx(0.0, abs=1e-7), "p5": pytest.approx(-1.0, abs=1e-4)}


def test_nearest_neighbours_vote_by_their_cosine():
    train, labels = on_circle(10.0, 40.0, -40.0, 44.0), torch.tensor([0, 1, 1, 1])
    # At 0 degrees exp(cos 10 / .07) = 1.3e6 stands against 2 exp(cos 40 / .07) + exp(cos 44 / .07) = 1.4e5, so the
    # one near neighbour wins. At 26 degrees it is 9.2e5 against 2 near ones (9.2e5 and 7.6e5), so the many win.
    query = on_circle(0.0, 26.0)
    assert knn_accuracy(train, labels, query, torch.tensor([0, 1])) == 1.0
    assert knn_accuracy(train, labels, query, torch.tensor([1, 1])) == 0.5
    assert knn_accuracy(train, labels, query, torch.tensor([1, 0])) == 0.0


def test_only_twenty_neighbours_vote():
    # 20 of class 0 at 50 degrees; 200 of class 1 at 52 degrees would outvote them if all were asked.
    train = on_circle(*[50.0] * 20, *[52.0] * 200)
    labels = torch.tensor([0] * 20 + [1] * 200)
    assert knn_accuracy(train, labels, on_circle(0.0), torch.tensor([0])) == 1.0


def test_figures_equal_those_computed_directly(folder, student, tiny_teacher):
    images, train = (open_images(str(folder), split) for split in ("test", "train"))
    found = evaluate(student, tiny_teacher, images, batch_size=7, knn_images=train)
    pixels, labels = pictures(folder, student)
    with torch.inference_mode():
        ours, theirs = (model(pixels).argmax(1) for model in (student, tiny_teacher))
        cosines = cosine_similarity(student.forward_features(pixels), tiny_teacher.forward_features(pixels), dim=-1)
    assert found["images"] == len(labels) == 19
    assert found["top1"] == pytest.approx((ours == labels).double().mean().item())
    assert found["teacher_top1"] == pytest.approx((theirs == labels).double().mean().item())
    assert found["agreement"] == pytest.approx((ours == theirs).double().mean().item())
    assert found["prefix_cosine"]["mean"] == pytest.approx(cosines[:, 0].mean().item(), abs=1e-5)
    assert found["patch_cosine"]["mean"] == pytest.approx(cosines[:, 1:].mean().item(), abs=1e-5)
    ranked = cosines[:, 1:].flatten().sort().values
    assert found["patch_cosine"]["p5"] == pytest.approx(ranked[-(-len(ranked) // 20) - 1].item(), abs=1e-4)
    # The classes differ in brightness, which the features of any network tell.
    assert found["teacher_knn"] > 0.5
    # Other batches, other orders of summation in a matrix product, on some processors: not the same bits.
    again = evaluate(student, tiny_teacher, images, batch_size=4, knn_images=train)
    for kind in ("prefix_cosine", "patch_cosine"):
        assert again[kind]["mean"] == pytest.approx(found[kind]["mean"], abs=1e-6)
        assert again[kind]["p5"] == pytest.approx(found[kind]["p5"], abs=1e-4)
    cosines_apart = {"prefix_cosine": None, "patch_cosine": None}
    assert found | cosines_apart == again | cosines_apart


def test_a_model_agrees_with_itself(folder, tiny_teacher):
    found = evaluate(tiny_teacher, tiny_teacher, open_images(str(folder), "test"))
    assert found["agreement"] == 1.0
    assert found["patch_cosine"] == {"mean": pytest.approx(1.0, abs=1e-6), "p5": pytest.approx(1.0, abs=1e-4)}


def test_without_a_teacher_nothing_is_compared(folder, student):
    found = evaluate(student, None, open_images(str(folder), "test"))
    assert found.keys() == {"images", "top1"}


def test_without_a_head_features_alone_are_compared(folder, make_teacher):
    teacher = make_teacher(num_classes=0, class_token=False, reg_tokens=2, global_pool="avg")
    student = build_student(teacher, [0], {"proxy_dim": 4})
    found = evaluate(student, teacher, open_images(str(folder), "test"), knn_images=open_images(str(folder), "train"))
    assert found.keys() == {"images", "prefix_cosine", "patch_cosine", "knn", "teacher_knn"}


def test_features_are_the_class_token_or_the_mean_patch(tiny_teacher, make_teacher):
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    expected = tokens[:, 0] / tokens[:, 0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(image_features(tiny_teacher, tokens), expected)
    registers = make_teacher(class_token=False, reg_tokens=2, global_pool="avg")
    mean = tokens[:, 2:].sum(1) / 7
    torch.testing.assert_close(image_features(registers, tokens), mean / mean.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("known", "labels", "expected"),
    [
        (None, CLASSES, [0, 1, 2, 3, 4]),  # by order, where the model knows no names
        (None, CLASSES[:4], None),
        (None, None, None),
        (["elk", "dog", "cat", "bee", "ant"], CLASSES, [4, 3, 2, 1, 0]),  # by name
        (CLASSES, ["cat", "ant"], [2, 0]),  # data with some of the classes
        (CLASSES, ["cat", "yak"], None),
    ],
)
def test_labels_are_matched_with_classes(tiny_teacher, known, labels, expected):
    tiny_teacher.pretrained_cfg = {**tiny_teacher.pretrained_cfg, "label_names": known}
    found = class_of_label(tiny_teacher, labels)
    assert (found is None) == (expected is None)
    assert found is None or found.tolist() == expected


def test_images_of_other_classes_have_no_top1(folder, student, caplog):
    student.pretrained_cfg = {**student.pretrained_cfg, "label_names": ["a", "b", "c", "d", "e"]}
    assert "top1" not in evaluate(student, None, open_images(str(folder), "test"))
    assert "no top-1" in caplog.text


def test_knn_without_labels_is_refused(folder, student):
    bare = open_images(str(folder / "test" / "ant"), "test")
    with pytest.raises(UserError, match="k-NN needs labelled images"):
        evaluate(student, None, bare, knn_images=bare)

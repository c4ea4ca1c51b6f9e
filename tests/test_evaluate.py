"""Figures of two models against those computed directly, and against timm's own way."""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import cosine_similarity

from gspn2convert.data import open_images
from gspn2convert.errors import UserError
from gspn2convert.evaluate import class_of_label, evaluate, image_features
from gspn2convert.model import build_student
from gspn2convert.probes import knn_accuracy, linear_accuracy, neighbour_agreement

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


def pictures(folder, model, split="test"):
    """All images of a split as timm's own transform makes them, and their labels."""
    transform = create_transform(**resolve_model_data_config(model))
    files = [(file, label) for label, name in enumerate(CLASSES) for file in sorted((folder / split / name).iterdir())]
    pixels = torch.stack([transform(Image.open(file)) for file, _ in files])
    return pixels, torch.tensor([label for _, label in files])


def test_figures_equal_those_computed_directly(folder, student, tiny_teacher):
    images, train = (open_images(str(folder), split) for split in ("test", "train"))
    found = evaluate(student, tiny_teacher, images, batch_size=7, knn_images=train, linear_images=train)
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
    assert found["teacher_linear"] > 0.5
    for figure in ("top1", "knn", "linear"):
        assert found[f"{figure}_kept"] == pytest.approx(found[figure] / found[f"teacher_{figure}"])
    # Other batches, other orders of summation in a matrix product, on some processors: not the same bits.
    again = evaluate(student, tiny_teacher, images, batch_size=4, knn_images=train, linear_images=train)
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
    compared = {"prefix_cosine", "patch_cosine", "neighbour_agreement"}
    assert found.keys() == {"images", *compared, "knn", "teacher_knn", "knn_kept"}


def test_features_are_the_class_token_or_the_mean_patch(tiny_teacher, make_teacher):
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(image_features(tiny_teacher, tokens), tokens[:, 0])
    registers = make_teacher(class_token=False, reg_tokens=2, global_pool="avg")
    torch.testing.assert_close(image_features(registers, tokens), tokens[:, 2:].sum(1) / 7)


def test_probes_are_asked_about_the_features_of_their_own_model(folder, student, tiny_teacher):
    images, train = (open_images(str(folder), split) for split in ("test", "train"))
    found = evaluate(student, tiny_teacher, images, knn_images=train, linear_images=train)
    features = {}
    for split in ("train", "test"):
        pixels, labels = pictures(folder, student, split)
        with torch.inference_mode():
            features[split] = [model.forward_features(pixels)[:, 0] for model in (student, tiny_teacher)], labels
    for index, prefix in enumerate(("", "teacher_")):
        rows = [one for split in ("train", "test") for one in (features[split][0][index], features[split][1])]
        assert found[f"{prefix}knn"] == pytest.approx(knn_accuracy(*rows))
        assert found[f"{prefix}linear"] == pytest.approx(linear_accuracy(*rows))
    assert found["neighbour_agreement"] == pytest.approx(neighbour_agreement(*features["test"][0]))


def test_cka_of_each_block_is_that_of_its_patch_tokens(folder, student, tiny_teacher):
    images = open_images(str(folder), "test")
    found = evaluate(student, tiny_teacher, images, cka=True)["cka"]
    pixels, _ = pictures(folder, student)
    with torch.inference_mode():
        layers = [
            model.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
            for model in (student, tiny_teacher)
        ]
    expected = []
    for tokens in zip(*layers, strict=True):
        ours, theirs = (one.flatten(0, 1).double() for one in tokens)
        ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
        within = (ours.T @ ours).norm() * (theirs.T @ theirs).norm()
        expected.append(((ours.T @ theirs).norm() ** 2 / within).item())
    # Block 0 keeps its attention, block 1 has a fresh mixer.
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(1.0, abs=1e-6)
    assert found[1] < 0.999
    assert evaluate(student, tiny_teacher, images, cka=True, batch_size=3)["cka"] == pytest.approx(found, abs=1e-6)


def test_few_images_have_no_neighbours_in_common(folder, tiny_teacher):
    found = evaluate(tiny_teacher, tiny_teacher, open_images(str(folder / "test" / "cat"), "test"), cka=True)
    assert found["images"] == 5
    assert "neighbour_agreement" not in found
    assert found["cka"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_is_of_both_models_and_of_tokens_alone(folder, student, tiny_teacher, precision, dtype):
    images = open_images(str(folder), "test")
    found = evaluate(student, tiny_teacher, images, precision=precision, cka=True)
    pixels, labels = pictures(folder, student)
    with torch.inference_mode():
        with torch.autocast("cpu", dtype):
            ours, theirs = (model.forward_features(pixels) for model in (student, tiny_teacher))
        cosines = cosine_similarity(ours.float(), theirs.float(), dim=-1)
        guesses = [
            model.forward_head(one.float()).argmax(1) for model, one in ((student, ours), (tiny_teacher, theirs))
        ]
    assert found["patch_cosine"]["mean"] == pytest.approx(cosines[:, 1:].mean().item(), abs=1e-4)
    assert found["agreement"] == pytest.approx((guesses[0] == guesses[1]).double().mean().item())
    exact = evaluate(student, tiny_teacher, images, cka=True)
    assert found["patch_cosine"]["mean"] != exact["patch_cosine"]["mean"]
    assert found["patch_cosine"]["mean"] == pytest.approx(exact["patch_cosine"]["mean"], abs=1e-2)
    assert found["cka"] == pytest.approx(exact["cka"], abs=1e-2)


def test_an_unknown_precision_is_refused(folder, student):
    with pytest.raises(UserError, match="'int8': expected one of fp32, bf16, fp16"):
        evaluate(student, None, open_images(str(folder), "test"), precision="int8")


def test_labels_go_by_their_names_not_their_numbers(folder, student):
    train = open_images(str(folder), "train")
    few = open_images(str(folder / "test"), "test")
    whole = evaluate(student, None, few, linear_images=train)["linear"]
    for name in ("ant", "cat"):
        for file in (folder / "test" / name).iterdir():
            file.unlink()
        (folder / "test" / name).rmdir()
    # Bee, dog and elk are classes 0, 1, 2 there and 1, 3, 4 among the training images.
    part = open_images(str(folder / "test"), "test")
    assert part.label_names == ["bee", "dog", "elk"]
    assert whole > 0.6
    assert evaluate(student, None, part, linear_images=train)["linear"] > 0.6
    with pytest.raises(UserError, match="class 'ant' is in the images to evaluate on, but in no training image"):
        evaluate(student, None, train, knn_images=part)


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


@pytest.mark.parametrize("figure", ["knn", "linear"])
def test_probes_without_labels_are_refused(folder, student, figure):
    bare = open_images(str(folder / "test" / "ant"), "test")
    with pytest.raises(UserError, match="k-NN and a linear probe need labelled images"):
        evaluate(student, None, bare, **{f"{figure}_images": bare})


@pytest.mark.parametrize("figure", ["knn", "linear"])
@pytest.mark.parametrize(
    ("data", "split"),
    [
        ("{}/train", "test"),  # a folder without splits serves as both
        ("{}", "train"),  # evaluating on the training images themselves
        ("demo", "train"),
    ],
)
def test_training_images_are_not_those_evaluated_on(folder, student, figure, data, split):
    images, train = (open_images(data.replace("{}", str(folder)), one) for one in (split, "train"))
    assert images.same_as(train)
    with pytest.raises(UserError, match="training images are the very ones to evaluate on"):
        evaluate(student, None, images, **{f"{figure}_images": train})


def test_image_sets_are_told_apart(folder, tmp_path_factory):
    train, test = (open_images("demo", split) for split in ("train", "test"))
    assert not train.same_as(test)
    ours = open_images(str(folder / "test"), "test")
    # A copy of a set is that set, whatever it is called; with one pixel changed it is another one.
    place = tmp_path_factory.mktemp("copy") / "other"
    shutil.copytree(folder / "test", place)
    assert ours.same_as(open_images(str(place), "test"))
    with Image.open(place / "ant" / "0.png") as image:
        image.putpixel((0, 0), (255, 0, 0))
        image.save(place / "ant" / "0.png")
    assert not ours.same_as(open_images(str(place), "test"))
    (place / "ant" / "1.png").unlink()
    assert not ours.same_as(open_images(str(place), "test"))


def test_models_of_other_shapes_are_not_compared(folder, student, make_teacher):
    with pytest.raises(UserError, match="the student has 2 blocks of width 32.* the teacher 3 blocks of width 32"):
        evaluate(student, make_teacher(depth=3), open_images(str(folder), "test"))
    with pytest.raises(UserError, match="CKA compares a student with its teacher"):
        evaluate(student, None, open_images(str(folder), "test"), cka=True)


@pytest.mark.gpu
def test_a_gpu_finds_the_same(folder, student, tiny_teacher):
    images, train = (open_images(str(folder), split) for split in ("test", "train"))
    models = copy.deepcopy((student, tiny_teacher))
    found, on_gpu = (
        evaluate(*pair, images, device=device, knn_images=train, linear_images=train, cka=True)
        for pair, device in (((student, tiny_teacher), "cpu"), (models, "cuda"))
    )
    assert found.keys() == on_gpu.keys()
    assert on_gpu["cka"] == pytest.approx(found["cka"], abs=1e-3)
    for key in ("knn", "teacher_knn", "linear", "teacher_linear", "neighbour_agreement"):
        assert on_gpu[key] == pytest.approx(found[key], abs=1.1 / 19)  # one image may lie on an edge

"""Stage 3: what a climb makes of the student, and one that is stopped against one that is not."""

import importlib
import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gspn2convert
from gspn2convert.cache import ImageCache
from gspn2convert.checkpoint import FILE_NAME, CheckpointStore
from gspn2convert.conversion import Conversion
from gspn2convert.curriculum import ReducedStage
from gspn2convert.data import split_held_out
from gspn2convert.demo_data import DemoSource
from gspn2convert.distill import Options, distill_student
from gspn2convert.errors import UserError
from gspn2convert.evaluate import evaluate
from gspn2convert.images import ImageSet
from gspn2convert.interrupt import Interrupted
from gspn2convert.model import Gspn2Vit
from gspn2convert.progress import Progress
from gspn2convert.recipe import parse_recipe
from gspn2convert.supply import Supply
from gspn2convert.teachers import load_teacher
from gspn2convert.train import make_accelerator
from gspn2convert.vit import data_config
from helpers.demo_part import Part

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
name: climb
mixer: {proxy_dim: 8}
fit: {images: 16, held_out: 8, batch_size: 8}
align: {steps: 2, batch_size: 4}
recover: {steps: 2, batch_size: 4, ema: 0.5}
curriculum: {sizes: [36, 44], steps: 4, batch_size: 8, ema: 0.5, target: TARGET}
augment: {scale: [0.7, 1.0], color_jitter: 0.1}
eval_every: 2
held_out: 12
"""
TARGETS = ["teacher", "reduced", "previous"]
IN_A_STEP = 8


def climb(output, target, *, pictures=None, tests=20, recipe=RECIPE, **options):
    """Convert the demo teacher; its metrics."""
    sets = (
        ImageSet("part", pictures or Part("train", 70), in_chans=1),
        ImageSet("test", Part("test", tests), in_chans=1),
    )
    how = Options(output=output, device="cpu", quiet=True, **options)
    return distill_student(
        load_teacher("demo"), parse_recipe(recipe.replace("TARGET", target), "test"), *sets, how, teacher_name="demo"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For each target the folder of a whole run, its metrics, and how many images it read."""
    runs = {}

    def get(target):
        if target not in runs:
            folder, pictures = tmp_path_factory.mktemp(target) / "out", Part("train", 70)
            runs[target] = folder, climb(folder, target, pictures=pictures), pictures.reads
        return runs[target]

    return get


def pixels(indices, size, split="train"):
    """Demo images as the teacher wants to see them at a size, by Pillow and torch alone."""
    source = DemoSource(split)
    images = [source.read(index)[0].resize((size, size), 3) for index in indices]
    return (torch.tensor(np.stack(images)).unsqueeze(1) / 255 - 0.286) / 0.353


# The climb


@pytest.mark.parametrize("target", TARGETS)
def test_the_student_ends_at_the_last_size_as_it_was_measured(undisturbed, target):
    folder, metrics, _ = undisturbed(target)
    names = ["fit", "align", "recover", "curriculum-36", "curriculum-44"]
    assert [stage["stage"] for stage in metrics["stages"]] == names
    history = [(record["stage"], record["step"]) for record in metrics["history"] if "evaluation" in record]
    assert history[-4:] == [("curriculum-36", 2), ("curriculum-36", 4), ("curriculum-44", 2), ("curriculum-44", 4)]
    assert metrics["stages_run"] == [0, 1, 2, 3]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_args"]["img_size"], config["pretrained_cfg"]["input_size"]) == ([44, 44], [1, 44, 44])
    student, teacher = gspn2convert.load(folder), load_teacher("demo")
    _, unseen = split_held_out(70, 12, 0)
    images = pixels(unseen, 44)
    with torch.no_grad():
        ours, theirs = student.forward_features(images), teacher.forward_features(images)
    assert ours.shape == (12, 1 + 11 * 11, 96)
    cosines = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    expected = {"prefix_cosine": cosines[:, 0].mean().item(), "patch_cosine": cosines[:, 1:].mean().item()}
    last = metrics["stages"][-1]
    assert {key: last[key] for key in expected} == pytest.approx(expected, abs=1e-4)


def test_each_target_trains_another_student(undisturbed):
    weights = [gspn2convert.load(undisturbed(target)[0]).head.weight.detach() for target in TARGETS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((weights[one] - weights[other]).abs().max()) > 1e-6


def test_what_is_saved_is_what_was_trained(tmp_path, undisturbed):
    """The same climb in memory gives the tokens of the saved folder, to the bit."""
    folder, _, _ = undisturbed("previous")
    sets = (ImageSet("part", Part("train", 70), in_chans=1), ImageSet("test", Part("test", 20), in_chans=1))
    recipe, options = parse_recipe(RECIPE.replace("TARGET", "previous"), "test"), Options(output=tmp_path, device="cpu")
    with Progress(quiet=True) as progress:
        accelerator, store = make_accelerator("cpu"), CheckpointStore(tmp_path, {})
        student = Conversion(load_teacher("demo"), recipe, *sets, options, accelerator, store, progress).stages(())
    images = pixels(range(3), 44)
    with torch.no_grad():
        assert torch.equal(gspn2convert.load(folder).forward_features(images), student.forward_features(images))


@pytest.mark.parametrize("cached", [False, True])
def test_the_shape_of_batches_is_known_before_they_come(cached):
    images, recipe = (
        ImageSet("part", Part("train", 30), in_chans=1),
        parse_recipe(RECIPE.replace("TARGET", "teacher"), "test"),
    )
    config = data_config(load_teacher("demo")) | {"input_size": (1, 36, 36)}
    supply = Supply(images, range(20), config, recipe, make_accelerator("cpu"), workers=0, cached=cached)
    assert supply.shape(recipe.align) == next(supply.training(recipe.align, 0, 0)).shape == (4, 1, 36, 36)


def test_the_guide_is_the_student_as_it_was_before_it_took_the_next_size(tmp_path, monkeypatch):
    embeddings, guides = {}, {}

    class Kept(ReducedStage):
        def __init__(self, student, teacher, losses, deviations, guide, size):
            guides[size] = guide.pos_embed.detach().clone()
            super().__init__(student, teacher, losses, deviations, guide, size)

    set_input_size = Gspn2Vit.set_input_size

    def resize(student, size):
        embeddings[tuple(student.patch_embed.img_size)] = student.pos_embed.detach().clone()
        set_input_size(student, size)

    monkeypatch.setattr(importlib.import_module("gspn2convert.conversion"), "ReducedStage", Kept)
    monkeypatch.setattr(Gspn2Vit, "set_input_size", resize)
    climb(tmp_path / "out", "previous")
    assert set(guides) == {(28, 28), (36, 36)}
    for size, embedding in guides.items():
        assert torch.equal(embedding, embeddings[size])


def teacher_top1(size, count):
    """By Pillow and torch alone."""
    source = DemoSource("test")
    with torch.no_grad():
        guesses = load_teacher("demo")(pixels(range(count), size, "test")).argmax(-1)
    return float((guesses == torch.tensor([source.read(index)[1] for index in range(count)])).double().mean())


def test_top1_is_measured_at_the_size_of_the_stage(tmp_path):
    """Of 200 images, of which the teacher guesses some otherwise at 44 px than at 36."""
    metrics = climb(tmp_path / "out", "teacher", tests=200)
    student = gspn2convert.load(tmp_path / "out")
    expected = evaluate(student, None, ImageSet("test", Part("test", 200), in_chans=1), device=torch.device("cpu"))
    assert metrics["stages"][-1]["top1"] == expected["top1"]
    first, last = (teacher_top1(size, 200) for size in (28, 44))
    assert metrics["teacher_top1"] == pytest.approx(last, abs=2e-3)
    assert abs(first - last) > 0.01


def assert_same_end(folder, metrics, expected, expected_metrics):
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in expected.iterdir())
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    for ours, theirs in zip(metrics["stages"], expected_metrics["stages"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize(
    ("target", "size", "left"),
    [
        ("previous", 36, 1),
        ("teacher", 44, 3),
        ("previous", 44, 3),
        ("previous", 44, 1),
    ],
)
def test_a_stopped_climb_goes_on_to_the_same_end(tmp_path, undisturbed, target, size, left):
    expected, expected_metrics, reads = undisturbed(target)
    stop = reads - IN_A_STEP * (left + 1) + 1  # the first image of the last step before those that are left
    if size == 36:
        stop -= 4 * IN_A_STEP + 12  # and the steps at 44 px, and the held-out images at that size
    with pytest.raises(Interrupted, match=f"stopped in stage curriculum-{size} after {4 - left} of 4"):
        climb(tmp_path / "out", target, pictures=Part("train", 70, stop))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]
    metrics = climb(tmp_path / "out", target, resume=True)
    assert_same_end(tmp_path / "out", metrics, expected, expected_metrics)


def test_a_climb_that_dies_before_it_is_saved_goes_on_to_the_same_end(tmp_path, undisturbed, monkeypatch):
    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # The package offers the function of this name in place of the module.
        patch.setattr(importlib.import_module("gspn2convert.distill"), "save_student", die)
        with pytest.raises(KeyboardInterrupt):
            climb(tmp_path / "out", "teacher")
    metrics = climb(tmp_path / "out", "teacher", resume=True)
    assert_same_end(tmp_path / "out", metrics, *undisturbed("teacher")[:2])


def test_a_stopped_climb_with_cached_images_goes_on_to_the_same_end(tmp_path, monkeypatch):
    whole = climb(tmp_path / "whole", "previous", cached=True)
    real, calls = ImageCache.view, []

    def view(self, *arguments):
        calls.append(self.size)
        if len(calls) == 2 + 2 + 4 + 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageCache, "view", view)
        with pytest.raises(Interrupted, match="stopped in stage curriculum-44 after 3 of 4"):
            climb(tmp_path / "out", "previous", cached=True)
    assert calls == [(28, 28)] * 4 + [(36, 36)] * 4 + [(44, 44)] * 3
    with pytest.raises(UserError, match="started with different place where views are made"):
        climb(tmp_path / "out", "previous", resume=True)
    metrics = climb(tmp_path / "out", "previous", cached=True, resume=True)
    assert_same_end(tmp_path / "out", metrics, tmp_path / "whole", whole)


def test_sizes_that_the_teacher_cannot_take_are_an_error_before_anything_is_read(tmp_path):
    pictures = Part("train", 70)
    for recipe in (RECIPE.replace("[36, 44]", "[36, 42]"), RECIPE + "size: 42\n"):
        with pytest.raises(UserError, match="image size 42x42 is no multiple of the patch 4x4; use 40 or 44"):
            climb(tmp_path / "out", "teacher", pictures=pictures, recipe=recipe)
    assert pictures.reads == 0
    assert not (tmp_path / "out").exists()
    metrics = climb(tmp_path / "out", "teacher", recipe=RECIPE.replace("[36, 44]", "[36, 42]"), stages=(0,))
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit"]


def test_stages_0_to_2_run_at_the_size_of_the_recipe(tmp_path, undisturbed):
    """What was measured after the fit is what a student that sees 36 px is worth."""
    recipe = RECIPE + "size: 36\n"
    metrics = climb(tmp_path / "out", "teacher", recipe=recipe, stages=(0,))
    _, unseen = split_held_out(70, 12, 0)
    images = pixels(unseen, 36)
    student, teacher = gspn2convert.load(tmp_path / "out"), load_teacher("demo")
    with torch.no_grad():
        ours, theirs = student.forward_features(images), teacher.forward_features(images)
    expected = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)[:, 1:].mean().item()
    assert metrics["stages"][0]["patch_cosine"] == pytest.approx(expected, abs=1e-4)
    assert abs(metrics["stages"][0]["patch_cosine"] - undisturbed("teacher")[1]["stages"][0]["patch_cosine"]) > 1e-3


def test_more_regions_than_rows_of_patches_are_told_once(tmp_path, caplog):
    recipe = RECIPE.replace("{proxy_dim: 8}", "{proxy_dim: 8, regions: 9}")
    climb(tmp_path / "out", "teacher", recipe=recipe, stages=(0,))
    told = [record.getMessage() for record in caplog.records if "regions" in record.getMessage()]
    assert told == [
        "mixer.regions is 9, and images have 7 x 7 patches: more regions than rows of patches gain nothing and "
        "cost time; convert the teacher with mixer.regions of 7 or less, or at larger images"
    ]

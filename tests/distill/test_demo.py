"""The bundled teacher on bundled images: what its metrics say is what can be measured again."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import gspn2convert
from gspn2convert.artifact import origin
from gspn2convert.cost import count_parameters
from gspn2convert.data import split_held_out
from gspn2convert.demo_data import FILE as DEMO_IMAGES
from gspn2convert.distill import Options, distill
from gspn2convert.errors import UserError
from gspn2convert.recipe import parse_recipe
from gspn2convert.teachers import load_teacher
from helpers.conversions import FILES, RECIPE, Pictures, compare, create, snapshot, top1

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO_RECIPE = """
name: short
mixer: {proxy_dim: C/4}
fit: {images: 64, held_out: 64, batch_size: 32}
align: {steps: 10, batch_size: 16}
recover: {steps: 40, batch_size: 12, mixer_lr: 2.0e-4, lr: 5.0e-5, ema: 0.9}
augment: {scale: [0.7, 1.0], color_jitter: 0.0}
keep: "0,3,4"
eval_every: 20
held_out: 64
seed: 3
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The bundled teacher, its output folder and the metrics."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = Options(output=folder, device="cpu", quiet=True)
    metrics = distill("demo", parse_recipe(DEMO_RECIPE, "test"), "demo", options)
    return load_teacher("demo"), folder, metrics


@pytest.fixture(scope="module")
def demo_images():
    """The bundled images as the bundled teacher takes them, read without the toolkit."""
    with np.load(DEMO_IMAGES) as arrays:
        sets = {name: torch.tensor(arrays[name]) for name in arrays.files}
    for split in ("train", "test"):
        sets[f"{split}_images"] = (sets[f"{split}_images"].unsqueeze(1) / 255 - 0.286) / 0.353
    return sets


def test_each_stage_brings_the_student_nearer_to_its_teacher(demo):
    _, _, metrics = demo
    stages = metrics["stages"]
    assert [stage["stage"] for stage in stages] == ["fit", "align", "recover"]
    for key in ("cosine", "prefix_cosine", "patch_cosine"):
        assert stages[0][key] < stages[2][key] < 1
    assert stages[2]["cosine"] > stages[1]["cosine"]
    assert all(stage["seconds"] > 0 for stage in stages)


def test_scores_are_those_of_the_saved_model(demo, demo_images):
    teacher, folder, metrics = demo
    student, last = create(folder), metrics["stages"][-1]
    _, unseen = split_held_out(len(demo_images["train_images"]), 64, 3)
    expected = compare(student, teacher, demo_images["train_images"][unseen])
    assert {key: last[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    images, labels = demo_images["test_images"], demo_images["test_labels"].long()
    assert last["top1"] == pytest.approx(top1(student, images, labels), abs=2e-3)
    assert metrics["teacher_top1"] == pytest.approx(top1(teacher, images, labels), abs=2e-3)
    assert metrics["teacher_top1"] > 0.9


def test_metrics_say_what_was_done(demo):
    teacher, folder, metrics = demo
    student = create(folder)
    said = {key: metrics[key] for key in ("teacher", "recipe", "data", "seed", "stages_run", "kept_layers")}
    assert said == {
        "teacher": "demo",
        "recipe": "short",
        "data": "demo",
        "seed": 3,
        "stages_run": [0, 1, 2],
        "kept_layers": [0, 3, 4],
    }
    assert metrics["parameters"] == {"teacher": count_parameters(teacher), "student": count_parameters(student)}
    layers = metrics["layers"]
    assert [layer["layer"] for layer in layers] == [1, 2, 5]
    errors = [layer["errors"][layer["method"]] for layer in layers]
    assert errors == [min(layer["errors"].values()) for layer in layers]
    assert metrics["fit_error"] == pytest.approx(np.mean(errors))
    assert {"device", "torch", "timm", "python", "commit", "date"} <= set(metrics["environment"])


def test_history_records_losses_and_held_out_figures(demo):
    _, _, metrics = demo
    history = metrics["history"]
    assert [(record["stage"], record["step"], "evaluation" in record) for record in history] == [
        ("align", 10, False),
        ("align", 10, True),
        ("recover", 20, True),
        ("recover", 40, False),
        ("recover", 40, True),
    ]
    scores = {stage["stage"]: stage for stage in metrics["stages"]}
    for record in (history[1], history[4]):
        assert record["evaluation"].items() <= scores[record["stage"]].items()
    assert {"loss", "layer.1", "layer.2", "layer.5", "images_per_second"} <= set(history[0])
    assert history[3]["loss"] < history[2]["loss"]


def test_the_folder_is_complete(demo):
    _, folder, metrics = demo
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert parse_recipe((folder / "recipe.yaml").read_text(), "recipe.yaml") == parse_recipe(DEMO_RECIPE, "test")
    config = json.loads((folder / "config.json").read_text())
    told = {"version": gspn2convert.__version__, "teacher": "demo", "teacher_weights": origin(load_teacher("demo"))}
    assert config["gspn2"] == told | {"layers": [1, 2, 5], "depth": 6}
    assert "3 of 6 blocks: 1, 2, 5" in (folder / "README.md").read_text()


def test_a_folder_that_is_not_empty_is_left_alone(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    before = snapshot(out)
    with pytest.raises(UserError, match="out is not empty; name another"):
        run()
    options = Options(output=out, device="cpu", quiet=True)
    with pytest.raises(UserError, match="out is not empty; name another"):
        distill("demo", parse_recipe(RECIPE, "test"), "demo", options)
    # Nor is it taken for a run that could go on.
    with pytest.raises(UserError, match="holds files, but no run to resume"):
        run(resume=True)
    assert snapshot(out) == before


def test_keeping_every_block_leaves_nothing_to_do(run, tmp_path):
    with pytest.raises(UserError, match="every block keeps attention.*keep fewer"):
        run(keep=(0, 1))
    options = Options(output=tmp_path / "out", device="cpu")
    recipe = dataclasses.replace(parse_recipe(RECIPE, "test"), keep="every:1")
    with pytest.raises(UserError, match="keeps all 6 blocks"):
        distill("demo", recipe, "demo", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("empty", "no .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp images"),
        ("nowhere", "no such file or folder"),
        ("one", "at least 2"),
    ],
)
def test_data_that_are_no_good(tmp_path, data, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Pictures(1).images[0].save(tmp_path / "one" / "0.png")
    options = Options(output=tmp_path / "out", device="cpu", quiet=True)
    with pytest.raises(UserError, match=message):
        distill("demo", parse_recipe(RECIPE, "test"), str(tmp_path / data), options)
    assert not (tmp_path / "out").exists()

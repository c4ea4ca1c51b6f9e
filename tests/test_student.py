"""Going on from a converted model: to the same end as in one run, and from nothing else than the teacher's own."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import Attention
from timm.models import save_for_hf
from torch.nn.functional import cosine_similarity

import gspn2convert
from gspn2convert.checkpoint import FILE_NAME
from gspn2convert.curriculum import teacher_size
from gspn2convert.data import split_held_out
from gspn2convert.distill import Options, distill
from gspn2convert.errors import UserError
from gspn2convert.interrupt import Interrupted
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.plan import plan
from gspn2convert.recipe import load_recipe, parse_recipe
from gspn2convert.recover import RecoverStage

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
name: onward
mixer: {proxy_dim: 8}
fit: {images: 16, held_out: 4, batch_size: 8}
align: {steps: 3, batch_size: 4}
recover: {steps: 3, batch_size: 4, ema: 0.5}
curriculum: {sizes: [40, 48], steps: 2, batch_size: 8, ema: 0.5}
eval_every: 2
held_out: 6
"""


@pytest.fixture
def save_teacher(make_teacher, tmp_path):
    """Saves a tiny teacher; its folder."""

    def save(name="teacher", **kind):
        vit = make_teacher(**kind)
        vit.pretrained_cfg |= {"crop_pct": 1.0, "crop_mode": "squash"}
        save_for_hf(vit, tmp_path / name, safe_serialization=True, model_args=vit._model_args)
        return tmp_path / name

    return save


@pytest.fixture
def run(save_teacher, tmp_path):
    """Converts the tiny teacher by name; `run("out", stages=(0,), student=...)`."""
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(30):
        small = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        small.resize((48, 32), Image.Resampling.BICUBIC).save(tmp_path / "data" / f"{number:02}.png")
    own = save_teacher()

    def go(name, *, stages, recipe=RECIPE, teacher=own, resume=False, **what):
        options = Options(output=tmp_path / name, stages=stages, device="cpu", quiet=True, resume=resume)
        return distill(str(teacher), parse_recipe(recipe, "test"), str(tmp_path / "data"), options, **what)

    return go


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def scores(metrics, names):
    stages = {stage["stage"]: {**stage, "seconds": 0} for stage in metrics["stages"]}
    return [stages[name] for name in names]


@pytest.mark.parametrize("keep", [None, "1"])
def test_going_on_ends_where_one_run_does(run, tmp_path, keep):
    whole = run("whole", stages=(0, 1, 2, 3), keep=keep)
    run("fit", stages=(0,), keep=keep)
    recovered = run("recovered", stages=(1, 2), student=tmp_path / "fit")
    climbed = run("climbed", stages=(3,), student=tmp_path / "recovered")
    assert weights(tmp_path / "climbed") == weights(tmp_path / "whole")
    names = ["align", "recover", "curriculum-40", "curriculum-48"]
    assert [*scores(recovered, names[:2]), *scores(climbed, names[2:])] == scores(whole, names)
    # What it starts from stands in the place of the fit.
    assert scores(climbed, ["fit"]) == [{**scores(whole, ["recover"])[0], "stage": "fit"}]
    assert climbed["fit_error"] is None
    assert climbed["stages_run"] == [3]
    kept = [] if keep is None else [1]
    assert (whole["kept_layers"], recovered["kept_layers"], climbed["kept_layers"]) == (kept, kept, kept)
    blocks = gspn2convert.load(tmp_path / "climbed").blocks
    assert [type(block.attn) for block in blocks] == [Gspn2Mixer, Attention if keep else Gspn2Mixer]


def test_of_images_without_labels_the_result_names_no_top1(run, run_cli, tmp_path):
    run("fit", stages=(0,))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    places = {"teacher": "teacher", "data": "data", "recipe": "tiny.yaml", "student": "fit", "output": "on"}
    options = " ".join(f"--{name} {tmp_path}/{place}" for name, place in places.items())
    result = run_cli("distill", *options.split(), "--stages", "1", "--device", "cpu")
    assert "\nwent on from fit\nthe student is in " in result.stdout


def test_the_recipe_cannot_make_it_keep_other_blocks(run, tmp_path):
    run("fit", stages=(0,), keep="1")
    found = run("on", stages=(1,), student=tmp_path / "fit", recipe=RECIPE + 'keep: "0"\n')
    assert found["kept_layers"] == [1]
    assert load_recipe(tmp_path / "on" / "recipe.yaml").keep == "1"
    assert set(found["history"][0]) >= {"layer.0"}
    assert "layer.1" not in found["history"][0]


def test_its_own_mixers_count_in_the_recipe_and_in_the_plan(run, save_teacher, tmp_path, caplog):
    wide, narrow = (RECIPE.replace("proxy_dim: 8", f"proxy_dim: {proxy_dim}") for proxy_dim in (16, 4))
    run("fit", stages=(0,), recipe=wide, keep="1")
    run("on", stages=(1,), recipe=narrow, student=tmp_path / "fit")
    assert load_recipe(tmp_path / "on" / "recipe.yaml").mixer.proxy_dim == 16
    assert "its own mixers, and not those of recipe onward: proxy_dim 16, not 4" in caplog.text
    caplog.clear()
    run("further", stages=(1,), recipe=wide, student=tmp_path / "fit")
    assert "its own mixers" not in caplog.text
    run("wider", stages=(1,), recipe=RECIPE.replace("proxy_dim: 8", "proxy_dim: 99"), student=tmp_path / "fit")
    assert "proxy_dim 16, not 99" in caplog.text  # which the teacher has no room for
    teacher, what = str(save_teacher("again")), parse_recipe(narrow, "test")
    found = plan(teacher, what, student=tmp_path / "fit")
    assert found == plan(teacher, parse_recipe(wide, "test"), stages=(1, 2, 3), keep="1")
    assert found["kept_layers"] == [1]
    with pytest.raises(UserError, match="exclude each other"):
        plan(teacher, what, student=tmp_path / "fit", keep="0")


def test_without_a_stage_it_stays_as_it_is_at_another_size(run, save_teacher, tmp_path):
    square = save_teacher("square", img_size=(48, 48))  # timm resizes the position embeddings of square grids alone
    run("fit", stages=(0,), teacher=square)
    metrics = run("smaller", stages=(), student=tmp_path / "fit", img_size=40, teacher=square)
    given, saved = gspn2convert.load(tmp_path / "fit", img_size=40), gspn2convert.load(tmp_path / "smaller")
    assert tuple(saved.patch_embed.img_size) == (40, 40)
    for name, value in given.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name
    teacher = gspn2convert.load_teacher(str(square), img_size=40)
    _, unseen = split_held_out(30, 6, 0)
    pictures = [Image.open(tmp_path / "data" / f"{index:02}.png").resize((40, 40), 3) for index in unseen]
    cfg = teacher.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        tokens = [vit.forward_features(images)[:, 1:].double() for vit in (saved, teacher)]
    assert metrics["stages"][0]["patch_cosine"] == pytest.approx(
        cosine_similarity(*tokens, dim=-1).mean().item(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "differing"),
    [
        ({"embed_dim": 48}, "blocks.0.ls1|blocks.0.mlp.fc1.bias"),
        ({"depth": 3}, "blocks.2.mlp.fc1.bias"),
        ({"num_classes": 7}, "head.bias"),
        ({"reg_tokens": 2}, "pos_embed"),
        ({"patch_size": 16}, "patch_embed.proj.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_student_of_another_teacher_is_refused(run, save_teacher, tmp_path, kind, differing):
    run("fit", stages=(0,))
    other = save_teacher("other", **kind)
    sentence = rf"fit is no student of this teacher: ({differing}) differs; name the teacher it came from$"
    with pytest.raises(UserError, match=sentence):
        run("on", stages=(1,), student=tmp_path / "fit", teacher=other)
    assert not (tmp_path / "on").exists()


def test_a_student_of_a_teacher_with_other_weights_is_refused(run, save_teacher, tmp_path):
    """After stage 2 a student has no weight of its teacher left, so the folder tells them; names may differ."""
    run("recovered", stages=(0, 2))
    other = save_teacher("other", seed=1)
    sentence = "recovered is no student of this teacher: it came from teacher, which had other weights; name that one$"
    with pytest.raises(UserError, match=sentence):
        run("on", stages=(1,), student=tmp_path / "recovered", teacher=other)
    assert not (tmp_path / "on").exists()
    shutil.rmtree(other)
    (tmp_path / "teacher").rename(other)
    run("on", stages=(1,), student=tmp_path / "recovered", teacher=other)
    run("further", stages=(1,), student=tmp_path / "on", teacher=other)


def test_a_student_that_does_not_tell_its_teacher_is_warned_of(run, tmp_path, caplog):
    run("fit", stages=(0,))
    run("whole", stages=(1,), student=tmp_path / "fit")
    assert "weights of its teacher" not in caplog.text
    config = json.loads((tmp_path / "fit" / "config.json").read_text())
    assert len(config["gspn2"].pop("teacher_weights")) == 64
    (tmp_path / "fit" / "config.json").write_text(json.dumps(config))
    run("on", stages=(1,), student=tmp_path / "fit")
    assert "fit does not tell the weights of its teacher (teacher): make sure that they are these" in caplog.text
    assert weights(tmp_path / "on") == weights(tmp_path / "whole")


def test_what_is_no_student_is_refused(run, run_cli, tmp_path):
    run("fit", stages=(0,))
    sentence = "--keep and --student exclude each other: the student's own blocks keep their attention"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        run("on", stages=(1,), student=tmp_path / "fit", keep="0")
    with pytest.raises(UserError, match="teacher holds a vit_tiny_patch16_224, which is not converted"):
        run("on", stages=(1,), student=tmp_path / "teacher")
    with pytest.raises(UserError, match="data has no config.json"):
        run("on", stages=(1,), student=tmp_path / "data")
    arguments = ("--teacher", tmp_path / "teacher", "--student", tmp_path / "fit", "--data", tmp_path / "data")
    found = run_cli("distill", *arguments, "--output", tmp_path / "on", "--keep", "0", "--device", "cpu")
    assert (found.exit_code, found.stderr.strip()) == (2, f"error: {sentence}")
    assert not (tmp_path / "on").exists()


def test_a_stopped_run_goes_on_with_the_student_that_it_was_given_alone(run, tmp_path, monkeypatch):
    run("fit", stages=(0,))
    run("other", stages=(0,), recipe=RECIPE.replace("rounds: 2", "rounds: 1").replace("images: 16", "images: 12"))
    run("whole", stages=(2,), student=tmp_path / "fit")
    stop_at_second_step(monkeypatch)
    with pytest.raises(Interrupted, match="stopped in stage recover after 2 of 3"):
        run("on", stages=(2,), student=tmp_path / "fit")
    monkeypatch.undo()
    before = (tmp_path / "on" / FILE_NAME).read_bytes()
    for given in (tmp_path / "other", None):
        with pytest.raises(UserError, match="started with different student; resume with what it was started with"):
            run("on", stages=(2,), student=given, resume=True)
    assert (tmp_path / "on" / FILE_NAME).read_bytes() == before
    run("on", stages=(2,), student=tmp_path / "fit", resume=True)
    assert weights(tmp_path / "on") == weights(tmp_path / "whole")


def stop_at_second_step(monkeypatch):
    """Let SIGTERM come while the second step of recovery is computed."""
    real, steps = RecoverStage.forward, []

    def forward(self, *arguments):
        steps.append(arguments)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(RecoverStage, "forward", forward)


@pytest.mark.parametrize(
    ("recipe", "img_size", "stages", "size"),
    [("hires", None, (0, 1, 2, 3), None), ("hires", None, (0, 1, 2), 224), ("hires", 518, (0, 3), 518)]
    + [("dinov2_small_photos", None, (0, 1, 2, 3), 224), ("default", 336, (0,), 336)],
)
def test_size_of_the_teacher(recipe, img_size, stages, size):
    assert teacher_size(load_recipe(recipe), img_size, stages) == size


def test_two_sizes_that_differ():
    with pytest.raises(UserError, match="recipe has size 224, and --img-size is 336; leave one of them out"):
        teacher_size(load_recipe("dinov2_small_photos"), 336, (0, 1, 2, 3))


@pytest.mark.parametrize("stages", [(0,), (3,), (0, 3)])
def test_stages_that_have_nothing_to_do_are_refused(run, tmp_path, stages):
    run("fit", stages=(0,))
    sentence = "have nothing to do: stage 0 needs no student to go on from, 1 and 2 need steps, 3 needs sizes"
    without = RECIPE.replace("sizes: [40, 48]", "sizes: []")
    assert without != RECIPE
    with pytest.raises(UserError, match=sentence):
        run("on", stages=stages, student=tmp_path / "fit", recipe=without)
    with pytest.raises(UserError, match=sentence):
        run("alone", stages=(3,), recipe=without)
    assert not (tmp_path / "on").exists()
    assert not (tmp_path / "alone").exists()


def test_mixers_that_start_at_random_are_told_of(run, caplog):
    run("random", stages=(1,))
    assert "the mixers start at random" in caplog.text


def test_an_output_below_a_file_is_refused_at_once(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out cannot be made: .*file is no folder that can be written to$"):
        run("file/out", stages=(0,))


def test_a_student_that_goes_on_at_another_size_is_told(run, tmp_path, caplog):
    run("fit", stages=(0,))
    run("climbed", stages=(3,), student=tmp_path / "fit")
    assert "goes on at" not in caplog.text
    run("on", stages=(1,), student=tmp_path / "climbed")
    assert "climbed is of images of 48x48 px and goes on at 32x48; --img-size keeps another size" in caplog.text

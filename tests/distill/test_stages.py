"""The stages of a conversion: what they take over, what they move, and what is saved of them."""

import pytest
import torch
from timm.layers import Attention
from torch.nn.functional import cosine_similarity

from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.conversion import Conversion
from gspn2convert.convert import convert, own_parameters
from gspn2convert.data import split_held_out
from gspn2convert.distill import Options
from gspn2convert.images import ImageSet
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.progress import Progress
from gspn2convert.recipe import parse_recipe
from gspn2convert.train import make_accelerator
from helpers.conversions import RECIPE, Pictures, create, same_bits, top1

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_saved_is_what_was_trained(teacher, tmp_path, run):
    """The stages once in memory and once into a folder."""
    metrics = run()
    recipe, out = parse_recipe(RECIPE, "test"), tmp_path / "in memory"
    with Progress(quiet=True) as progress:
        conversion = Conversion(
            teacher,
            recipe,
            ImageSet("pictures", Pictures()),
            ImageSet("test", Pictures(20, seed=1)),
            Options(output=out, device="cpu"),
            make_accelerator("cpu"),
            CheckpointStore(out, {}),
            progress,
        )
        student = conversion.stages(())
    test = Pictures(20, seed=1)
    images = test.pixels(range(20), teacher)
    saved = create(tmp_path / "out")
    assert same_bits(saved.state_dict(), student.state_dict())
    with torch.no_grad():
        assert torch.equal(saved(images), student(images))
    assert metrics["stages"][-1]["top1"] == top1(student, images, torch.arange(20) * 5 // 20)
    card, last = (tmp_path / "out" / "README.md").read_text(), metrics["stages"][-1]
    assert f"| student_top1 | {last['top1']:.4g} |\n| student_agreement | {last['agreement']:.4g} |\n" in card


def test_the_fit_is_convert_on_images_from_all_over_the_set(teacher, tmp_path, run):
    pictures = Pictures()
    metrics = run(stages=(0,), pictures=pictures)
    # 70 pictures: 12 held out and 32 of the other 58 for the fit; read again are 8 of those held out.
    train, unseen = split_held_out(70, 12, 0)
    read = pictures.read_in_order
    assert read[:12] == unseen
    calibration, judged = read[12:44], read[44:]
    assert len(set(calibration)) == 32
    assert set(calibration) <= set(train)
    assert len(set(judged)) == 8
    assert set(judged) <= set(unseen)
    # The set is in the order of its classes: none may be left out.
    for chosen, of in ((calibration, train), (judged, unseen)):
        for rank, index in enumerate(chosen):
            assert abs(rank / len(chosen) - of.index(index) / len(of)) < 1 / len(chosen)
    student, reports = convert(
        teacher,
        parse_recipe(RECIPE, "test"),
        pictures.pixels(calibration, teacher).split(8),
        pictures.pixels(judged, teacher).split(8),
    )
    saved = create(tmp_path / "out")
    assert [layer["method"] for layer in metrics["layers"]] == [report.method for report in reports]
    for layer, report in zip(metrics["layers"], reports, strict=True):
        assert layer["errors"] == pytest.approx(report.errors, rel=1e-4)
    with torch.no_grad():
        images = pictures.pixels(unseen, teacher)
        assert float((saved(images) - student(images)).abs().max()) < 1e-4
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit"]
    assert metrics["history"] == []


def test_fit_and_align_leave_what_is_inherited_untouched(teacher, tmp_path, run):
    run(stages=(0, 1), keep=(0,))
    ours, theirs = create(tmp_path / "out"), teacher.state_dict()
    assert [type(block.attn) for block in ours.blocks] == [Attention, Gspn2Mixer]
    state = ours.state_dict()
    for name, value in theirs.items():
        assert torch.equal(state[name.replace("blocks.1.attn.", "blocks.1.attn.prefix.")], value), name


def test_align_starts_from_the_fit(tmp_path, run):
    fit = run(stages=(0,), output=tmp_path / "fit")
    aligned = run(stages=(0, 1), output=tmp_path / "aligned")
    assert aligned["layers"] == fit["layers"]
    assert {**aligned["stages"][0], "seconds": 0} == {**fit["stages"][0], "seconds": 0}
    before, after = (
        torch.cat([value.flatten() for value in own_parameters(create(tmp_path / name).blocks[0].attn).values()])
        for name in ("fit", "aligned")
    )
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_without_the_fit_mixers_start_at_random(tmp_path, run):
    metrics = run(stages=(1, 2))
    assert metrics["stages_run"] == [1, 2]
    assert [(layer["method"], list(layer["errors"])) for layer in metrics["layers"]] == [("random", ["random"])] * 2
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit", "align", "recover"]
    fitted = run(output=tmp_path / "fitted")
    assert metrics["fit_error"] > 2 * fitted["fit_error"]
    assert metrics["stages"][-1]["cosine"] < fitted["stages"][-1]["cosine"]


def test_a_stage_without_steps_is_left_out(run):
    metrics = run(RECIPE.replace("align: {steps: 6", "align: {steps: 0"))
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit", "recover"]


def test_a_second_stage_that_undoes_the_first_is_told_of(run, tmp_path, caplog):
    run(output=tmp_path / "mild")
    assert "stage 2 ended" not in caplog.text
    metrics = run(RECIPE.replace("ema: 0.5", "ema: 0.5, lr: 1.0, mixer_lr: 1.0"), output=tmp_path / "wild")
    before, _, after = (one["cosine"] for one in metrics["stages"])
    assert (
        f"stage 2 ended at a mean cosine of {after:.4f}, below the {before:.4f} before training: lower" in caplog.text
    )


@pytest.mark.parametrize("stages", [(0, 1), (0, 1, 2)], ids=str)
def test_a_first_stage_that_undoes_the_fit_is_told_of(run, caplog, stages):
    """Also where the second one mends some of it."""
    metrics = run(RECIPE.replace("align: {steps: 6", "align: {lr: 1.0, steps: 6"), stages=stages)
    before, after = (one["cosine"] for one in metrics["stages"][:2])
    told = f"stage 1 ended at a mean cosine of {after:.4f}, below the {before:.4f} before training: lower align.lr and"
    assert caplog.text.count(told) == 1
    assert "stage 2 ended" not in caplog.text


@pytest.mark.parametrize(
    "kind",
    [
        {"class_token": False, "global_pool": "avg", "num_classes": 0},
        {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True},
        {"architecture": "deit_tiny_distilled_patch16_224"},
    ],
    ids=["no prefix, no head", "registers, LayerScale, qk-norm", "distilled"],
)
def test_other_kinds_of_teacher_go_the_whole_way(make_teacher, tmp_path, run, kind):
    vit, pictures = make_teacher(**kind), Pictures()
    vit.pretrained_cfg |= {"crop_pct": 1.0}
    stages = run(vit=vit, pictures=pictures)["stages"]
    assert stages[2]["patch_cosine"] > 0.99
    assert ("prefix_cosine" in stages[2]) == (vit.num_prefix_tokens > 0)
    assert ("agreement" in stages[2]) == (stages[2]["top1"] is not None) == (vit.num_classes > 0)
    _, unseen = split_held_out(70, 12, 0)
    images, first = pictures.pixels(unseen, vit), vit.num_prefix_tokens
    with torch.no_grad():
        ours, theirs = (model.forward_features(images)[:, first:] for model in (create(tmp_path / "out"), vit))
    assert stages[2]["patch_cosine"] == pytest.approx(cosine_similarity(ours, theirs, dim=-1).mean().item(), abs=1e-5)

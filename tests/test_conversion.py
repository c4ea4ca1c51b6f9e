"""What a conversion measures and what it writes down."""

import pytest
import torch
from safetensors.torch import load_file

import gspn2convert
from gspn2convert.artifact import public_name
from gspn2convert.convert import convert
from gspn2convert.data import batches
from gspn2convert.distill import Options, distill_student
from gspn2convert.errors import UserError
from gspn2convert.export import export_safetensors
from gspn2convert.images import ImageSet
from gspn2convert.recipe import parse_recipe
from gspn2convert.teachers import load_teacher
from gspn2convert.vit import attention_sites, data_config
from helpers.demo_part import Part

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
name: one
mixer: {proxy_dim: 8}
fit: {images: 16, held_out: 8, batch_size: 8}
align: {steps: 0, batch_size: 1}
recover: {steps: 0, batch_size: 1}
held_out: 12
"""


def distilled(output, recipe, **options):
    sets = (ImageSet(name, Part(name, count), in_chans=1) for name, count in (("train", 70), ("test", 100)))
    how = Options(output=output, device="cpu", quiet=True, **options)
    return distill_student(load_teacher("demo"), parse_recipe(recipe, "r"), *sets, how, teacher_name="demo")


def top1(model, size):
    images, config = ImageSet("test", Part("test", 100), in_chans=1), data_config(model) | {"input_size": (1, *size)}
    ((pixels, labels),) = batches(images, config, indices=range(100), batch_size=100, augment=None, seed=0)
    with torch.inference_mode():
        return (model(pixels).argmax(1) == labels).double().mean().item()


def test_top1_is_measured_at_the_size_of_the_stage_as_cosines_are(tmp_path):
    """Of a stage before a climb, too, whose student has the size of its teacher then."""
    climb = RECIPE + "size: 56\ncurriculum: {sizes: [60], steps: 1, batch_size: 4, ema: 0.5}\n"
    metrics = distilled(tmp_path / "climb", climb, stages=(0, 3))
    distilled(tmp_path / "fit", climb, stages=(0,))
    student = gspn2convert.load(tmp_path / "fit")
    at_56, at_28 = (top1(student, (side, side)) for side in (56, 28))
    assert metrics["stages"][0]["top1"] == pytest.approx(at_56)
    assert at_56 != at_28


@pytest.mark.parametrize("seed", range(6))
def test_a_constant_output_of_attention_is_fitted_by_what_has_no_error(make_teacher, seed):
    """Its variance is 0 but for rounding, by which no error may be divided."""
    torch.manual_seed(seed)
    teacher = make_teacher()
    with torch.no_grad():
        for site in attention_sites(teacher):
            site.proj.weight.zero_()
            site.proj.bias.normal_()
    images, held_out = torch.randn(2, 1, 8, 3, *teacher.patch_embed.img_size)
    _, reports = convert(teacher, parse_recipe(RECIPE, "r"), list(images), list(held_out))
    for report in reports:
        assert min(report.errors.values()) >= 0
        assert report.errors[report.method] == 0


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("vit_base", "vit_base"),
        ("/home/me/teacher", "teacher"),
        ("local-dir:/home/me/teacher", "teacher"),
        ("wds/photos:/home/me/private", "wds/photos:private"),
        ("torch/fashion_mnist:data", "torch/fashion_mnist:data"),
        ("hf-hub:owner/name", "hf-hub:owner/name"),
        ("wds/photos:https://host/{000..099}.tar", "wds/photos:https://host/{000..099}.tar"),
    ],
)
def test_names_tell_nothing_of_the_machine(name, public):
    assert public_name(name) == public


def test_weights_that_do_not_fit_into_fp16_are_not_written(tmp_path, tiny_teacher):
    with torch.no_grad():
        tiny_teacher.head.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="head.weight has a number that does not fit into fp16; use --dtype fp32"):
        export_safetensors(tiny_teacher, tmp_path / "half.safetensors", dtype="fp16")
    assert not any(tmp_path.iterdir())
    export_safetensors(tiny_teacher, tmp_path / "whole.safetensors", dtype="fp32")
    assert load_file(tmp_path / "whole.safetensors")["head.weight"][0, 0] == 1e5

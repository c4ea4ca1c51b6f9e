"""Stage 0 as a whole: the student that it gives, measured against the teacher's own attention on the same tokens."""

import copy
import dataclasses
import weakref

import pytest
import torch
from timm.data import resolve_model_data_config
from timm.layers import Attention
from torch.nn.functional import interpolate

from gspn2convert.convert import convert, own_parameters
from gspn2convert.data import batches, open_images
from gspn2convert.errors import UserError
from gspn2convert.fit import fit_random
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import build_student
from gspn2convert.recipe import Align, Fit, Mixer, Recipe, Recover
from gspn2convert.teachers import load_teacher
from helpers.conversions import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "class token": {},
    "class and register tokens, LayerScale": {"reg_tokens": 4, "init_values": 0.5},
    "no prefix token": {"class_token": False, "global_pool": "avg"},
    "qk-norm, LayerScale": {"qk_norm": True, "init_values": 0.1},
    "no bias": {"qkv_bias": False},
    "no head": {"num_classes": 0},
    "distilled": {"architecture": "deit_tiny_distilled_patch16_224"},
}
PAPER = Mixer(proxy_dim=2, lpu=False, global_branch=False, prefix_gate=False)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def recipe(*, mixer=None, seed=0, **fit):
    nothing = {"steps": 0, "batch_size": 1}
    return Recipe(
        name="test",
        mixer=mixer or Mixer(proxy_dim=8),
        fit=Fit(**fit),
        align=Align(**nothing),
        recover=Recover(**nothing),
        seed=seed,
    )


def pictures(count, seed, size=(32, 48), batch_size=8):
    """Batches of soft noise, each picture with a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    blots = torch.randn(count, 3, size[0] // 8, size[1] // 8, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return (interpolate(blots, size=size, mode="bicubic") + colour / 2).split(batch_size)


def fitted(teacher, what=None, *, keep=(), **changes):
    return convert(teacher, what or recipe(**changes), pictures(40, 1), pictures(20, 2), keep)


def attention_pairs(teacher, images):
    """What each attention layer of the teacher sees and gives, on all the images at once."""
    pairs = []
    hooks = [
        block.attn.register_forward_hook(lambda _, given, result: pairs.append((given[0], result)))
        for block in teacher.blocks
    ]
    with torch.no_grad():
        teacher.forward_features(torch.cat(images))
    for hook in hooks:
        hook.remove()
    return pairs


@torch.no_grad()
def relative_error(block, mixer, x, y, grid):
    """Squared error over variance of the patches, behind the block's LayerScale."""
    first = x.shape[1] - grid[0] * grid[1]
    gamma = getattr(block.ls1, "gamma", torch.ones(x.shape[-1])).double()
    target = y[:, first:].double() * gamma
    error = mixer(x, grid)[:, first:].double() * gamma - target
    return float(error.square().sum() / (target - target.mean((0, 1))).square().sum())


def assert_reports_hold(teacher, student, reports, images, grid):
    """The reported errors are those of the student's mixers on the teacher's tokens."""
    pairs = attention_pairs(teacher, images)
    for report in reports:
        block, mixer = teacher.blocks[report.layer], student.blocks[report.layer].attn
        assert isinstance(mixer, Gspn2Mixer)
        error = relative_error(block, mixer, *pairs[report.layer], grid)
        assert error == pytest.approx(report.error, rel=1e-4)
        assert report.error == report.errors[report.method] == min(report.errors.values())


@every_kind
def test_reported_error_is_that_of_the_student_on_the_teachers_tokens(make_teacher, kind):
    teacher = make_teacher(**kind)
    student, reports = fitted(teacher)
    assert [report.layer for report in reports] == [0, 1]
    assert_reports_hold(teacher, student, reports, pictures(20, 2), (4, 6))
    for report in reports:
        assert report.method == "closed_form"
        assert report.error < report.errors["svd"] / 2 < report.errors["random"] / 4


def test_another_size_than_the_teachers_own(tiny_teacher):
    calibration, held_out = pictures(40, 1, (40, 24)), pictures(20, 2, (40, 24))
    student, reports = convert(tiny_teacher, recipe(), calibration, held_out)
    assert_reports_hold(tiny_teacher, student, reports, held_out, (5, 3))
    assert all(report.error < report.errors["svd"] / 2 for report in reports)


def test_the_mixer_of_the_paper(make_teacher):
    teacher = make_teacher(reg_tokens=1)
    student, reports = fitted(teacher, mixer=PAPER)
    mixer = student.blocks[0].attn
    assert mixer.lpu is None
    assert mixer.shared is None
    assert mixer.prefix.log_sum is None
    assert mixer.proxy_dim == 2
    assert_reports_hold(teacher, student, reports, pictures(20, 2), (4, 6))
    assert all(report.error < report.errors["svd"] < report.errors["random"] for report in reports)


@pytest.mark.parametrize("options", [{"segment": 2}, {"groups": 2}, {"prefix": "pool"}, {"regions": 2}], ids=str)
def test_other_mixers(tiny_teacher, options):
    student, reports = fitted(tiny_teacher, mixer=Mixer(proxy_dim=8, **options))
    assert_reports_hold(tiny_teacher, student, reports, pictures(20, 2), (4, 6))
    assert all(report.error < report.errors["svd"] for report in reports)


def test_real_images_and_a_trained_teacher():
    teacher = load_teacher("demo")
    images = open_images("demo", "train", in_chans=1)
    config = resolve_model_data_config(teacher)

    def read(indices):
        pairs = batches(images, config, indices=indices, batch_size=32, augment=None, seed=0)
        return [pixels for pixels, _ in pairs]

    what = recipe(mixer=Mixer(proxy_dim="C/4"))
    held_out = read(range(3, 1000, 20))
    student, reports = convert(teacher, what, read(range(0, 1024, 8)), held_out)
    assert_reports_hold(teacher, student, reports, held_out, (7, 7))
    closed_form, svd = (sum(report.errors[name] for report in reports) / 6 for name in ("closed_form", "svd"))
    assert closed_form < 0.35
    assert closed_form < svd / 2


@pytest.mark.parametrize("name", ["class token", "class and register tokens, LayerScale", "qk-norm, LayerScale"])
def test_prefix_tokens_read_what_the_teachers_read(make_teacher, name):
    teacher = make_teacher(**KINDS[name])
    student, _ = fitted(teacher)
    prefix = teacher.num_prefix_tokens
    for block, (x, y) in zip(student.blocks, attention_pairs(teacher, pictures(20, 2)), strict=True):
        with torch.no_grad():
            ours = block.attn(x, (4, 6))[:, :prefix]
        assert float((ours - y[:, :prefix]).abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["closed_form", "random"])
def test_a_seed_gives_equal_bits_and_another_seed_others(tiny_teacher, method):
    (first, first_reports), (again, again_reports) = (fitted(tiny_teacher, method=method) for _ in range(2))
    assert same_bits(first.state_dict(), again.state_dict())
    assert first_reports == again_reports
    _, others = fitted(tiny_teacher, method=method, seed=1)
    for report, other in zip(first_reports, others, strict=True):
        assert report.errors["random"] != other.errors["random"]
        assert report.errors.get("closed_form") == other.errors.get("closed_form")


def test_blocks_that_are_kept_and_weights_that_are_inherited(make_teacher):
    teacher = make_teacher(depth=3, init_values=0.5)
    student, reports = fitted(teacher, keep=(0, 2))
    assert [report.layer for report in reports] == [1]
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, value in theirs.items():
        home = name.replace("blocks.1.attn.", "blocks.1.attn.prefix.")
        assert torch.equal(ours[home], value), name
    assert [type(block.attn) for block in student.blocks] == [Attention, Gspn2Mixer, Attention]
    images = torch.cat(pictures(4, 3))
    with torch.no_grad():
        (first, second, _), (expected, differing, _) = (
            vit.forward_intermediates(images, intermediates_only=True) for vit in (student, teacher)
        )
    assert torch.equal(first, expected)
    assert not torch.equal(second, differing)
    # The layer is fitted to the teacher's own tokens, whatever the blocks before it have become.
    _, alone = fitted(teacher)
    assert reports == alone[1:2]


def test_one_image_cannot_carry_a_fit_without_ridge_so_the_svd_is_taken(tiny_teacher):
    one, held_out = pictures(1, 1), pictures(20, 2)
    student, reports = convert(tiny_teacher, recipe(ridge=0.0), one, held_out)
    assert [report.method for report in reports] == ["svd", "svd"]
    assert all(report.errors["closed_form"] > 2 * report.error for report in reports)
    assert_reports_hold(tiny_teacher, student, reports, held_out, (4, 6))
    by_recipe, its_reports = convert(tiny_teacher, recipe(method="svd"), one, held_out)
    assert same_bits(student.state_dict(), by_recipe.state_dict())
    assert [set(report.errors) for report in its_reports] == [{"svd", "random"}] * 2


def test_random_is_drawn_from_the_seed_and_the_layer(make_teacher):
    teacher, what = make_teacher(class_token=False, global_pool="avg"), recipe(method="random", seed=7)
    student, reports = fitted(teacher, what)
    fresh = build_student(teacher, [0, 1], what.mixer.resolve(32))
    for index, block in enumerate(fresh.blocks):
        fit_random(block.attn, torch.Generator().manual_seed(7 + index))
        assert same_bits(own_parameters(student.blocks[index].attn), own_parameters(block.attn))
    assert [set(report.errors) for report in reports] == [{"random"}] * 2
    assert_reports_hold(teacher, student, reports, pictures(20, 2), (4, 6))


def test_a_fitted_student_is_nearer_to_its_teacher_than_an_svd_and_than_a_random_one(tiny_teacher):
    images = torch.cat(pictures(20, 2))
    distance = {}
    for method in ("closed_form", "svd", "random"):
        student, _ = fitted(tiny_teacher, method=method)
        with torch.no_grad():
            distance[method] = float((student(images) - tiny_teacher(images)).square().mean())
    assert distance["closed_form"] < distance["svd"] / 2 < distance["random"] / 4


def test_more_rounds_and_less_ridge_fit_the_calibration_images_better(tiny_teacher):
    images = pictures(40, 1)

    def error(**fit):
        _, reports = convert(tiny_teacher, recipe(**fit), images, images)
        return sum(report.errors["closed_form"] for report in reports)

    assert error(ridge=1e-4, rounds=4) < error(ridge=1e-4, rounds=1) < error(ridge=0.05, rounds=1)


def test_the_teacher_stays_as_it_was(tiny_teacher):
    before = copy.deepcopy(tiny_teacher)
    student, _ = fitted(tiny_teacher)
    assert same_bits(tiny_teacher.state_dict(), before.state_dict())
    assert not tiny_teacher.training
    assert all(parameter.requires_grad for parameter in [*tiny_teacher.parameters(), *student.parameters()])
    theirs = {parameter.data_ptr() for parameter in tiny_teacher.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in student.parameters()}
    images = torch.cat(pictures(2, 3))
    assert torch.equal(tiny_teacher(images), before(images))


def test_tokens_are_held_once(make_teacher):
    teacher, seen, alive = make_teacher(), [], []

    def count(_, given, result):
        seen.extend(weakref.ref(tokens) for tokens in (*given, result))
        alive.append(len({id(each()) for each in seen} - {id(None)}))

    for block in teacher.blocks:
        block.register_forward_hook(count)
    convert(teacher, recipe(), pictures(20, 1, batch_size=1), pictures(2, 2))
    # Those of 20 batches, of the held-out one, and of the batch that a block works on.
    assert max(alive) <= 20 + 1 + 1


def test_layers_are_told_as_they_are_done(make_teacher):
    told = []
    teacher = make_teacher(depth=3)
    _, reports = convert(
        teacher, recipe(), pictures(8, 1), pictures(8, 2), (1,), on_layer=lambda *each: told.append(each)
    )
    assert told == [(reports[0], 1), (reports[1], 2)]
    assert [report.layer for report in reports] == [0, 2]


@pytest.mark.parametrize(("images", "held_out"), [([], pictures(8, 2)), (pictures(8, 1), [])])
def test_without_images_there_is_nothing_to_fit(tiny_teacher, images, held_out):
    with pytest.raises(UserError, match="no images for the fit.*give at least ten"):
        convert(tiny_teacher, recipe(), images, held_out)


def test_images_of_a_wrong_size_are_refused(tiny_teacher):
    with pytest.raises(UserError, match="33x48 is no multiple of the patch"):
        convert(tiny_teacher, recipe(), [torch.zeros(1, 3, 33, 48)], pictures(8, 2))


def test_a_student_cannot_be_converted_again(tiny_teacher):
    student, _ = fitted(tiny_teacher)
    with pytest.raises(UserError, match="converted GSPN-2 ViT already"):
        fitted(student)


def test_a_proxy_wider_than_the_teacher_is_refused(tiny_teacher):
    with pytest.raises(UserError, match=r"recipe\.mixer\.proxy_dim.*expected 1 to 32"):
        fitted(tiny_teacher, dataclasses.replace(recipe(), mixer=Mixer(proxy_dim=64)))

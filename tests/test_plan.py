"""The plan of a conversion against counting by hand, and that making it touches neither disk nor network."""

import socket
from dataclasses import replace

import pytest
import torch

from gspn2convert.block import GspnBlock
from gspn2convert.cost import cost, training_bytes
from gspn2convert.errors import UserError
from gspn2convert.model import build_student
from gspn2convert.optim import Ema, make_optimizer
from gspn2convert.plan import _copies, plan
from gspn2convert.recipe import load_recipe
from gspn2convert.recover import RecoverStage
from gspn2convert.stage import AlignStage
from gspn2convert.teachers import load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

# ViT-Ti/16 at 224 px by the default recipe: R = C/8.
C, R, HEADS, DEPTH, MLP, CLASSES, PATCHES = 192, 24, 3, 12, 768, 1000, 196
TOKENS = PATCHES + 1


@pytest.fixture(autouse=True)
def nothing_to_reach(monkeypatch, tmp_path):
    """No network, an empty cache, and an empty folder to work in, which stays empty."""

    def refuse(*arguments):
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def default():
    return load_recipe("default")


def test_figures_are_those_counted_by_hand(default):
    found = plan("vit_tiny", default)
    attention = 4 * C * C + 4 * C
    rest = 2 * C * MLP + MLP + C + 2 * 2 * C
    outside = 16 * 16 * 3 * C + C + C + TOKENS * C + 2 * C + C * CLASSES + CLASSES
    own = C * R + (R + 1) * (8 * R + 12) + 9 * C + 2 * C * C + 4 * R * C + C + (C + 1) * HEADS
    teacher = DEPTH * (attention + rest) + outside
    assert found["parameters"] == {"teacher": teacher, "student": teacher + DEPTH * own}
    assert found["parameters"]["teacher"] == 5_717_416  # timm's own figure for this model

    mixing = TOKENS * 4 * C * C + 2 * TOKENS * TOKENS * C
    others = DEPTH * TOKENS * 2 * C * MLP + PATCHES * 16 * 16 * 3 * C + C * CLASSES
    assert found["macs"]["teacher"] == DEPTH * mixing + others
    assert found["macs"]["student"] < found["macs"]["teacher"]

    stages = [(stage["stage"], stage["steps"], stage["images"]) for stage in found["stages"]]
    assert stages == [("align", 2500, 2500 * 128), ("recover", 20000, 20000 * 256)]
    assert found["fit_images"] == 2048
    hidden = (2048 + 256) * TOKENS * C * 4
    moments = (4 * C + 2 * C + 1) ** 2 * 8
    assert found["fit_bytes"] == hidden + 3 * moments


def test_figures_are_those_of_the_models_that_a_conversion_builds(default):
    found = plan("vit_tiny", default, keep="last:2", img_size=96)
    teacher = load_teacher("vit_tiny", img_size=96, pretrained=False)
    student = build_student(teacher, range(10), default.mixer.resolve(C))
    before, after = (cost(vit, 96, 96) for vit in (teacher, student))
    assert found["parameters"] == {"teacher": before.parameters, "student": after.parameters}
    assert found["macs"] == {"teacher": before.macs, "student": after.macs}
    assert found["image_size"] == [96, 96]
    assert (found["converted_layers"], found["kept_layers"]) == (list(range(10)), [10, 11])
    per_image = training_bytes(student, 96, 96)
    assert [stage["batch_bytes"] for stage in found["stages"]] == [128 * per_image, 256 * per_image]
    copies = [stage["bytes"] - stage["batch_bytes"] for stage in found["stages"]]
    assert copies == [state_of_align(student), state_of_recover(student, gradients=2)]
    sharded = plan("vit_tiny", default, keep="last:2", img_size=96, shard=True)["stages"]
    assert sharded[0] == found["stages"][0]
    assert sharded[1]["bytes"] == 256 * per_image + state_of_recover(student, gradients=1)


def state_of_align(student):
    """What is trained, less the weights: their gradients and AdamW's moments."""
    AlignStage(student, student)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    student.requires_grad_(True)
    return 4 * 3 * trained


def state_of_recover(student, gradients):
    """Gradients, moments and the average of the student; an adapter for each mixer with gradient and moments.

    There are two moments, but one of a matrix.
    """
    adapters = sum(isinstance(block, GspnBlock) for block in student.blocks)
    matrices = sum(p.numel() for p in student.parameters() if p.ndim == 2)
    copies = (gradients + 3) * sum(p.numel() for p in student.parameters()) - matrices
    return 4 * (copies + adapters * (3 * C * C + 4 * C))


@pytest.mark.parametrize("stage", ["align", "recover"])
def test_copies_are_those_that_training_holds(default, make_teacher, stage):
    """All that a stage keeps beyond its models after a step, without CUDA graphs as under FSDP."""
    teacher = make_teacher()
    student = build_student(teacher, (1,), {"proxy_dim": 4})
    spec, held = getattr(default, stage), []
    if stage == "align":
        objective = AlignStage(student, teacher)
    else:
        objective = RecoverStage(student, teacher, spec.losses, torch.ones(2, 32))
        held += [*Ema(student, 0.9).average.values(), *objective.adapters.parameters()]
    parameters = [p for group in objective.groups(spec) for p in group["params"]]
    optimizer = make_optimizer(spec.optimizer, objective.groups(spec), fused=False)
    objective(torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)), 0.0)["loss"].backward()
    optimizer.step()
    held += [p.grad for p in parameters]
    held += [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert _copies(spec, student, shard=True) == sum(one.numel() for one in held)


@pytest.mark.parametrize(("target", "gradients"), [("reduced", 1), ("previous", 2)])
def test_copies_without_a_mixer_term(target, gradients):
    """There is one graph and no adapter; the weights of a guide count as much as a second set of gradients would."""
    hires = load_recipe("hires")
    hires = replace(hires, curriculum=replace(hires.curriculum, target=target, sizes=(96,)))
    (stage,) = plan("vit_tiny", hires, stages=(3,))["stages"]
    student = build_student(load_teacher("vit_tiny", pretrained=False), range(DEPTH), hires.mixer.resolve(C))
    expected = state_of_recover(student, gradients) - 4 * DEPTH * (3 * C * C + 4 * C)
    assert stage["bytes"] - stage["batch_bytes"] == expected


def test_the_fit_of_a_vit_b_needs_less_than_4_gb(default):
    assert plan("vit_base", default, stages=(0,))["fit_bytes"] < 4e9


def test_each_size_of_the_curriculum_is_planned_at_that_size():
    hires = load_recipe("hires")
    curriculum = replace(hires.curriculum, sizes=(128, 160), steps=600, batch_size=96)
    hires = replace(hires, size=96, curriculum=curriculum)
    found = plan("vit_tiny", hires)
    student = build_student(load_teacher("vit_tiny", pretrained=False), range(DEPTH), hires.mixer.resolve(C))
    after = cost(student, 96, 96)
    assert found["image_size"] == [96, 96]
    assert found["macs"]["student"] == after.macs
    assert found["fit_bytes"] == (hires.fit.images + hires.fit.held_out) * 37 * C * 4 + 3 * (6 * C + 1) ** 2 * 8
    rows = {
        "align": (hires.align.steps, hires.align.batch_size, 96),
        "recover": (hires.recover.steps, hires.recover.batch_size, 96),
        "curriculum-128": (600, 96, 128),
        "curriculum-160": (600, 56, 160),  # 96 * 0.64 = 61.4, and a multiple of 8
    }
    assert found["stages"] == [
        {
            "stage": stage,
            "steps": steps,
            "images": steps * batch,
            "bytes": batch * training_bytes(student, size, size)
            + (state_of_align(student) if stage == "align" else state_of_recover(student, gradients=2)),
            "batch_bytes": batch * training_bytes(student, size, size),
        }
        for stage, (steps, batch, size) in rows.items()
    ]
    for stages, names in (((3,), list(rows)[2:]), ((0, 1, 2), list(rows)[:2])):
        assert [stage["stage"] for stage in plan("vit_tiny", hires, stages=stages)["stages"]] == names


@pytest.mark.parametrize(
    ("recipe", "teacher", "img_size", "tokens", "sizes"),
    [
        ("demo", "demo", None, 50, []),
        ("dinov2_small_photos", "dinov2_small", 224, 257, []),
        (
            "hires",
            "dinov2_small",
            None,
            257,
            list(load_recipe("hires").curriculum.sizes),
        ),  # published for 518 px, and converted at 224
        ("paper", "vit_tiny", None, 197, []),
    ],
)
def test_recipes_suit_the_teachers_that_they_are_for(recipe, teacher, img_size, tokens, sizes):
    what, width = load_recipe(recipe), {"demo": 96, "dinov2_small": 384, "vit_tiny": 192}[teacher]
    found = plan(teacher, what, img_size=img_size)
    hidden = (what.fit.images + what.fit.held_out) * tokens * width * 4
    assert found["fit_bytes"] == hidden + 3 * (6 * width + 1) ** 2 * 8
    specs = [what.align, what.recover, *(what.curriculum.at(number) for number in range(len(sizes)))]
    assert [row["images"] for row in found["stages"]] == [spec.steps * spec.batch_size for spec in specs]
    assert [row["stage"] for row in found["stages"]] == ["align", "recover", *(f"curriculum-{size}" for size in sizes)]


def test_siglip_has_neither_class_token_nor_head():
    found = plan("siglip2_base", load_recipe("siglip2_base"), stages=(0,))
    assert found["converted_layers"] == list(range(12))
    width, rank, mlp = 768, 96, 3072
    attention, feed_forward = 4 * width * width + 4 * width, 2 * width * mlp + mlp + width
    # Pooling has a query, attention of its own with a norm, and an MLP.
    pooling = width + attention + feed_forward + 2 * width
    outside = 16 * 16 * 3 * width + width + 196 * width + 2 * width + pooling
    # Without prefix tokens a mixer has no use for the attention's weights, nor its global branch for a class token.
    mixer = width * rank + (rank + 1) * (8 * rank + 12) + 9 * width + 4 * rank * width + width * width + width
    norms = 2 * 2 * width
    assert found["parameters"] == {
        "teacher": 12 * (attention + feed_forward + norms) + outside,
        "student": 12 * (mixer + feed_forward + norms) + outside,
    }


@pytest.mark.parametrize(
    ("stages", "names"), [((0,), []), ((0, 1), ["align"]), ((2,), ["recover"]), ((1, 2), ["align", "recover"])]
)
def test_stages_that_are_left_out_cost_nothing(stages, names):
    recipe = load_recipe("demo")
    found = plan("demo", recipe, stages=stages)
    assert [stage["stage"] for stage in found["stages"]] == names
    assert found["fit_images"] == (recipe.fit.images if 0 in stages else 0)


def test_the_recipe_says_which_blocks_are_kept(default):
    demo = load_recipe("demo")
    assert plan("demo", demo)["kept_layers"] == []
    found = plan("demo", demo, keep="every:3")
    assert (found["kept_layers"], found["converted_layers"]) == ([2, 5], [0, 1, 3, 4])
    assert (found["teacher"], found["recipe"]) == ("demo", "demo")


def test_blocks_to_be_chosen_cost_what_the_last_ones_cost(default):
    chosen, last, none = (plan("vit_tiny", default, keep=keep) for keep in ("auto:2", "last:2", "none"))
    assert (last["automatic"], chosen["automatic"]) == (None, {"count": 2, "budget": None})
    for key in ("macs", "parameters", "kept_layers"):
        assert chosen[key] == last[key]
    # Stage 1 has all blocks to train, stage 2 those that are left.
    assert chosen["stages"] == [none["stages"][0], last["stages"][1]]
    assert none["stages"][0] != last["stages"][0]
    budget = plan("vit_tiny", default, keep="auto:budget=0.9")
    assert budget == {**none, "automatic": {"count": None, "budget": 0.9}}


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("vit_tinny", {}, "did you mean vit_tiny"),
        ("resnet18", {}, "not a plain timm VisionTransformer"),
        ("vit_tiny", {"img_size": 100}, "no multiple of the patch"),
        ("vit_tiny", {"keep": "every:1"}, "leaves none to convert"),
        ("vit_tiny", {"sizes": (224, 500)}, "image size 500x500 is no multiple of the patch 16x16"),
        ("vit_tiny", {"sizes": (192, 256)}, "sizes begins at 192, and the stages before it are at 224x224 px"),
        ("vit_tiny", {"stages": (3,)}, "stages 3 of recipe default have nothing to do"),
    ],
)
def test_what_cannot_be_done_cannot_be_planned(default, teacher, options, message):
    sizes = options.pop("sizes", ())
    recipe = replace(default, curriculum=replace(default.curriculum, sizes=sizes))
    with pytest.raises(UserError, match=message):
        plan(teacher, recipe, **options)


def test_a_dry_run_shows_each_size(run_cli):
    shown = run_cli("distill", "--teacher", "dinov2_small", "--recipe", "hires", "--dry-run")
    assert shown.exit_code == 0, shown.output
    rows = {words[0]: words[1:3] for line in shown.stdout.splitlines() if (words := line.split())}
    curriculum = load_recipe("hires").curriculum
    assert "On one GPU, in fp32, with the gradients that CUDA graphs hold." in shown.stdout
    assert f"up to {27_007_704 * 4 / 2**20:.3g} MiB more, to add gradients up" in " ".join(shown.stdout.split())
    sharded = run_cli("distill", "--teacher", "dinov2_small", "--recipe", "hires", "--dry-run", "--shard").stdout
    assert "each of n processes holds an n-th of this and of both models" in " ".join(sharded.split())
    assert "27,007,704" in sharded
    for number, size in enumerate(curriculum.sizes):
        spec = curriculum.at(number)
        assert rows[f"curriculum-{size}"] == [f"{spec.steps:,}", f"{spec.steps * spec.batch_size:,}"]


def test_regions_are_compared_with_the_largest_size_that_runs(caplog):
    """7 x 7 patches at 28 px, 11 x 11 at 44."""
    demo = load_recipe("demo")
    demo = replace(demo, curriculum=replace(demo.curriculum, sizes=(36, 44)))
    nine, seven = (replace(demo, mixer=replace(demo.mixer, regions=count)) for count in (9, 7))
    plan("demo", nine)
    plan("demo", seven, stages=(0,))
    assert "regions" not in caplog.text
    plan("demo", nine, stages=(0, 1, 2))
    assert "mixer.regions is 9, and images have 7 x 7 patches" in caplog.text

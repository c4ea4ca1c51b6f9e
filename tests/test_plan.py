"""The plan of a conversion against counting by hand, and that making it touches neither disk nor network."""

import socket

import pytest
import torch

from gspn2convert.cost import cost, training_bytes
from gspn2convert.errors import UserError
from gspn2convert.model import build_student
from gspn2convert.plan import plan
from gspn2convert.recipe import load_recipe
from gspn2convert.teachers import load_teacher

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread is of no use here, and two test processes would fight for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    # AdamW: weights, gradients, two moments; and the moving average.
    state = 5 * 4 * after.parameters
    assert [stage["bytes"] for stage in found["stages"]] == [128 * per_image + state, 256 * per_image + state]


def test_the_fit_of_a_vit_b_needs_less_than_4_gb(default):
    assert plan("vit_base", default, stages=(0,))["fit_bytes"] < 4e9


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
    ],
)
def test_what_cannot_be_done_cannot_be_planned(default, teacher, options, message):
    with pytest.raises(UserError, match=message):
        plan(teacher, default, **options)

"""Held-out figures against computing them at once over all images."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from gspn2convert.held_out import HeldOut
from gspn2convert.model import build_student

pytestmark = pytest.mark.usefixtures("one_thread")

# Batches of unequal size: their means must be weighted.
IMAGES = torch.randn(13, 3, 32, 48, generator=torch.Generator().manual_seed(0))
BATCHES = IMAGES.split(5)


def make_student(teacher):
    student = build_student(teacher, [1], {"proxy_dim": 8})
    with torch.no_grad():
        student.blocks[1].attn.proj.weight.normal_(generator=torch.Generator().manual_seed(1))
    return student


@torch.no_grad()
def expected(teacher, student):
    theirs, ours = (vit.forward_features(IMAGES) for vit in (teacher, student))
    cosines, prefix = cosine_similarity(ours.double(), theirs.double(), dim=-1), teacher.num_prefix_tokens
    figures = {"patch_cosine": cosines[:, prefix:].mean().item()}
    if prefix:
        figures["prefix_cosine"] = cosines[:, :prefix].mean().item()
    figures["cosine"] = sum(figures.values()) / len(figures)
    if teacher.num_classes:
        guesses = [vit(IMAGES).argmax(-1) for vit in (teacher, student)]
        figures["agreement"] = (guesses[0] == guesses[1]).double().mean().item()
    return figures


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"reg_tokens": 4},
        {"class_token": False, "global_pool": "avg"},
        {"num_classes": 0},
        {"architecture": "deit_tiny_distilled_patch16_224"},
    ],
    ids=["class token", "registers", "no prefix", "no head", "two heads"],
)
def test_figures_are_those_of_all_images_at_once(make_teacher, kind):
    teacher = make_teacher(**kind)
    student = make_student(teacher)
    found = HeldOut(teacher, BATCHES).compare(student)
    assert found == pytest.approx(expected(teacher, student), abs=1e-6)
    assert found["patch_cosine"] < 0.99


def test_agreement_counts_equal_first_guesses(tiny_teacher):
    student = make_student(tiny_teacher)
    with torch.no_grad():
        guesses = tiny_teacher(IMAGES).argmax(-1)
        # A head that names the first class alone agrees where the teacher does so too.
        student.head.weight.zero_()
        student.head.bias.copy_(torch.arange(5, 0, -1))
    share = (guesses == 0).double().mean().item()
    assert 0 < share < 1
    assert HeldOut(tiny_teacher, BATCHES).compare(student)["agreement"] == pytest.approx(share)


def test_the_teacher_agrees_with_itself(make_teacher):
    teacher = make_teacher(reg_tokens=1)
    perfect = HeldOut(teacher, BATCHES).compare(teacher)
    assert perfect == pytest.approx(dict.fromkeys(("prefix_cosine", "patch_cosine", "cosine", "agreement"), 1.0))


def test_the_teacher_is_asked_once_and_the_student_as_it_is_now(tiny_teacher):
    held_out, student = HeldOut(tiny_teacher, BATCHES), make_student(tiny_teacher)
    before = held_out.compare(student)
    with torch.no_grad():
        tiny_teacher.blocks[0].mlp.fc1.weight.zero_()
        assert held_out.compare(student) == before
        student.blocks[0].mlp.fc1.weight.zero_()
    assert held_out.compare(student)["patch_cosine"] < before["patch_cosine"]


@pytest.mark.parametrize("training", [True, False])
def test_a_student_in_training_is_judged_in_eval_mode_and_goes_on_training(make_teacher, training):
    teacher = make_teacher()
    student = make_student(teacher)
    student.pos_drop.p = 0.5
    expected_figures = HeldOut(teacher, BATCHES).compare(student)
    student.train(training)
    assert HeldOut(teacher, BATCHES).compare(student) == expected_figures
    assert student.training == student.blocks[0].training == training

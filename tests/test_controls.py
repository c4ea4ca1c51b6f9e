"""The students of the control rows, `recipes/scripts/controls.py`, train by the same stages."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gspn2convert
from gspn2convert.data import open_images
from gspn2convert.distill import Options, distill_student
from gspn2convert.recipe import load_recipe
from gspn2convert.stage import AlignStage
from gspn2convert.teachers import load_teacher
from gspn2convert.vit import attention_sites
from helpers.stages import IMAGES


@pytest.fixture
def controls(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes" / "scripts")
    return importlib.import_module("controls")


def test_fresh_attention_aligns_from_an_error_of_its_own(controls, make_pair):
    recipe, (_, teacher) = load_recipe("demo"), make_pair()
    stage = AlignStage(controls.with_fresh_attention(teacher, recipe, None), teacher)
    groups = stage.groups(recipe.align)
    assert {group["peak"] for group in groups} == {recipe.align.lr}
    trained = {name for name, p in stage.student.named_parameters() if any(p is q for g in groups for q in g["params"])}
    assert trained == {name for name, _ in stage.student.named_parameters() if ".attn.attention." in name}
    loss = stage(IMAGES, 0.0)["loss"]
    assert loss > 0.5
    loss.backward()
    assert all(p.grad is not None for group in groups for p in group["params"])


def test_a_scan_that_is_switched_off_stays_so(controls, tmp_path):
    """Through the steps of both stages, their optimizers and averages; what is beside the scan learns."""
    recipe, teacher = load_recipe("demo"), load_teacher("demo")
    few = {"steps": 2, "batch_size": 4}
    recipe = replace(recipe, align=replace(recipe.align, **few), recover=replace(recipe.recover, **few), held_out=16)
    recipe = replace(recipe, fit=replace(recipe.fit, images=16, held_out=8))
    train, test = (open_images("demo", split, in_chans=1) for split in ("train", "test"))
    given = controls.without_scan(teacher, recipe, train)
    before = [mixer.lpu.weight.clone() for mixer in attention_sites(given)]
    options = Options(output=tmp_path / "out", stages=(1, 2), device="cpu", quiet=True)
    distill_student(teacher, recipe, train, test, options, teacher_name="demo", given=given)
    for mixer, lpu in zip(attention_sites(gspn2convert.load(tmp_path / "out")), before, strict=True):
        assert not mixer.proj.weight.any()
        assert not torch.equal(mixer.lpu.weight, lpu)

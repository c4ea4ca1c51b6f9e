"""The students of the control rows, `recipes/scripts/controls.py`, train by the same stages."""

import importlib
from pathlib import Path

import pytest

from gspn2convert.recipe import load_recipe
from gspn2convert.stage import AlignStage
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

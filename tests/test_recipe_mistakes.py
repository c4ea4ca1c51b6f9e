"""Every kind of mistake in a recipe."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspn2convert.errors import RecipeError, UserError
from gspn2convert.recipe import (
    Align,
    Mixer,
    load_recipe,
    parse_recipe,
)
from helpers.recipes import SMALL, small


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (Mixer(proxy_dim="C/64"), "recipe.mixer.proxy_dim: 'C/64' is 0 channels for this teacher of 32"),
        (Mixer(proxy_dim=33), "recipe.mixer.proxy_dim: 33 is 33 channels for this teacher of 32; expected 1 to 32"),
        (Mixer(proxy_dim=6, groups=4), "recipe.mixer.groups: expected a divisor of proxy_dim 6, got 4"),
    ],
)
def test_mixer_that_does_not_suit_the_teacher(mixer: Mixer, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        mixer.resolve(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Structure
        ({"fit__ridgee": 0.1}, "recipe.fit: unknown field 'ridgee', did you mean 'ridge'?"),
        ({"extra": 1}, "recipe: unknown field 'extra'; known are name, mixer, fit, align,"),
        ({"recover__losses__kd": 1.0}, "recipe.recover.losses: unknown field 'kd'; known are prefix, patch,"),
        ({"align": {"batch_size": 4}}, "recipe.align: missing field 'steps'"),
        ({"mixer": [1, 2]}, "recipe.mixer: expected a mapping of fields, got [1, 2]"),
        ({"augment": None}, "recipe.augment: expected a mapping of fields, got nothing"),
        # Types
        ({"recover__losses__patch": "high"}, "recipe.recover.losses.patch: expected a number of 0 or more, got 'high'"),
        ({"align__lr": "1e-3"}, "recipe.align.lr: expected a number above 0, got '1e-3', which YAML reads as text; "
                                "write 1.0e-3"),
        ({"align__lr": "2.5e3"}, "write 2.5e+3"),
        ({"align__lr": "2.E-05"}, "write 2.0e-05"),
        ({"align__steps": True}, "recipe.align.steps: expected an integer of 0 or more, got true"),
        ({"align__lr": True}, "recipe.align.lr: expected a number above 0, got true"),
        ({"align__steps": 2.0}, "recipe.align.steps: expected an integer of 0 or more, got 2.0"),
        ({"mixer__lpu": 1}, "recipe.mixer.lpu: expected true or false, got 1"),
        ({"seed": None}, "recipe.seed: expected an integer of 0 or more, got nothing"),
        ({"name": 12}, "got 12; put it in quotes"),
        ({"keep": 5}, "'last:2', 'every:6', 'auto:3' or 'auto:budget=0.98', got 5; put it in quotes"),
        ({"augment__scale": 0.5}, "recipe.augment.scale: expected [low, high] with 0 < low <= high <= 1, got 0.5"),
        ({"augment__scale": [0.5]}, "recipe.augment.scale: expected [low, high]"),
        ({"align__lr": float("nan")}, "recipe.align.lr: expected a number above 0, got nan"),
        ({"fit__ridge": float("inf")}, "recipe.fit.ridge: expected a number of 0 or more, got inf"),
        ({"align__lr": 1.0e300}, "recipe.align.lr: expected a number above 0, got 1e+300; float32 ends at 3.4e+38"),
        ({"align__lr": 2**4000}, "recipe.align.lr: expected a number above 0, got a huge integer; float32 ends at"),
        # Ranges
        ({"align__steps": -1}, "recipe.align.steps: expected an integer of 0 or more, got -1"),
        ({"align__batch_size": 0}, "recipe.align.batch_size: expected an integer of 1 or more, got 0"),
        ({"align__steps": 2**31}, "recipe.align.steps: expected an integer of 0 or more"),
        ({"align__steps": 2**4000}, "recipe.align.steps: expected an integer of 0 or more, got a huge integer"),
        ({"fit__ridge": -0.1}, "recipe.fit.ridge: expected a number of 0 or more, got -0.1"),
        ({"recover__ema": 1.0}, "recipe.recover.ema: expected a number of 0 or more and below 1, got 1.0"),
        ({"recover__final_lr_ratio": 1.5}, "recipe.recover.final_lr_ratio: expected a number from 0 to 1, got 1.5"),
        ({"augment__scale": [0.0, 1.0]}, "recipe.augment.scale: expected [low, high]"),
        ({"augment__scale": [0.9, 0.5]}, "recipe.augment.scale: expected [low, high]"),
        ({"mixer__prefix": "drop"}, "recipe.mixer.prefix: expected one of exact, pool, got 'drop'"),
        ({"fit__method": ["svd"]}, "recipe.fit.method: expected one of closed_form, svd, random, got ['svd']"),
        ({"mixer__proxy_dim": "C/0"}, "recipe.mixer.proxy_dim: expected an integer of 1 or more, or a share"),
        ({"mixer__proxy_dim": 0}, "recipe.mixer.proxy_dim: expected an integer of 1 or more, or a share"),
        ({"mixer__proxy_dim": "C/8\n"}, "recipe.mixer.proxy_dim: expected"),
        ({"keep": "first:2"}, "recipe.keep: expected 'none', block numbers"),
        ({"curriculum__sizes": [44, 36]}, "recipe.curriculum.sizes: expected ascending pixels such as [384, 518]"),
        ({"curriculum__sizes": [36, 36]}, "recipe.curriculum.sizes: expected ascending pixels"),
        ({"curriculum__sizes": [0, 36]}, "recipe.curriculum.sizes: expected ascending pixels"),
        ({"curriculum__sizes": [36.0]}, "recipe.curriculum.sizes: expected ascending pixels"),
        ({"curriculum__sizes": [True]}, "recipe.curriculum.sizes: expected ascending pixels"),
        ({"curriculum__sizes": 384}, "recipe.curriculum.sizes: expected ascending pixels such as [384, 518], or []"),
        ({"curriculum__target": "guide"}, "recipe.curriculum.target: expected one of teacher, reduced, previous, got"),
        ({"curriculum__losses__patch": -1}, "recipe.curriculum.losses.patch: expected a number of 0 or more, got -1"),
        ({"curriculum__losses__kd": 1.0}, "recipe.curriculum.losses: unknown field 'kd'; known are prefix, patch,"),
        ({"size": -1}, "recipe.size: expected an integer of 0 or more, got -1"),
        ({"name": "two\nlines"}, "recipe.name: expected a name of letters"),
        # Between fields
        ({"align__final_lr": 0.1}, "recipe.align.final_lr: expected at most 0.001, the lower peak, got 0.1"),
        ({"align__control_lr": 1.0e-6}, "recipe.align.final_lr: expected at most 1e-06, the lower peak, got 1e-05"),
        ({"align__control_lr": 0}, "recipe.align.control_lr: expected a number above 0, got 0"),
        ({"recover__losses": dict.fromkeys(["prefix", "patch", "smooth_l1", "mixer", "logits"], 0)},
         "recipe.recover.losses: every weight is 0"),
        ({"curriculum__losses": dict.fromkeys(["prefix", "patch", "smooth_l1", "mixer", "logits"], 0)},
         "recipe.curriculum.losses: every weight is 0"),
    ],
)  # fmt: skip
def test_mistake_in_a_field_names_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(small(**change), "my.yaml")
    assert message in str(error.value)
    assert str(error.value).endswith("(in my.yaml)")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.yaml: empty; start from a recipe"),
        ("# only a comment\n", "my.yaml: empty"),
        ("- 1\n- 2\n", "recipe: expected a mapping of fields, got [1, 2] (in my.yaml)"),
        ("just text", "recipe: expected a mapping of fields, got 'just text'"),
        (SMALL + "name: again\n", "my.yaml, line 4: field 'name' stands twice"),
        ("name: x\nalign: {steps: 1, steps: 2}\n", "my.yaml, line 2: field 'steps' stands twice"),
        ("name: [1\n", "my.yaml, line 2: "),
        ("name: x\n\tseed: 1\n", "my.yaml, line 2: found character '\\t'"),
        ("1: x\n", "recipe: unknown field 1; known are"),
        ("? [a]\n: b\n", "my.yaml, line 1: found unhashable key"),
        ("name: !!python/object:os.system x\n", "my.yaml, line 1: could not determine a constructor"),
        ("name: !!bool maybe\n", "my.yaml: cannot be read as YAML"),
        ("name: 2024-13-45\n", "my.yaml: cannot be read as YAML: month must be"),
        ("name: \x00\n", "my.yaml: cannot be read as YAML"),
        ("name: " + "[" * 2000, "my.yaml: nested too deeply"),
    ],
)
def test_text_that_is_no_recipe(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, "my.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_cannot_blow_up_a_message() -> None:
    # Ten levels of ten references each stand for 10^10 items.
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    text = "name: &bomb\n  " + "\n  ".join(lines) + "\nalign: {steps: 1, batch_size: 1}\n" + "recover: *bomb\n"
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, "my.yaml")
    assert len(str(error.value)) < 500


def test_parts_check_themselves_without_yaml() -> None:
    with pytest.raises(RecipeError, match=r"recipe\.align\.lr: expected a number above 0, got -1"):
        Align(steps=1, batch_size=1, lr=-1)
    with pytest.raises(RecipeError, match=r"recipe\.mixer: expected a Mixer, got 'exact'"):
        replace(parse_recipe(SMALL, "here"), mixer="exact")


def test_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"image\.yaml: expected a recipe as UTF-8 text, found other bytes at 6"):
        load_recipe(tmp_path / "image.yaml")


def test_recipe_errors_are_mistakes_of_the_users() -> None:
    assert issubclass(RecipeError, UserError)
    assert issubclass(UserError, ValueError)

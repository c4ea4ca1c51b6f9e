"""Recipes: the bundled ones, their documentation, round trips, and every kind of mistake."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from gspn2convert.errors import RecipeError, UserError
from gspn2convert.recipe import (
    Align,
    Augment,
    Curriculum,
    Fit,
    Mixer,
    Recipe,
    Recover,
    RecoverLosses,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_text,
)
from gspn2convert.recipe_parser import Part

README = Path(__file__).parents[1] / "recipes" / "README.md"
SMALL = "name: small\nalign: {steps: 3, batch_size: 4}\nrecover: {steps: 5, batch_size: 6}\n"


def small(**changes: Any) -> str:
    """The smallest recipe as YAML, with other values at dotted places (`__` for a dot)."""
    data = yaml.safe_load(SMALL)
    for place, value in changes.items():
        *parts, last = place.split("__")
        target = data
        for part in parts:
            target = target.setdefault(part, {})
        target[last] = value
    return yaml.safe_dump(data)


def every_field(cls: type[Part], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Place and default of every field; `required` where there is none."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if isinstance(hints[field.name], type) and issubclass(hints[field.name], Part):
            yield from every_field(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, "required" if field.default is MISSING else field.default


def test_smallest_recipe_has_the_documented_defaults() -> None:
    assert parse_recipe(SMALL, "here") == Recipe(
        name="small",
        mixer=Mixer(
            proxy_dim="C/8", groups=1, segment=0, lpu=True, global_branch=True, prefix="exact", prefix_gate=True
        ),
        fit=Fit(method="closed_form", images=512, held_out=128, batch_size=32, ridge=0.05, rounds=2),
        align=Align(steps=3, batch_size=4, lr=2e-3, final_lr=1e-5, warmup=0.05, weight_decay=0.0, clip=1.0),
        recover=Recover(
            steps=5,
            batch_size=6,
            mixer_lr=5e-4,
            lr=1e-4,
            final_lr_ratio=0.01,
            warmup=0.05,
            weight_decay=0.02,
            clip=1.0,
            ema=0.99,
            losses=RecoverLosses(
                prefix=1.0, patch=0.9, smooth_l1=0.1, mixer=0.5, logits=1.0, temperature=2.0, mixer_until=0.6
            ),
        ),
        augment=Augment(scale=(0.4, 1.0), flip=True, color_jitter=0.1),
        keep="none",
        seed=0,
        eval_every=50,
        held_out=256,
    )


def test_readme_explains_every_field_once_with_its_default() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9_.]+)` \| (.+?) \|", README.read_text().partition("## Every field")[2], re.MULTILINE
    )
    table = [
        (place, default if default == "required" else yaml.safe_load(default.strip("`"))) for place, default in rows
    ]
    assert table == [
        (place, list(default) if isinstance(default, tuple) else default) for place, default in every_field(Recipe)
    ]


def test_bundled_recipes() -> None:
    assert recipe_names() == [
        "default",
        "demo",
        "dinov2_base",
        "dinov2_small_photos",
        "fashion_mnist_vit_tiny",
        "hires",
        "paper",
        "siglip2_base",
        "vit_base_imagenet",
    ]
    assert load_recipe("demo").mixer.resolve(96)["proxy_dim"] == 24
    assert load_recipe("default").mixer.resolve(768)["proxy_dim"] == 96
    paper = load_recipe("paper").mixer
    assert load_recipe("hires").curriculum.sizes[-1] == 518
    assert paper == Mixer(proxy_dim=2, lpu=False, global_branch=False, prefix="exact", prefix_gate=False)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [
        ((224, 448, 896), 128, [128, 32, 8]),
        ((336, 518), 96, [96, 40]),  # 40.4
        ((224, 336), 144, [144, 64]),  # exactly, and not 56 for a rounding error
        ((384, 1024), 100, [100, 8]),  # 14.1, and a multiple of 8
        ((224, 896), 64, [64, 8]),  # not 0 for 4
        ((36, 44), 4, [4, 4]),  # no more images than at the first size
    ],
)
def test_curriculum_takes_as_many_tokens_a_step_at_each_size(
    sizes: tuple[int, ...], batch_size: int, expected: list[int]
) -> None:
    curriculum = Curriculum(sizes=sizes, batch_size=batch_size, lr=1e-3)
    found = [curriculum.at(number) for number in range(len(sizes))]
    assert found == [replace(curriculum, batch_size=size) for size in expected]


def test_default_recipe_writes_every_field() -> None:
    data = yaml.safe_load(recipe_text("default"))
    for place, _ in every_field(Recipe):
        value = data
        for part in place.split("."):
            value = value[part]


@pytest.mark.parametrize("name", ["default", "demo", "hires", "paper"])
def test_dump_reads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe), "dump") == recipe


def test_dump_reads_back_values_that_yaml_could_take_for_others() -> None:
    recipe = replace(parse_recipe(SMALL, "here"), name="1e3", keep="0,5", augment=Augment(scale=(1e-7, 1)))
    assert parse_recipe(dump_recipe(recipe), "dump") == recipe


@pytest.mark.parametrize(
    ("mixer", "dim", "proxy_dim"),
    [
        (Mixer(), 384, 48),
        (Mixer(proxy_dim="C/18"), 1152, 64),
        (Mixer(proxy_dim="C/7"), 32, 4),  # 32 / 7 = 4.57, rounded down
        (Mixer(proxy_dim="C/1", groups=4), 32, 32),
        (Mixer(proxy_dim=6, groups=3), 32, 6),
    ],
)
def test_mixer_resolves_to_arguments(mixer: Mixer, dim: int, proxy_dim: int) -> None:
    assert mixer.resolve(dim) == {
        "proxy_dim": proxy_dim,
        "groups": mixer.groups,
        "segment": 0,
        "lpu": True,
        "global_branch": True,
        "prefix": "exact",
        "prefix_gate": True,
    }


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
        ({"align__final_lr": 0.1}, "recipe.align.final_lr: expected at most lr 0.002, got 0.1"),
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


def test_load_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(SMALL, encoding="utf-8-sig")
    (tmp_path / "demo").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml").name == load_recipe("./demo").name == load_recipe(Path("demo")).name == "small"
    assert load_recipe("demo").name == "demo"


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'dmo', did you mean 'demo'?"):
        load_recipe("dmo")
    with pytest.raises(RecipeError, match="unknown recipe ''; known are default, demo, dinov2_base"):
        load_recipe("")
    with pytest.raises(RecipeError, match=r"lost\.yaml: cannot read this recipe: No such file or directory; recipes"):
        load_recipe(tmp_path / "lost.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot read this recipe: embedded null byte"):
        load_recipe("a\0.yaml")


def test_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"image\.yaml: expected a recipe as UTF-8 text, found other bytes at 6"):
        load_recipe(tmp_path / "image.yaml")


def test_recipe_errors_are_mistakes_of_the_users() -> None:
    assert issubclass(RecipeError, UserError)
    assert issubclass(UserError, ValueError)

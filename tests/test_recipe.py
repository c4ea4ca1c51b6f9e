"""Recipes: the bundled ones, their documentation, round trips."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from gspn2convert.errors import RecipeError
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
from helpers.recipes import SMALL

README = Path(__file__).parents[1] / "recipes" / "README.md"


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
            proxy_dim="C/8",
            groups=1,
            segment=0,
            lpu=True,
            global_branch=True,
            prefix="exact",
            prefix_gate=True,
            regions=0,
        ),
        fit=Fit(method="closed_form", images=512, held_out=128, batch_size=32, ridge=0.05, rounds=2),
        align=Align(
            steps=3, batch_size=4, lr=1e-3, control_lr=1.6e-2, final_lr=1e-5, warmup=0.05, weight_decay=0.0, clip=1.0
        ),
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
        "dinov2_small_regions",
        "fashion_mnist_vit_tiny",
        "hires",
        "paper",
        "siglip2_base",
        "vit_base_imagenet",
    ]
    assert [load_recipe(name).name for name in recipe_names()] == recipe_names()
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
        "regions": 0,
    }


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

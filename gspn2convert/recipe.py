"""What a conversion does: the recipe's types, and reading and writing them as YAML.

`recipes/README.md` explains every field for those who write recipes.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from gspn2convert.errors import RecipeError
from gspn2convert.recipe_parser import Part, parse, read_yaml, show, suggest
from gspn2convert.recipe_values import (
    BelowOne,
    Count,
    Fraction,
    Interval,
    Keep,
    Name,
    OptimizerName,
    Positive,
    ProxyDim,
    Regions,
    Sizes,
    Weight,
    Whole,
)

__all__ = [
    "Align",
    "Augment",
    "Curriculum",
    "CurriculumLosses",
    "Fit",
    "Mixer",
    "Recipe",
    "Recover",
    "RecoverLosses",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "recipe_text",
]


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """The module that takes the place of an attention layer."""

    place: ClassVar[str] = "recipe.mixer"

    proxy_dim: ProxyDim = "C/8"
    groups: Count = 1
    segment: Whole = 0
    lpu: bool = True
    global_branch: bool = True
    prefix: Literal["exact", "pool"] = "exact"
    prefix_gate: bool = True
    regions: Regions = 0

    def resolve(self, dim: int) -> dict[str, int | bool | str]:
        """Settle what depends on the teacher.

        Args:
            dim: Channels of the teacher's tokens (C).

        Returns:
            The keyword arguments of `Gspn2Mixer` that are the recipe's; JSON can hold them.

        Raises:
            RecipeError: The proxy dimension is not in 1 to `dim`, or the groups do not divide it.
        """
        proxy_dim = self.proxy_dim
        if isinstance(proxy_dim, str):
            proxy_dim = dim // int(proxy_dim.removeprefix("C/"))
        if not 1 <= proxy_dim <= dim:
            raise RecipeError(
                f"{self.place}.proxy_dim: {show(self.proxy_dim)} is {proxy_dim} channels for this teacher of {dim}; "
                f"expected 1 to {dim}"
            )
        if proxy_dim % self.groups:
            raise RecipeError(f"{self.place}.groups: expected a divisor of proxy_dim {proxy_dim}, got {self.groups}")
        return asdict(self) | {"proxy_dim": proxy_dim}


@dataclass(frozen=True, kw_only=True)
class Fit(Part):
    """Stage 0: how the mixers are initialised from the attention layers."""

    place: ClassVar[str] = "recipe.fit"

    method: Literal["closed_form", "svd", "random"] = "closed_form"
    images: Count = 512
    held_out: Count = 128
    batch_size: Count = 32
    ridge: Weight = 0.05
    rounds: Count = 2


@dataclass(frozen=True, kw_only=True)
class Augment(Part):
    """What is done to a training image before teacher and student both see it."""

    place: ClassVar[str] = "recipe.augment"

    scale: Interval = (0.4, 1.0)
    flip: bool = True
    color_jitter: Fraction = 0.1
    mix: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class Align(Part):
    """Stage 1: each mixer alone learns the output of the attention layer that it replaces."""

    place: ClassVar[str] = "recipe.align"
    optimizer: ClassVar[OptimizerName] = "adamw"  # Muon gained nothing here

    steps: Whole
    batch_size: Count
    lr: Positive = 1.0e-3
    control_lr: Positive = 1.6e-2
    final_lr: Weight = 1.0e-5
    warmup: BelowOne = 0.05
    weight_decay: Weight = 0.0
    clip: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_lr > (peak := min(self.lr, self.control_lr)):
            raise RecipeError(f"{self.place}.final_lr: expected at most {peak}, the lower peak, got {self.final_lr}")


@dataclass(frozen=True, kw_only=True)
class RecoverLosses(Part):
    """Weights of the terms of stage 2's loss."""

    place: ClassVar[str] = "recipe.recover.losses"

    prefix: Weight = 1.0
    patch: Weight = 0.9
    smooth_l1: Weight = 0.1
    similarity: Weight = 0.0
    mixer: Weight = 0.5
    logits: Weight = 1.0
    temperature: Positive = 2.0
    mixer_until: Fraction = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any((self.prefix, self.patch, self.smooth_l1, self.similarity, self.mixer, self.logits)):
            raise RecipeError(f"{self.place}: every weight is 0; give at least one of them a number above 0")


@dataclass(frozen=True, kw_only=True)
class Recover(Part):
    """Stage 2: the whole student learns the teacher's features and logits end to end."""

    place: ClassVar[str] = "recipe.recover"

    steps: Whole
    batch_size: Count
    optimizer: OptimizerName = "muon"
    mixer_lr: Positive = 5.0e-4
    lr: Positive = 1.0e-4
    final_lr_ratio: Fraction = 0.01
    warmup: BelowOne = 0.05
    weight_decay: Weight = 0.02
    clip: Positive = 1.0
    ema: BelowOne = 0.99
    losses: RecoverLosses = field(default_factory=RecoverLosses)


@dataclass(frozen=True, kw_only=True)
class CurriculumLosses(RecoverLosses):
    """The same for stage 3."""

    place: ClassVar[str] = "recipe.curriculum.losses"


@dataclass(frozen=True, kw_only=True)
class Curriculum(Recover):
    """Stage 3: the same as stage 2 at one image size after the other."""

    place: ClassVar[str] = "recipe.curriculum"

    sizes: Sizes = ()
    steps: Whole = 1000
    batch_size: Count = 128
    mixer_lr: Positive = 2.0e-4
    lr: Positive = 1.0e-4
    losses: CurriculumLosses = field(default_factory=CurriculumLosses)
    target: Literal["teacher", "reduced", "previous"] = "teacher"

    def at(self, number: int) -> "Curriculum":
        """What is done at the size of this number: with as many tokens a step as at the first size.

        Larger images come in batches that are smaller in the same measure, in multiples of 8.
        """
        if number == 0:
            return self
        share = self.batch_size * self.sizes[0] ** 2 // self.sizes[number] ** 2
        return replace(self, batch_size=min(self.batch_size, max(8, share // 8 * 8)))


@dataclass(frozen=True, kw_only=True)
class Recipe(Part):
    """Everything that decides what a conversion does; where and how it runs are options of the command."""

    place: ClassVar[str] = "recipe"

    name: Name
    mixer: Mixer = field(default_factory=Mixer)
    fit: Fit = field(default_factory=Fit)
    align: Align
    recover: Recover
    curriculum: Curriculum = field(default_factory=Curriculum)
    augment: Augment = field(default_factory=Augment)
    size: Whole = 0
    keep: Keep = "none"
    seed: Whole = 0
    eval_every: Count = 50
    held_out: Count = 256


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: A name that `recipe_names` lists, or the path of a YAML file: text with a path
            separator or ending in .yaml or .yml.

    Raises:
        RecipeError: There is no such recipe, or it holds a mistake.
    """
    return parse_recipe(recipe_text(name_or_path), str(name_or_path))


def parse_recipe(text: str, source: str) -> Recipe:
    """Read a recipe from YAML text.

    Args:
        text: The YAML text.
        source: Where it came from, for error messages.

    Raises:
        RecipeError: The text is no YAML, or a field is unknown, missing, ill-typed or out of range.
    """
    data = read_yaml(text, source)
    if data is None:
        raise RecipeError(f"{source}: empty; start from a recipe that `gspn2convert recipes show default` prints")
    try:
        return parse(Recipe, data)
    except RecipeError as error:
        raise RecipeError(f"{error} (in {source})") from error


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with all its fields as YAML, which `parse_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False)


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    return sorted(path.stem for path in _bundled().glob("*.yaml"))


def recipe_text(name_or_path: str | Path) -> str:
    """Read a recipe's text, comments included; `load_recipe` says what names and paths are.

    Raises:
        RecipeError: There is no such recipe, or the file cannot be read.
    """
    path = _locate(name_or_path)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected a recipe as UTF-8 text, found other bytes at {error.start}") from error
    except (OSError, ValueError) as error:
        reason, known = getattr(error, "strerror", None) or error, ", ".join(recipe_names())
        raise RecipeError(f"{path}: cannot read this recipe: {reason}; recipes with a name are {known}") from error


def _bundled() -> Path:
    """The folder of the recipes: inside an installed package, beside it in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"


def _locate(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or os.path.basename(text) != text or text.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    if text not in recipe_names():
        raise RecipeError(f"unknown recipe {text!r}{suggest(text, recipe_names())} (a file needs its path or .yaml)")
    return _bundled() / f"{text}.yaml"

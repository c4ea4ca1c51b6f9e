"""`gspn2convert recipes`: the recipes that come with the package."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands.report import Document, ReportCommand, show_table

if TYPE_CHECKING:
    from rich.console import Console


@click.group("recipes", no_args_is_help=False)
def command() -> None:
    """List the bundled recipes, or show one."""


def _show_list(document: Document, console: "Console") -> None:
    rows = [(recipe["name"], recipe["about"]) for recipe in document["recipes"]]
    show_table(console, ("recipe", "what it is for"), rows, numbers=False)


@command.command("list", cls=ReportCommand, show=_show_list)
def list_command() -> dict[str, Any]:
    """List the recipes."""
    from gspn2convert.recipe import recipe_names, recipe_text

    return {"recipes": [{"name": name, "about": _about(recipe_text(name))} for name in recipe_names()]}


def _about(text: str) -> str:
    """Return the comment at the top of a recipe."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def _show_text(document: Document, console: "Console") -> None:
    click.echo(document["text"], nl=False)


@command.command("show", cls=ReportCommand, show=_show_text)
@click.argument("name")
def show_command(name: str) -> dict[str, Any]:
    """Print a recipe as it is written (NAME or FILE)."""
    from gspn2convert.recipe import load_recipe, recipe_text

    return {"name": name, "recipe": dataclasses.asdict(load_recipe(name)), "text": recipe_text(name)}

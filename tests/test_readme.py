"""The README says what is: figures come from the JSON files, commands exist, links lead somewhere, code runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

import gspn2convert
from gspn2convert.cli import main
from gspn2convert.model import build_student
from gspn2convert.teachers import ALIASES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
CODE = [line for language, block in FENCED if language == "bash" for line in block.splitlines()]
CODE += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE))


def found(pattern: str) -> list[str]:
    """What a pattern finds in the README's shell lines and inline code, each once."""
    return sorted({match for line in CODE for match in re.findall(pattern, line)})


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "recipes" / "scripts" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes" / "scripts")
        spec.loader.exec_module(module)
    return module


def test_tables_are_what_the_files_say() -> None:
    command = [sys.executable, ROOT / "recipes" / "scripts" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_is_stale(tables) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith("| MACs at 1024 px"))
    stale = TEXT.replace(row, row.replace("1", "2"))
    assert stale != TEXT
    assert tables.render(stale, ROOT)[0] == TEXT


def test_without_its_file_a_table_shows_no_figure(tables, tmp_path) -> None:
    pages = "".join((ROOT / name).read_text() for name in tables.PAGES)
    text, missing = tables.render(pages, tmp_path)
    assert missing == re.findall(r"no `(.*)`\.\*\n<!-- end -->", text)
    assert sorted(missing) == sorted(path for path, _ in tables.TABLES.values())
    assert all(f"`{path}`" in TEXT for path in missing), "the README names the command behind each file"


@pytest.mark.parametrize("line", found(r"\b(gspn2convert [a-z][^#]*)"))
def test_commands_exist(line) -> None:
    command, words = main, shlex.split(line)[1:]
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    # Values that only a real run has, such as folders, are not looked at; an unknown option is an error.
    command.make_context("README", words, resilient_parsing=True, help_option_names=["-h", "--help"])


def test_every_command_has_an_example() -> None:
    assert set(found(r"^gspn2convert ([a-z-]+)")) == set(main.commands)


@pytest.mark.parametrize("line", found(r"\bpython ([a-z_/]+\.py.*)"))
def test_scripts_exist_and_know_their_options(line) -> None:
    script, *words = line.split()
    source = (ROOT / script).read_text()
    assert all(f'"{word}"' in source for word in words if word.startswith("--"))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = found(r"\bmake ([a-z-]+)")
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert "kernels/line_scan.svg" in links
    assert not [link for link in links if not leads_somewhere(link)]


def leads_somewhere(link: str) -> bool:
    """Whether a link names a file that is there, and a heading of it where it names one."""
    path, _, heading = link.partition("#")
    text = (ROOT / path).read_text() if heading and path else TEXT
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    return (ROOT / path).exists() and (not heading or heading in headings)


def test_short_names_are_those_of_the_command_line() -> None:
    assert set(ALIASES) <= set(CODE)


def test_python_example_runs(tmp_path, monkeypatch) -> None:
    teacher = gspn2convert.load_teacher("demo")
    recipe = gspn2convert.load_recipe("demo")
    student = build_student(teacher, range(len(teacher.blocks)), recipe.mixer.resolve(teacher.embed_dim))
    gspn2convert.save_student(student, tmp_path / "student", recipe_text="", metrics={}, teacher="demo")
    monkeypatch.chdir(tmp_path)
    (example,) = (block for language, block in FENCED if language == "python")
    names: dict = {}
    exec(example, names)
    pixels = torch.rand(names["logits"].shape[0], 1, 28, 28)
    assert torch.equal(names["model"](pixels), student.eval()(pixels))


def test_is_read_in_a_sitting() -> None:
    assert len(TEXT.splitlines()) <= 200

"""Help, and the commands that need nothing of the user's: demo, doctor, build-ops, recipes."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from gspn2_kernels.build import BuildError
from gspn2convert.cli import main
from gspn2convert.interrupt import Interrupted
from gspn2convert.recipe import parse_recipe
from helpers.command_line import RECIPE, the_error

COMMANDS = ("bench", "build-ops", "demo", "describe", "distill", "doctor", "evaluate", "export", "recipes", "run")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], *([name, "-h"] for name in COMMANDS)], ids=" ".join)
def test_help_is_there(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert result.output.startswith("Usage: gspn2convert")
    assert all(len(line) <= 100 for line in result.output.splitlines())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "recipes"])
def test_every_command_speaks_json_and_shows_tracebacks(name):
    assert {"--json", "--debug"} <= {option for one in main.commands[name].params for option in one.opts}


@pytest.mark.parametrize("arguments", [["-h"], ["distill", "-h"], ["recipes", "list", "-h"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gspn2convert", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "gspn2convert" in imported
    assert not imported & {"torch", "timm", "numpy", "accelerate", "onnxruntime", "rich"}


def test_version():
    assert CliRunner().invoke(main, ["--version"]).output == "gspn2convert 0.1.0\n"


def test_demo_goes_the_whole_way(monkeypatch, tmp_path):
    # The demo's own recipe takes minutes; the way is the same with one block converted in a few steps.
    short = parse_recipe(f"{RECIPE}keep: last:5\n", "test")
    monkeypatch.setattr("gspn2convert.recipe.load_recipe", {"demo": short}.__getitem__)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["fit", "align", "recover"]
    assert found["student"]["top1"] == pytest.approx(found["stages"][-1]["top1"])
    assert found["onnx"]["top1"] == pytest.approx(found["student"]["top1"], abs=0.002)
    assert found["onnx"]["max_abs"] < 1e-3
    assert found["teacher"]["top1"] > 0.91
    assert {"device", "torch", "commit", "date"} <= found["environment"].keys()
    assert f"{100 * found['teacher']['top1']:.2f} %  {100 * found['student']['top1']:.2f} %" in result.stdout
    again = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "is not empty; name another by --output, or remove it" in the_error(again)


def test_a_stopped_demo_says_how_to_start_again(monkeypatch, tmp_path):
    def stopped(*given, **more):
        raise Interrupted("align", 3, 60)

    monkeypatch.setattr(importlib.import_module("gspn2convert.distill"), "distill", stopped)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert the_error(result) == f"error: the demo was stopped in stage align; remove {tmp_path} to start again"


def test_doctor_reports():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["ok"]
    assert {"torch", "timm", "onnxruntime"} <= {check["name"] for check in found["checks"]}
    assert torch.__version__.partition("+")[0] in CliRunner().invoke(main, ["doctor"]).stdout


def test_doctor_fails_where_something_needed_is_missing(monkeypatch):
    monkeypatch.setattr("gspn2convert.doctor._OLDEST", {"timm": (99,)})
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert 'To mend timm: pip install --upgrade "timm>=99"' in result.stdout


@pytest.mark.parametrize("has_cuda", [False, True])
def test_build_ops_says_how_to_use_the_library(monkeypatch, tmp_path, has_cuda):
    # Compiling takes long, and its own tests do it.
    path = tmp_path / "libgspn2_ort.so"

    def build(*, include, cuda, report):
        report("compiling")
        return path

    monkeypatch.setattr("gspn2_kernels.build.build", build)
    monkeypatch.setattr("gspn2_kernels.build.has_cuda", lambda library: has_cuda)
    result = CliRunner().invoke(main, ["build-ops"])
    assert result.stderr == "compiling\n"
    assert result.stdout.startswith(f"library {path} ({'CPU and CUDA' if has_cuda else 'CPU alone'})\n")
    assert f'options.register_custom_ops_library("{path}")' in result.stdout
    assert ("CUDAExecutionProvider" in result.stdout) == has_cuda
    found = json.loads(CliRunner().invoke(main, ["build-ops", "--json"]).stdout)
    assert found == {"path": str(path), "cuda": has_cuda}


def test_what_a_compiler_says_stands_above_the_error(monkeypatch):
    def build(**options):
        raise BuildError("the build failed: cmake\nline_scan.cc:1: error\nstop")

    monkeypatch.setattr("gspn2_kernels.build.build", build)
    result = CliRunner().invoke(main, ["build-ops"])
    assert result.exit_code == 2
    assert result.stderr == "line_scan.cc:1: error\nstop\nerror: the build failed: cmake\n"


def test_recipes_are_listed_and_shown(run):
    assert run("recipes").exit_code == 2
    listed = json.loads(run("recipes list --json").stdout)["recipes"]
    assert {"default", "demo", "paper"} <= {recipe["name"] for recipe in listed}
    assert "default" in run("recipes list").stdout
    assert run("recipes show {}/tiny.yaml").stdout == RECIPE
    assert json.loads(run("recipes show {}/tiny.yaml --json").stdout)["recipe"]["align"]["steps"] == 2

"""The command line as its users meet it: output, exit codes, one-line errors, JSON that parses."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys

import click
import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from gspn2_kernels.build import BuildError
from gspn2convert.cli import explain, main
from gspn2convert.interrupt import Interrupted
from gspn2convert.recipe import parse_recipe

COMMANDS = ("bench", "build-ops", "demo", "describe", "distill", "doctor", "evaluate", "export", "recipes", "run")
PROGRAM = (sys.executable, "-m", "gspn2convert")
RECIPE = """
name: tiny
mixer: {proxy_dim: 4}
fit: {images: 24, held_out: 8, batch_size: 8}
align: {steps: 2, batch_size: 4}
recover: {steps: 2, batch_size: 4}
held_out: 12
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher's folder, labelled images and a recipe."""
    root = tmp_path_factory.mktemp("place")
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", **shape)
    save_for_hf(teacher, root / "teacher", safe_serialization=True, model_args=shape)
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name in ("ant", "bee", "cat"):
            (root / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{index}.png")
    (root / "tiny.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def run(place):
    """Runs a command line in which {} stands for the place."""

    def go(line):
        return CliRunner().invoke(main, line.replace("{}", str(place)).split())

    return go


@pytest.fixture(scope="module")
def converted(place, run):
    """What distill printed as JSON; the student lies in {}/student."""
    line = "distill --teacher {}/teacher --data {}/data --recipe {}/tiny.yaml --output {}/student --json"
    result = run(line)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def the_error(result):
    """The one line of the error."""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [lines[0]] == result.stderr.splitlines()[-1:]
    assert len(lines) == 1
    return lines[0]


def execute(*arguments, **options):
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=600, check=False, **options)


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


def test_distill_reports_every_stage(place, converted):
    assert [stage["stage"] for stage in converted["stages"]] == ["fit", "align", "recover"]
    assert all(0 <= stage["top1"] <= 1 and 0 < stage["patch_cosine"] <= 1 for stage in converted["stages"])
    assert len(converted["layers"]) == 2
    stored = json.loads((place / "student" / "metrics.json").read_text())
    assert {**stored, "output": f"{place}/student"} == converted


def test_distill_shows_a_table(place, run):
    result = run("distill --teacher {}/teacher --data {}/data --recipe {}/tiny.yaml --output {}/fit --stages 0")
    assert result.exit_code == 0, result.output
    titles, row, *_ = result.stdout.splitlines()
    assert titles.split() == "after stage seconds patch cosine prefix cosine agreement top-1".split()
    assert row.split()[0] == "fit"
    metrics = json.loads((place / "fit" / "metrics.json").read_text())
    assert row.split()[2] == f"{metrics['stages'][0]['patch_cosine']:.4f}"


def test_distill_shows_the_blocks_that_were_chosen(place, run):
    line = "distill --teacher {}/teacher --data {}/data --recipe {}/tiny.yaml --output {}/auto --stages 0 --keep auto:1"
    result = run(line)
    assert result.exit_code == 0, result.output
    found = json.loads((place / "auto" / "metrics.json").read_text())["selection"]
    shown = result.stdout.splitlines()
    start = shown.index(f"blocks that keep attention (auto:1), chosen by KL of the logits: {found['kept'][0]}")
    rows = [row.split() for row in shown[start + 2 : start + 6]]
    for one, row in zip(found["passes"][0]["sets"], rows, strict=True):
        blocks = str(one["layers"][0]) if one["layers"] else "none"
        figures = [blocks, f"{one['kl']:.4f}", f"{one['divergence']:.4f}", f"{100 * one['retention']:.2f}", "%"]
        assert row == ["fit:", *one["set"].split(), *figures]
    layers = json.loads(run("describe {}/auto --json").stdout)["layers"]
    assert [layer["error"] is None for layer in layers] == [layer["layer"] in found["kept"] for layer in layers]
    assert "1 of 2 blocks keep attention, chosen automatically" in run(f"{line} --dry-run").stdout


def test_of_two_processes_one_tells_what_both_do_and_both_warn(place, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PROGRAM[1:]]
    line = f"distill --teacher {place}/teacher --data {place}/data --recipe {place}/tiny.yaml --stages 1,2 --device cpu"
    result = subprocess.run(
        [*launch, *line.split(), "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("stage recover: held-out cosine raw") == 1
    assert result.stderr.count("recover 2/2 loss") == 1
    assert result.stderr.count("without a student to go on from, the mixers start at random") == 2
    assert result.stdout.count(f"wrote {tmp_path}/out") == 1


def test_dry_run_plans_and_writes_nothing(tmp_path, run):
    line = f"distill --teacher {{}}/teacher --recipe {{}}/tiny.yaml --output {tmp_path}/out --dry-run"
    plan = json.loads(run(f"{line} --json").stdout)["plan"]
    assert plan["converted_layers"] == [0, 1]
    assert [(stage["stage"], stage["steps"]) for stage in plan["stages"]] == [("align", 2), ("recover", 2)]
    assert f"{plan['parameters']['student']:,}" in run(line).stdout
    assert not (tmp_path / "out").exists()


def test_evaluate_agrees_with_what_distill_measured(run, converted):
    result = run("evaluate {}/student --data {}/data --teacher {}/teacher --knn --json --device cpu")
    found = json.loads(result.stdout)
    assert found["top1"] == pytest.approx(converted["stages"][-1]["top1"])
    assert found["teacher_top1"] == pytest.approx(converted["teacher_top1"])
    assert 0 <= found["knn"] <= 1
    shown = run("evaluate {}/student --data {}/data --teacher {}/teacher --knn --device cpu").stdout
    assert f"{100 * found['agreement']:.2f} %" in shown
    assert f"{found['patch_cosine']['mean']:.4f}" in shown
    alone = run("evaluate {}/student --data {}/data --teacher none").stdout
    assert "teacher" not in alone
    assert f"{100 * found['top1']:.2f} %" in alone


@pytest.mark.usefixtures("converted")
def test_evaluate_shows_all_that_it_can_find_out(run):
    line = "evaluate {}/student --data {}/data --teacher {}/teacher --knn --linear --cka --precision bf16 --device cpu"
    found = json.loads(run(f"{line} --json").stdout)
    assert found["precision"] == "bf16"
    assert found["linear_kept"] == pytest.approx(found["linear"] / found["teacher_linear"])
    assert len(found["cka"]) == 2
    shown = run(line).stdout
    rows = {row[:30].strip(): row[30:].split("  ") for row in shown.splitlines()}
    cells = [cell.strip() for cell in rows["linear probe top-1"] if cell.strip()]
    assert cells == [f"{100 * found[key]:.2f} %" for key in ("linear", "teacher_linear", "linear_kept")]
    assert f"{100 * found['neighbour_agreement']:.2f} %" in "".join(rows["neighbours in common (10)"])
    assert f"{sum(found['cka']) / 2:.4f} (least: {min(found['cka']):.4f})" in "".join(rows["CKA of the blocks"])


@pytest.mark.usefixtures("converted")
def test_export_writes_files_that_load(place, run):
    shown = run("export {}/student --size 32x48").stdout
    assert "1x3x32x48" in shown
    assert "2 LineScan nodes" in shown
    onnx.checker.check_model(place / "student" / "model.onnx")
    result = run("export {}/student --format safetensors --dtype fp16 --json")
    assert json.loads(result.stdout)["path"] == f"{place}/student/model-fp16.safetensors"
    half = load_file(place / "student" / "model-fp16.safetensors")
    whole = load_file(place / "student" / "model.safetensors")
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], whole[name].half()) for name in whole)


def test_describe_shows_layers_of_both(run, converted):
    found = json.loads(run("describe {}/student --json").stdout)
    assert [layer["kind"] for layer in found["layers"]] == ["gspn2", "gspn2"]
    expected = [layer["errors"][layer["method"]] for layer in converted["layers"]]
    assert [layer["error"] for layer in found["layers"]] == expected
    assert found["cost"]["parameters"] == converted["parameters"]["student"]
    assert f"{expected[0]:.3f}" in run("describe {}/student").stdout
    teacher = json.loads(run("describe {}/teacher --size 32x64 --json").stdout)
    assert [layer["kind"] for layer in teacher["layers"]] == ["attention", "attention"]
    assert teacher["cost"]["grid"] == [4, 8]
    assert "attention" in run("describe {}/teacher").stdout


@pytest.mark.usefixtures("converted")
def test_static_export_runs_what_it_was_made_for(place, run):
    shown = run("export {}/student --static 2,3,32,40 --dtype fp16").stdout
    assert "student/model-fp16-2x3x32x40.onnx" in shown
    assert "free to change: nothing" in shown
    line = "run {}/student/model-fp16-2x3x32x40.onnx --images {}/data/test/ant --no-library --json"
    found = json.loads(run(line).stdout)
    assert found["session"]["inputs"] == ["image: fp16 (2, 3, 32, 40)"]
    assert len(found["results"]) == 4


@pytest.mark.usefixtures("converted")
def test_bench_gives_its_verdict(run):
    found = json.loads(run("bench {}/student --against {}/teacher --sizes 32,32x64 --device cpu --json").stdout)
    assert [(row["height"], row["width"]) for row in found["sizes"]] == [(32, 32), (32, 64)]
    shown = run("bench {}/student --against {}/teacher --sizes 32 --device cpu --batch-size 2").stdout
    assert "Verdict: the student is " in shown


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
    assert "is not empty" in the_error(again)


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
    assert result.stdout.startswith(f"built {path} ({'CPU and CUDA' if has_cuda else 'CPU alone'})\n")
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


DISTILL = "distill --teacher {}/teacher --data {}/data --recipe {}/tiny.yaml --output {}/new "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate", "No such command 'frobnicate' (see gspn2convert -h)"),
        ("distill", "Missing option '--teacher' (see gspn2convert distill -h)"),
        ("distill --teacher {}/teacher", "Missing option '--data'"),
        (DISTILL + "--stages 0,4", "expected some of 0 (fit), 1 (align), 2 (recover), 3 (curriculum)"),
        (DISTILL + "--keep 0,7", "the teacher has 2 blocks"),
        (DISTILL + "--keep 0,1", "keeps all 2 blocks"),
        (DISTILL + "--keep auto:0", "expected 'none', block numbers"),
        (DISTILL + "--keep auto:2", "keep 'auto:2': expected 1 to 1, for the teacher has 2 blocks"),
        (DISTILL + "--keep auto:budget=1.5", "expected a budget above 0 and below 1, such as 0.98"),
        (DISTILL + "--img-size 33", "no multiple of the patch 8x8"),
        (DISTILL + "--teacher vit_tinny", "did you mean vit_tiny"),
        (DISTILL + "--teacher resnet18", "not a plain timm VisionTransformer"),
        (DISTILL + "--teacher-weights {}/other.safetensors", "other.safetensors"),
        (DISTILL + "--teacher-weights {}/half.safetensors", "half.safetensors"),
        (DISTILL + "--teacher-weights {}/pickle.safetensors", "pickle"),
        (DISTILL + "--teacher-weights {}/none.safetensors", "none.safetensors' does not exist"),
        (DISTILL + "--data {}/empty", "no .jpg, .jpeg or .png images in it"),
        (DISTILL + "--data {}/nowhere", "no such file or folder"),
        (DISTILL + "--data {}/broken", "broken"),
        (DISTILL + "--recipe nope", "unknown recipe 'nope'"),
        (DISTILL + "--recipe {}/unknown.yaml", "recipe.mixer"),
        (DISTILL + "--recipe {}/missing.yaml", "recipe: missing field 'align'"),
        (DISTILL + "--recipe {}/typed.yaml", "recipe.align.steps"),
        (DISTILL + "--output {}/data", "not empty"),
        (DISTILL + "--output {}/tiny.yaml", "is a file"),
        ("evaluate {}/student", "Missing option '--data'"),
        ("evaluate {}/student --data {}/data --teacher vit_tinny", "did you mean vit_tiny"),
        ("evaluate {}/student --data {}/data", "say on the command line where it is"),
        ("evaluate {}/teacher --data {}/data", "not converted"),
        ("evaluate {}/student --data {}/data/test --teacher none --knn", "are the very ones to evaluate on"),
        (
            "evaluate {}/student --data {}/data --teacher none --split train --linear",
            "are the very ones to evaluate on",
        ),
        ("evaluate {}/student --data {}/data --teacher none --cka", "leave --cka out"),
        ("evaluate {}/nowhere --data {}/data", "does not exist"),
        ("evaluate {}/empty --data {}/data", "no config.json"),
        ("export {}/student --output {}/tiny.yaml", "tiny.yaml exists"),
        ("export {}/student --output {}/new/model.onnx", "new does not exist"),
        ("export {}/student --size 30 --output {}/x.onnx", "no multiple of the patch"),
        ("export {}/student --size 32 --format safetensors", "--size is for --format onnx"),
        ("export {}/student --static 1,3,32,32 --format safetensors", "--static is for --format onnx"),
        ("export {}/student --static 1,3,32,32 --size 32", "--static names the size already; leave --size out"),
        ("export {}/student --static 3,32,32", "'3,32,32': expected images, channels, height, width"),
        ("export {}/student --static 1,1,32,32 --output {}/x.onnx", "expected one image or more of 3 channels"),
        ("build-ops --include {}/nowhere", "nowhere' does not exist"),
        ("build-ops --include {}/empty", "onnxruntime_cxx_api.h is not in"),
        ("bench {}/student --sizes 224x", "'224x': expected"),
        ("bench {}/student --sizes 0", "expected pixels such as 224"),
        ("bench {}/student --against {}/teacher --sizes 33", "no multiple of the patch"),
        ("describe {}/nowhere", "unknown teacher"),
        ("recipes show nope", "unknown recipe 'nope'"),
    ],
)
@pytest.mark.usefixtures("converted", "bad_inputs")
def test_wrong_use_is_one_line_and_exit_code_2(run, place, line, message):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    result = run(line)
    assert message in the_error(result)
    assert result.exit_code == 2
    assert not result.stdout
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before
    as_json = run(f"{line} --json")
    assert as_json.exit_code == 2
    assert message in json.loads(as_json.stdout)["error"]


@pytest.fixture(scope="module")
def bad_inputs(place):
    """Files that are no good."""
    (place / "empty").mkdir()
    weights = load_file(place / "teacher" / "model.safetensors")
    save_file({name: torch.zeros(7, 7) for name in weights}, place / "other.safetensors")
    whole = (place / "teacher" / "model.safetensors").read_bytes()
    (place / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(weights, place / "pickle.safetensors")
    (place / "broken").mkdir()
    for index in range(40):
        (place / "broken" / f"{index}.png").write_bytes(b"no image")
    (place / "unknown.yaml").write_text(RECIPE.replace("proxy_dim", "proxy"))
    (place / "missing.yaml").write_text(RECIPE.replace("align: {steps: 2, batch_size: 4}\n", ""))
    (place / "typed.yaml").write_text(RECIPE.replace("align: {steps: 2", "align: {steps: two"))


def test_loss_that_becomes_nan_stops_and_keeps_the_checkpoint(place, run):
    (place / "nan.yaml").write_text(RECIPE.replace("align: {steps: 2", "align: {lr: 1.0e+30, steps: 8"))
    result = run("distill --teacher {}/teacher --data {}/data --recipe {}/nan.yaml --output {}/nan")
    assert result.exit_code == 2
    assert "lower the learning rate (recipe.align.lr)" in the_error(result)
    assert [file.name for file in (place / "nan").iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.usefixtures("converted")
def test_cuda_that_is_not_there_is_wrong_use(run):
    result = run("bench {}/student --against {}/teacher --sizes 32 --device cuda")
    if torch.cuda.is_available():
        assert result.exit_code == 0
    else:
        assert "--device cpu" in the_error(result)
        assert result.exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"), 2, "disk full at out/model"),
        (Interrupted("align", 3, 9), 1, "after 3 of 9; resume to go on (the same command with --resume)"),
        (click.Abort(), 1, "interrupted"),
        (click.ClickException("plain words"), 1, "plain words"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two\nlines (internal; --debug shows the traceback)"),
    ],
)
def test_errors_have_their_codes(error, code, message):
    found = explain(error)
    assert found[0] == code
    assert message in found[1]


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(main, ["recipes", "show", "nope", "--debug"])
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown recipe")
    assert result.exit_code == 2


def test_an_internal_error_is_one_line_too(monkeypatch):
    def broken():
        raise KeyError("first\nsecond")

    monkeypatch.setattr("gspn2convert.doctor.report", broken)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert the_error(result) == r"error: KeyError: 'first\nsecond' (internal; --debug shows the traceback)"


@pytest.mark.usefixtures("converted")
def test_output_in_a_pipe_is_plain_and_stdout_holds_results_alone(place):
    arguments = ("--data", place / "data", "--teacher", place / "teacher", "--device", "cpu")
    result = execute("evaluate", place / "student", *arguments)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stdout.startswith("12 images of ")
    assert result.stderr.startswith("device: cpu (")


def test_what_libraries_print_does_not_spoil_the_json(monkeypatch):
    from gspn2convert import doctor

    found = doctor.report()

    def talkative():
        sys.stdout.write("a library says hello\n")
        return found

    monkeypatch.setattr(doctor, "report", talkative)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(result.stdout)["checks"]
    assert "a library says hello" in result.stderr


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m gspn2convert recipes show default | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("# ")
    assert not result.stderr


def test_without_network_the_error_says_how_to_give_weights(tmp_path, place):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    arguments = ("--data", place / "data", "--output", tmp_path / "out")
    result = execute("distill", "--teacher", "vit_tiny", *arguments, env=environment)
    assert result.returncode == 2
    assert "--teacher-weights" in the_error(result)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_training_saves_and_says_how_to_go_on(place, tmp_path):
    (tmp_path / "long.yaml").write_text(RECIPE.replace("align: {steps: 2", "align: {steps: 100000"))
    arguments = ("--data", place / "data", "--recipe", tmp_path / "long.yaml", "--output", tmp_path / "out")
    process = subprocess.Popen(
        [*PROGRAM, "distill", "--teacher", place / "teacher", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("align"):
            process.send_signal(signal.SIGINT)
            break
    *_, last = process.stderr.read().splitlines()
    assert process.wait(timeout=60) == 1
    assert last.startswith("error: stopped in stage align after ")
    assert last.endswith("(the same command with --resume)")
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()

"""What goes wrong on the command line: exit codes, one-line errors, what pipes get."""

import errno
import json
import os
import signal
import subprocess
import sys

import click
import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import gspn2convert
from gspn2convert.cli import explain, main
from gspn2convert.conversion import Conversion
from gspn2convert.interrupt import Interrupted
from gspn2convert.model import Gspn2Vit
from helpers.command_line import PROGRAM, RECIPE, execute, the_error

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
        (DISTILL + "--data {}/empty", "no .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp images in it"),
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
    assert "lower the learning rates (of recipe.align)" in the_error(result)
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
        (OSError(errno.EDQUOT, "Disk quota exceeded", "out/model.onnx"), 2, "disk full at out/model.onnx: make room"),
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


def test_a_run_beside_a_running_one_is_refused(place, run, tmp_path):
    (tmp_path / "long.yaml").write_text(RECIPE.replace("align: {steps: 2", "align: {steps: 100000"))
    line = (
        f"distill --teacher {place}/teacher --data {place}/data --recipe {tmp_path}/long.yaml --output {tmp_path}/out"
    )
    process = subprocess.Popen([*PROGRAM, *line.split()], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while not process.stderr.readline().startswith("align"):
            assert process.poll() is None
        refused = run(f"{line} --resume")
        process.send_signal(signal.SIGINT)
        *_, last = process.stderr.read().splitlines()
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
    assert last.startswith("error: stopped in stage align after ")
    assert refused.exit_code == 2
    assert the_error(refused).startswith(f"error: another run is writing to {tmp_path}/out; let it end or stop it")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize(
    "saved",
    [None, "fit", "align", "recover"],
    ids=["before the fit", "score of the fit", "score of align", "score of the teacher"],
)
def test_ctrl_c_outside_of_the_steps_says_what_is_saved_and_how_to_go_on(run, tmp_path, monkeypatch, saved):
    """In the evaluations between stages and after the last; the same command with --resume then comes to the end."""

    def interrupting(name, when):
        real = getattr(Conversion, name)

        def method(self, *given):
            if when(*given):
                signal.raise_signal(signal.SIGINT)
            return real(self, *given)

        monkeypatch.setattr(Conversion, name, method)

    if saved is None:
        interrupting("_begin", lambda keep: True)
    elif saved == "recover":
        interrupting("_top1", lambda model: not isinstance(model, Gspn2Vit))
    else:
        interrupting("_score", lambda stage, student: stage == saved)
    line = DISTILL.replace("{}/new", f"{tmp_path}/out") + "--device cpu"
    result = run(line)
    assert result.exit_code == 1
    go_on = "resume to go on (the same command with --resume)"
    assert the_error(result) == (
        f"error: stopped; {tmp_path}/out is saved up to the end of stage {saved}; {go_on}"
        if saved
        else "error: stopped before anything was saved; the same command begins again"
    )
    assert (tmp_path / "out" / "checkpoint.safetensors").exists() == bool(saved)
    monkeypatch.undo()
    result = run(f"{line} --resume" if saved else line)
    assert result.exit_code == 0, result.output
    stages = json.loads((tmp_path / "out" / "metrics.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["fit", "align", "recover"]


def test_ctrl_c_after_the_end_says_that_the_model_is_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "end_training", lambda self: signal.raise_signal(signal.SIGINT))
    result = run(DISTILL.replace("{}/new", f"{tmp_path}/out") + "--stages 0 --device cpu")
    assert result.exit_code == 1
    assert the_error(result) == f"error: stopped, but {tmp_path}/out holds a finished model"
    assert gspn2convert.load(tmp_path / "out")


def test_ctrl_c_in_the_demo_says_how_to_start_again(monkeypatch, tmp_path):
    monkeypatch.setattr(Conversion, "_begin", lambda self, keep: signal.raise_signal(signal.SIGINT))
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert result.exit_code == 1
    assert the_error(result) == "error: the demo was stopped; nothing was written, so start it again"

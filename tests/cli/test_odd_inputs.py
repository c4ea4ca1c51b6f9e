"""What is legal but odd, and what no machine can do: sizes, names, outputs, configs that were changed by hand."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gspn2convert.cli import explain
from gspn2convert.errors import UserError
from gspn2convert.image_files import open_files
from gspn2convert.images import UnreadableImage
from gspn2convert.teachers import load_teacher
from helpers.command_line import PROGRAM, the_error


@pytest.mark.parametrize(
    "line",
    [
        "bench {}/student --against {}/teacher --sizes 32,1000000000",
        "export {}/student --size 65552 --output {}/x.onnx",
        "export {}/student --static 1,3,32,65552 --output {}/x.onnx",
        "describe {}/student --size 1000000000",
        "distill --teacher {}/teacher --data {}/data --img-size 1000000000 --output {}/large",
    ],
)
@pytest.mark.usefixtures("converted")
def test_a_size_that_no_model_can_have_is_wrong_use(run, line):
    result = run(line)
    assert result.exit_code == 2
    assert "65536" in the_error(result)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("distill", "--teacher", "demo", "--data", "", "--dry-run"), "--data"),
        (("distill", "--teacher", "demo", "--recipe=", "--dry-run"), "--recipe"),
        (("evaluate", "{}/student", "--data", ""), "--data"),
        (("run", "{}/model.onnx", "--images", ""), "--images"),
        (("export", "{}/student", "--output", ""), "--output"),
        (("demo", "--output", ""), "--output"),
        (("describe", ""), "an argument"),
    ],
)
@pytest.mark.usefixtures("converted")
def test_an_empty_value_is_no_value(place, run_cli, arguments, option):
    result = run_cli(*(one.replace("{}", str(place)) for one in arguments))
    assert result.exit_code == 2
    assert f"{option} is given, but empty; give a value, or leave it out" in the_error(result)


@pytest.mark.parametrize("data", [("--data=wds/x:https://h/x.tar?sign=Zm8=",), ("--data", "--x="), ("--json",)])
def test_a_value_that_ends_in_an_equals_sign_is_not_empty(run_cli, data):
    result = run_cli("distill", "--teacher", "demo", "--dry-run", *data)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("kind", "name"), [("onnx", "x.safetensors"), ("safetensors", "x.ONNX")])
@pytest.mark.usefixtures("converted")
def test_an_output_named_as_the_other_format_is_refused(run, tmp_path, kind, name):
    result = run(f"export {{}}/student --format {kind} --output {tmp_path}/{name}")
    assert result.exit_code == 2
    assert f"and --format is {kind}; change one of them" in the_error(result)
    assert not (tmp_path / name).exists()


@pytest.mark.usefixtures("converted")
def test_another_vit_is_not_called_the_teacher(run):
    shown = run("bench {}/student --against vit_tiny --sizes 32").stdout.splitlines()
    assert [line.split()[1] for line in shown if line.startswith(" 32x32")] == ["vit_tiny", "student"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: take smaller images or fewer at a time (MemoryError)"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried\nException raised from x"),
            "out of memory: take smaller images or fewer at a time ([enforce] DefaultCPUAllocator: can't allocate "
            "memory: you tried)",
        ),
    ],
)
def test_out_of_memory_says_what_to_do(error, message):
    assert explain(error) == (2, message)


def test_calls_in_cpp_are_left_out():
    code, message = explain(RuntimeError("no such thing\nException raised from f at g.cpp:1\nframe #0: h"))
    assert (code, message) == (1, "RuntimeError: no such thing (internal; --debug shows the traceback)")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("pretrained_cfg", "mean"), "x", "mean is 'x', expected a list of numbers"),
        (("pretrained_cfg", "mean"), [0.5, float("nan"), 0.5], "mean is [0.5, nan, 0.5], expected a list of numbers"),
        (("pretrained_cfg", "std"), [0.5, 0, 0.5], "std is [0.5, 0, 0.5], expected numbers above 0"),
        (("pretrained_cfg", "interpolation"), "x", "interpolation is 'x', expected a name such as bicubic"),
        (("pretrained_cfg", "crop_pct"), -1, "crop_pct is -1, expected a number above 0"),
        (("pretrained_cfg", "crop_mode"), None, "crop_mode is None, expected one of center, squash, border"),
        (("model_args", "mixer", "segment"), 10**30, "expected exact or pool, and 0 to 2^31 - 1 lines"),
        (("model_args", "base"), None, "describes no model"),
        (("model_args",), [], "model_args is no JSON object"),
        (("architecture",), None, "it names no architecture"),
    ],
)
@pytest.mark.usefixtures("converted")
def test_a_config_that_was_changed_by_hand_is_told_by_its_field(place, tmp_path, run, where, value, message):
    shutil.copytree(place / "student", tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    *path, last = where
    part = config
    for name in path:
        part = part[name]
    part[last] = value
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    for line in (
        f"describe {tmp_path}/student",
        f"evaluate {tmp_path}/student --data {{}}/data --teacher {{}}/teacher",
    ):
        result = run(line)
        assert result.exit_code == 2
        assert message in the_error(result)


@pytest.mark.usefixtures("converted")
def test_bench_takes_the_models_own_size_and_twice_that_unless_told_otherwise(run):
    result = run("bench {}/student --against {}/teacher --json --device cpu")
    sizes = [(one["height"], one["width"]) for one in json.loads(result.stdout)["sizes"]]
    assert sizes == [(32, 32), (64, 64)]


def test_a_teacher_without_a_name():
    with pytest.raises(UserError, match="the teacher's name is empty; give demo, an alias such as vit_base"):
        load_teacher("")


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, '"x"'])
def test_a_config_that_is_no_object(tmp_path, run, text):
    (tmp_path / "config.json").write_text(text)
    result = run(f"export {tmp_path}")
    assert result.exit_code == 2
    assert "config.json cannot be read: it is no config of a timm model" in the_error(result)


@pytest.mark.usefixtures("converted")
def test_nothing_to_measure_is_said(place, tmp_path, run):
    Image.new("RGB", (40, 40), (9, 99, 9)).save(tmp_path / "one.png")
    result = run(f"evaluate {{}}/student --data {tmp_path} --teacher none")
    assert result.exit_code == 2
    assert "has no labels, and without a teacher nothing can be measured" in the_error(result)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_stdout_is_one_sentence(place, as_json):
    with Path("/dev/full").open("w") as full:
        line = [*PROGRAM, "describe", place / "student", *as_json]
        result = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: disk full")


def test_of_several_processes_the_first_writes_the_document(tmp_path):
    line = [*PROGRAM, "export", tmp_path, "--json"]
    found = [
        subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | {"RANK": rank})
        for rank in ("0", "1")
    ]
    assert [one.returncode for one in found] == [2, 2]
    assert "no config.json" in json.loads(found[0].stdout)["error"]
    assert found[1].stdout == ""
    assert found[0].stderr == found[1].stderr


def test_pictures_of_floating_point_numbers_are_not_read(tmp_path):
    ramp = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    Image.fromarray(ramp).save(tmp_path / "one.tif")
    with pytest.raises(UnreadableImage, match="floating point numbers, of which nobody says what is white"):
        open_files([str(tmp_path / "one.tif")], in_chans=3).image(0)

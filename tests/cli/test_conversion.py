"""A conversion by the command line: distill, evaluate, export, describe and bench, and JSON that parses."""

import json
import os
import shutil
import signal
import subprocess
import sys

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from gspn2convert.checkpoint import FILE_NAME
from helpers.command_line import PROGRAM, the_error

DISTILL = "distill --teacher {}/teacher --data {}/data --recipe {}/tiny.yaml --output "


def test_distill_reports_every_stage(place, converted):
    assert [stage["stage"] for stage in converted["stages"]] == ["fit", "align", "recover"]
    assert all(0 <= stage["top1"] <= 1 and 0 < stage["patch_cosine"] <= 1 for stage in converted["stages"])
    assert len(converted["layers"]) == 2
    stored = json.loads((place / "student" / "metrics.json").read_text())
    assert {**stored, "output": f"{place}/student"} == converted


def test_distill_shows_a_table(place, run):
    result = run(f"{DISTILL}{{}}/fit --stages 0")
    assert result.exit_code == 0, result.output
    titles, row, *_ = result.stdout.splitlines()
    assert titles.split() == "after stage seconds patch cosine prefix cosine agreement top-1".split()
    assert row.split()[0] == "fit"
    metrics = json.loads((place / "fit" / "metrics.json").read_text())
    assert row.split()[2] == f"{metrics['stages'][0]['patch_cosine']:.4f}"


def test_a_finished_run_is_told_once_more(run, tmp_path):
    line = f"{DISTILL}{tmp_path}/fit --stages 0"
    first, second = run(line), run(f"{line} --resume")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "fit is finished already, nothing to resume" in second.stderr
    assert second.stdout == first.stdout
    assert second.stdout.splitlines()[-1].startswith(f"the student is in {tmp_path}/fit; next: ")


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)], ids=str)
def test_labels_of_others_are_told_once(place, run, tmp_path, splits):
    for split in splits:
        for theirs, name in (("ant", "dog"), ("bee", "eel")):
            shutil.copytree(place / "data" / split / theirs, tmp_path / "data" / split / name)
    line = f"distill --teacher {{}}/teacher --recipe {{}}/tiny.yaml --data {tmp_path}/data --output {tmp_path}/out"
    result = run(f"{line} --stages 0 --device cpu")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no top-1: the data's 2 labels (dog, ...) are not the model's 3 classes") == 1


def test_top1_of_images_that_are_trained_on_is_called_that(place, run, tmp_path):
    shutil.copytree(place / "data" / "train", tmp_path / "data" / "train")
    line = f"distill --teacher {{}}/teacher --recipe {{}}/tiny.yaml --output {tmp_path}/out --stages 0 --device cpu"
    told = "has no test split: top-1 will be that of images which are trained on"
    assert run(f"{line} --data {tmp_path}/data").stderr.count(told) == 1
    assert told not in run(f"{line.replace('/out', '/other')} --data {{}}/data").stderr


def test_the_result_says_which_student_it_came_from(run, tmp_path):
    assert run(f"{DISTILL}{tmp_path}/fit --stages 0").exit_code == 0
    result = run(f"{DISTILL}{tmp_path}/on --student {tmp_path}/fit --stages 1 --device cpu")
    assert result.exit_code == 0, result.output
    fit, metrics = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("fit", "on"))
    assert (fit["started_from"], metrics["started_from"]) == (None, "fit")
    assert [row.split()[0] for row in result.stdout.splitlines()[1:3]] == ["given", "align"]
    top1 = f"the teacher's top-1 is {100 * metrics['teacher_top1']:.2f} %"
    assert f"\nwent on from fit; {top1}\nthe student is in " in result.stdout
    given = metrics["stages"][0]
    assert (given["stage"], given["cosine"]) == ("fit", fit["stages"][0]["cosine"])
    assert f"the given student: prefix_cosine {given['prefix_cosine']:.4f}, " in result.stderr
    cards = [(tmp_path / name / "README.md").read_text() for name in ("fit", "on")]
    assert ["| started_from | fit |" in card for card in cards] == [False, True]


def test_a_random_start_is_called_one(run, tmp_path):
    result = run(f"{DISTILL}{tmp_path}/out --stages 1 --device cpu")
    assert result.exit_code == 0, result.output
    assert [row.split()[0] for row in result.stdout.splitlines()[1:3]] == ["random", "align"]
    assert "\nmean error of the random start " in result.stdout
    assert "the random start: prefix_cosine " in result.stderr


def test_a_finished_run_from_another_student_is_not_taken_for_what_is_asked(run, tmp_path):
    for name in ("fit", "other"):
        assert run(f"{DISTILL}{tmp_path}/{name} --stages 0").exit_code == 0
    line, fit = f"{DISTILL}{tmp_path}/on --stages 1", f"--student {tmp_path}/fit"
    made = run(f"{line} {fit} --json")
    before = (tmp_path / "on" / "metrics.json").read_bytes()
    resumed = run(f"{line} {fit} --json --resume")
    assert (made.exit_code, resumed.exit_code) == (0, 0)
    assert json.loads(resumed.stdout) == json.loads(made.stdout)
    for student, name in ((f"--student {tmp_path}/other", "other"), ("", "none")):
        refused = run(f"{line} {student} --resume")
        assert refused.exit_code == 2
        assert f"on is finished, with student fit and not {name}; name another folder" in the_error(refused)
    assert (tmp_path / "on" / "metrics.json").read_bytes() == before


def test_distill_shows_the_blocks_that_were_chosen(place, run):
    line = f"{DISTILL}{{}}/auto --stages 0 --keep auto:1"
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


def test_sigterm_to_the_whole_group_saves_though_workers_get_it_too(place, tmp_path):
    recipe = (place / "tiny.yaml").read_text().replace("align: {steps: 2,", "align: {steps: 5000,")
    (tmp_path / "long.yaml").write_text(recipe)
    line = f"distill --teacher {place}/teacher --data {place}/data --recipe {tmp_path}/long.yaml --device cpu"
    process = subprocess.Popen(
        [*PROGRAM, *line.split(), "--workers", "2", "--output", tmp_path / "out"],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for shown in process.stderr:
        if shown.startswith("align"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 1, rest
    assert "stopped in stage align after" in rest
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]


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
    assert result.stdout.count(f"the student is in {tmp_path}/out") == 1


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
def test_evaluate_refuses_another_teacher_of_the_same_name(place, run, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "teacher" / name).write_bytes((place / "teacher" / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    line = "evaluate {}/student --data {}/data --device cpu --json"
    own = json.loads(run(line).stdout)
    weights = load_file("teacher/model.safetensors")
    weights["norm.bias"] += 1.0
    save_file(weights, "teacher/model.safetensors")
    result = run(line)
    assert result.exit_code == 2
    told = "it came from teacher, which had other weights; give its own by --teacher-weights, or compare with these by"
    assert told in json.loads(result.stdout)["error"]
    other = json.loads(run(f"{line} --teacher {tmp_path}/teacher").stdout)
    assert other["patch_cosine"]["mean"] < own["patch_cosine"]["mean"] - 0.01


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
    assert [layer["regions"] for layer in found["layers"]] == [0, 0]
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

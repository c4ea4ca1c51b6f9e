"""Folders that are there already: finished runs, runs that were stopped, and what is none of either."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from gspn2convert.artifact import load
from gspn2convert.checkpoint import FILE_NAME
from gspn2convert.distill import Options, distill_student
from gspn2convert.errors import UserError
from gspn2convert.images import ImageSet
from gspn2convert.interrupt import Interrupted
from gspn2convert.recipe import parse_recipe
from helpers.conversions import FILES, LABELS, RECIPE, Pictures, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_teachers_folder_is_not_taken_for_a_finished_run(run, tmp_path, teacher):
    save_for_hf(teacher, tmp_path / "out", safe_serialization=True)
    before = snapshot(tmp_path / "out")
    with pytest.raises(UserError, match="holds files, but no run to resume"):
        run(resume=True)
    assert snapshot(tmp_path / "out") == before


def test_what_a_killed_write_leaves_is_no_obstacle(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{FILE_NAME}.part").write_bytes(b"half")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / f".{FILE_NAME}.part").write_bytes(b"half")
    run(stages=(0,))
    run(stages=(0,), resume=True, output=tmp_path / "again")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert same_bits(*weights)


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    metrics = run()
    before = snapshot(tmp_path / "out")
    pictures = Pictures()
    assert run(resume=True, pictures=pictures) == metrics
    assert snapshot(tmp_path / "out") == before
    assert pictures.read_in_order == []


def test_a_finished_run_of_something_else_is_not_taken_for_what_is_asked(run, teacher, tmp_path):
    run(stages=(0,))
    before = snapshot(tmp_path / "out")
    sets = {name: ImageSet(name, Pictures()) for name in ("pictures", "others")}
    how = Options(output=tmp_path / "out", device="cpu", quiet=True, stages=(0,), resume=True)
    asked = (("pictures", "small", "teacher tiny and not small"), ("others", "tiny", "data pictures and not others"))
    for images, name, words in asked:
        with pytest.raises(UserError, match=f"is finished, with {words}; name another folder, and to go on from this"):
            distill_student(
                *(teacher, parse_recipe(RECIPE, "test"), sets[images], sets["pictures"], how), teacher_name=name
            )
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": RECIPE + "seed: 1"}, "another recipe"),
        ({"keep": (0,)}, "keep none and not 0"),
        ({"stages": (0, 1)}, "stages 0 and not 0,1"),
    ],
    ids=("recipe", "keep", "stages"),
)
def test_a_finished_run_by_another_recipe_is_not_taken_for_it(run, tmp_path, change, words):
    run(stages=(0,))
    before = snapshot(tmp_path / "out")
    with pytest.raises(UserError, match=f"is finished, with {words}; name another folder"):
        run(**{"stages": (0,), "resume": True, **change})
    assert snapshot(tmp_path / "out") == before


def test_how_the_recipe_of_a_finished_run_differs_is_told(run, tmp_path):
    run(stages=(0,))
    other = RECIPE.replace("ema: 0.5", "ema: 0.6")
    told = re.escape(f"--student {tmp_path}/out (recipe.recover.ema was 0.5 and is 0.6 now)")
    with pytest.raises(UserError, match=f"is finished, with another recipe; .*{told}$"):
        run(other, stages=(0,), resume=True)
    (tmp_path / "out" / "recipe.yaml").write_text("name: [")
    with pytest.raises(
        UserError, match="is finished, with another recipe; .*recipe.name was nothing and is 'tiny' now"
    ):
        run(other, stages=(0,), resume=True)


@pytest.fixture
def stopped(run, tmp_path):
    """The folder of a run that SIGTERM stopped in align."""
    with pytest.raises(Interrupted, match="stopped in stage align after 2 of 6; resume to go on"):
        run(pictures=Pictures(terminate_at_read=12 + 32 + 8 + 4 + 1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]
    return tmp_path / "out"


@pytest.mark.parametrize("command", ["describe OUT", "export OUT", "evaluate OUT --data demo", "bench OUT"])
def test_of_a_stopped_run_every_command_says_how_to_go_on(run_cli, stopped, command):
    before = snapshot(stopped)
    result = run_cli(*command.replace("OUT", str(stopped)).split())
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {stopped} holds an unfinished conversion (saved up to step 2 of stage align) and no model yet; "
        f"if no run is at work there, go on with: gspn2convert distill --teacher tiny --data pictures "
        f"--output {stopped} --resume, "
        "and what else the run was started with, such as its recipe\n"
    )
    assert snapshot(stopped) == before


def test_the_way_to_go_on_names_what_the_checkpoint_knows(run, tmp_path):
    with pytest.raises(Interrupted):
        run(pictures=Pictures(terminate_at_read=12 + 32 + 8 + 4 + 1), stages=(0, 1), precision="bf16", keep=(1,))
    told = (
        "--teacher tiny --data pictures --keep 1 --stages 0,1 --precision bf16 --output .*out --resume, and what else"
    )
    with pytest.raises(UserError, match=f"saved up to step 2 of stage align.*{told}"):
        load(tmp_path / "out")
    (tmp_path / "out" / FILE_NAME).write_bytes(b"damaged")
    told = "out holds no model, and a checkpoint that this version cannot read; restore .*/checkpoint.safetensors from"
    with pytest.raises(UserError, match=told):
        load(tmp_path / "out")


def test_a_stopped_run_goes_on_to_the_same_end(run, stopped, tmp_path):
    resumed = run(resume=True)
    undisturbed = run(output=tmp_path / "undisturbed")
    assert (stopped / "model.safetensors").read_bytes() == (tmp_path / "undisturbed/model.safetensors").read_bytes()
    for key in ("layers", "fit_error", "parameters"):
        assert resumed[key] == undisturbed[key]
    for ours, theirs in zip(resumed["stages"], undisturbed["stages"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert sorted(path.name for path in stopped.iterdir()) == FILES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": RECIPE.replace("ema: 0.5", "ema: 0.6")}, "recipe"),
        ({"recipe": RECIPE + "seed: 1"}, "recipe"),
        ({"keep": (0,)}, "keep"),
        ({"stages": (0, 1)}, "stages"),
        ({"precision": "bf16"}, "precision"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stopped_run_does_not_go_on_as_another(run, stopped, change, named):
    before = snapshot(stopped)
    with pytest.raises(UserError, match=f"started with different {named}; resume with what it was started with"):
        run(**{"resume": True, **change})
    assert snapshot(stopped) == before


def test_a_stopped_run_does_not_go_on_with_other_images_or_another_teacher(teacher, stopped):
    before = snapshot(stopped)
    sets = [ImageSet("others", Pictures()), ImageSet("test", Pictures(20, seed=1))]
    how = Options(output=stopped, device="cpu", quiet=True, resume=True)
    with pytest.raises(UserError, match="started with different data, teacher;"):
        distill_student(teacher, parse_recipe(RECIPE, "test"), *sets, how, teacher_name="another")
    changed = copy.deepcopy(teacher)
    changed.norm.bias.data[0] += 1e-3
    with pytest.raises(UserError, match="started with different data, teacher, teacher weights;"):
        distill_student(changed, parse_recipe(RECIPE, "test"), *sets, how, teacher_name="another")
    assert snapshot(stopped) == before


def test_a_stopped_run_is_not_overwritten_without_resume(run, stopped):
    before = snapshot(stopped)
    with pytest.raises(UserError, match="not empty; name another, or go on with a stopped run by --resume"):
        run()
    assert snapshot(stopped) == before


def test_a_damaged_checkpoint_is_named(run, stopped):
    path = stopped / FILE_NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{FILE_NAME}: not a readable checkpoint"):
        run(resume=True)
    assert path.stat().st_size == 1000


def test_a_loss_that_becomes_nan_ends_the_command_and_keeps_the_checkpoint(run_cli, teacher, tmp_path):
    save_for_hf(teacher, tmp_path / "teacher", safe_serialization=True, model_args=teacher._model_args)
    for index, picture in enumerate(Pictures(30).images):
        (tmp_path / "data" / LABELS[index % 5]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / LABELS[index % 5] / f"{index}.png")
    (tmp_path / "nan.yaml").write_text(RECIPE.replace("ema: 0.5", "mixer_lr: 1.0e+20"))
    arguments = ("--recipe", tmp_path / "nan.yaml", "--data", tmp_path / "data", "--output", tmp_path / "out")
    result = run_cli("distill", "--teacher", tmp_path / "teacher", *arguments, "--device", "cpu")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert "at stage recover step" in last
    assert "the last good checkpoint (stage align, step 6) is kept; lower the learning rate" in last
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]
    weights = load_file(tmp_path / "out" / FILE_NAME)
    assert weights
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_stopped_run_does_not_go_on_when_an_image_has_gone(run, stopped):
    before = snapshot(stopped)
    pictures = Pictures()
    names = pictures.where
    pictures.where = lambda index: "renamed" if index == 3 else names(index)
    with pytest.raises(UserError, match="started with different list of images; resume with what it was started with"):
        run(resume=True, pictures=pictures)
    assert snapshot(stopped) == before


def test_damaged_metrics_of_a_finished_run_are_told(run, tmp_path):
    run(stages=(0,))
    for text in ("", '{"a": 1}', "[]"):
        (tmp_path / "out" / "metrics.json").write_text(text)
        with pytest.raises(UserError, match="metrics.json is damaged .*; name another folder"):
            run(stages=(0,), resume=True)

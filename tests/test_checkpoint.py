"""The checkpoint file: what goes in comes out, and nothing else is taken for one."""

import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from gspn2convert.checkpoint import FILE_NAME, CheckpointStore
from gspn2convert.errors import UserError

IDENTITY = {"recipe": "name: a", "teacher": "demo"}
TENSORS = {
    "student.w": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "stage.mean": torch.arange(3.0).t(),
    "ema.w": torch.ones(3, 5).t(),
    "optimizer.w.step": torch.tensor(7.0),
}


@pytest.fixture
def written(tmp_path):
    store = CheckpointStore(tmp_path, IDENTITY)
    store.finished += ["convert", "align"]
    store.history.append({"stage": "align", "step": 3, "loss": 0.1 + 0.2})
    store.seconds_spent["align"] = 1.25
    store.notes["layers"] = [{"layer": 0, "error": 0.3}]
    store.scaler = {"scale": 1024.0}
    store.save("recover", 12, TENSORS)
    return tmp_path / FILE_NAME


def load(path, identity=IDENTITY):
    store = CheckpointStore(path.parent, identity)
    return store, store.load()


def test_everything_comes_back(written):
    store, found = load(written)
    assert found
    assert (store.stage, store.step, store.finished) == ("recover", 12, ["convert", "align"])
    assert store.history == [{"stage": "align", "step": 3, "loss": 0.1 + 0.2}]
    assert store.seconds_spent == {"align": 1.25}
    assert store.notes == {"layers": [{"layer": 0, "error": 0.3}]}
    assert store.scaler == {"scale": 1024.0}
    assert set(store.tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(store.tensors[name], value)
    assert torch.equal(store.part("student.")["w"], TENSORS["student.w"])
    assert list(written.parent.iterdir()) == [written]


def test_the_same_content_gives_the_same_bytes(written):
    before = written.read_bytes()
    store, _ = load(written)
    store.save(store.stage, store.step, dict(reversed(store.tensors.items())))
    assert written.read_bytes() == before


def test_without_a_file_nothing_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path, IDENTITY)
    assert store.load() is False
    assert (store.stage, store.step, store.finished) == ("", 0, [])


def test_another_run_is_refused_by_what_differs(written):
    before = written.read_bytes()
    with pytest.raises(UserError, match="different recipe; resume with"):
        load(written, IDENTITY | {"recipe": "name: b"})
    with pytest.raises(UserError, match="different data, teacher; resume with"):
        load(written, {"recipe": "name: a", "data": "x"})
    assert written.read_bytes() == before


def test_of_what_differs_the_first_fields_are_told_with_both_values(tmp_path):
    recipe = "name: a\nrecover: {ema: 0.5, losses: {kl: 1.0}}\naugment: {scale: [0.4, 1.0]}\n"
    before = IDENTITY | {"recipe": recipe, "student": "0a1b", "keep": ""}
    CheckpointStore(tmp_path, before).save("align", 1, TENSORS)

    def told(**now):
        with pytest.raises(UserError) as error:
            load(tmp_path / FILE_NAME, before | now)
        return str(error.value).partition(" or choose another output folder")[2]

    assert told(recipe=recipe.replace("0.5", "0.6")) == " (recipe.recover.ema was 0.5 and is 0.6 now)"
    assert (
        told(keep="0,3", teacher="small")
        == " (teacher was 'demo' and is 'small' now; keep was 'none' and is '0,3' now)"
    )
    other = "name: b\nrecover: {losses: {kl: 2.0}}\naugment: {scale: [0.5, 1.0]}\n"
    assert told(recipe=other, keep="0") == (
        " (recipe.name was 'a' and is 'b' now; recipe.recover.ema was 0.5 and is nothing now; "
        "recipe.recover.losses.kl was 1.0 and is 2.0 now; and 2 more)"
    )
    student = " (student was 'one of fingerprint 0a1b' and is "
    assert told(student="ff" * 8) == f"{student}'one of fingerprint ffffffff' now)"
    assert told(student="") == f"{student}'none' now)"


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1000, -1])
def test_a_truncated_file_is_refused(written, size):
    content = written.read_bytes()
    written.write_bytes(content[:size])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(written)


@pytest.mark.parametrize(
    "content", [bytes(4096), random.Random(0).randbytes(4096), b"{}" * 2048], ids=["zeros", "random", "braces"]
)
def test_other_bytes_are_refused(written, content):
    written.write_bytes(content)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(written)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_pickle_is_refused_and_not_run(written, dump):
    with written.open("wb") as file:
        dump(Trap(written.parent / "trap"), file)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(written)
    assert not (written.parent / "trap").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"gspn2convert.checkpoint.0": "{}"}])
def test_weights_that_are_no_checkpoint_are_refused(written, metadata):
    save_file({"w": torch.ones(2)}, written, metadata)
    with pytest.raises(UserError, match="no checkpoint of this version"):
        load(written)


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UserError, match="not a readable checkpoint"):
        CheckpointStore(tmp_path, IDENTITY).load()


def test_the_folder_is_made_or_the_reason_given(tmp_path):
    store = CheckpointStore(tmp_path / "a" / "b", IDENTITY)
    store.save("align", 1, TENSORS)
    assert load(store.path)[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        CheckpointStore(tmp_path / "file" / "b", IDENTITY).save("align", 1, TENSORS)


def test_only_the_main_process_writes(tmp_path):
    store = CheckpointStore(tmp_path, IDENTITY, main=False)
    store.save("align", 1, TENSORS)
    assert not (tmp_path / FILE_NAME).exists()
    assert (store.stage, store.step) == ("align", 1)


def test_due_after_so_many_steps_or_seconds(written):
    by_steps = CheckpointStore(written.parent, IDENTITY, every=4, seconds=1e9)
    assert [step for step in range(1, 9) if by_steps.due(step)] == [4, 5, 6, 7, 8]
    by_steps.save("align", 4, TENSORS)
    by_steps.share = float("inf")
    assert [step for step in range(5, 10) if by_steps.due(step)] == [8, 9]
    assert not CheckpointStore(written.parent, IDENTITY, every=100, seconds=1e9).due(99)
    assert CheckpointStore(written.parent, IDENTITY, every=100, seconds=0.0).due(1)


def test_not_due_while_writing_would_take_most_of_the_time(tmp_path):
    store = CheckpointStore(tmp_path, IDENTITY, every=1, seconds=0.0, share=1e-9)
    assert store.due(1)
    store.save("align", 1, TENSORS)
    assert not store.due(100)


def test_a_finished_stage_leaves_the_student_alone(tmp_path):
    store = CheckpointStore(tmp_path, IDENTITY)
    student = torch.nn.Linear(2, 3)
    store.finish("align", 60, student)
    other = CheckpointStore(tmp_path, IDENTITY)
    assert other.load()
    assert (other.stage, other.step, other.finished) == ("align", 60, ["align"])
    assert sorted(other.tensors) == ["student.bias", "student.weight"]
    assert torch.equal(other.part("student.")["weight"], student.weight)

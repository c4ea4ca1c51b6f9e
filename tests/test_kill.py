"""A conversion that is killed and resumed, again and again, ends with the same bytes as one that is not.

Run as a script, this file is a process that holds one small conversion ready and forks a child for every attempt
at it, so that an attempt costs no imports.
"""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from gspn2convert.checkpoint import FILE_NAME, KEY
from gspn2convert.distill import Options, distill_student
from gspn2convert.images import ImageSet
from gspn2convert.interrupt import Interrupted
from gspn2convert.recipe import parse_recipe
from helpers.conversions import FILES
from helpers.processes import environment

RECIPE = """
name: killed
mixer: {proxy_dim: 8}
fit: {images: 40, held_out: 8, batch_size: 8}
align: {steps: 70, batch_size: 2}
recover: {steps: 70, batch_size: 2, ema: 0.9}
held_out: 8
eval_every: 35
"""
BEFORE_TRAINING = 8 + 40 + 8  # images read: held out, for the fit, held out from the fit
INTERRUPTED = 3
KILLS = 10
# What differs from run to run: how long things took, and when.
TIMES = ("seconds", "images_per_second", "environment")


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: its exit status, negative for a signal, and the seconds that it took."""

    status: int
    seconds: float


class Attempts:
    """The script of this file in a process of its own; each call is one attempt."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, folder, **how):
        """Start or resume the conversion in a folder; `how` is for `attempt`, but `kill_after` seconds."""
        self._process.stdin.write(json.dumps({"folder": str(folder), **how}) + "\n")
        self._process.stdin.flush()
        return Ending(**json.loads(self._process.stdout.readline()))

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def attempts():
    process = Attempts()
    yield process
    process.close()


@pytest.fixture(scope="module")
def undisturbed(attempts, tmp_path_factory):
    """The folder of a run that nothing disturbed, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    ending = attempts(folder)
    assert ending.status == 0
    assert sorted(path.name for path in folder.iterdir()) == FILES
    return folder, ending.seconds


def progress(folder):
    """Stage and step of the checkpoint, and the stages that are finished."""
    if not (folder / FILE_NAME).exists():
        return "", 0, []
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        record = json.loads(file.metadata()[KEY])
    return record["stage"], record["step"], record["finished"]


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def assert_same_end(folder, expected):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = (timeless(json.loads((each / "metrics.json").read_text())) for each in (folder, expected))
    assert ours == theirs


def test_killed_at_random_moments(tmp_path, attempts, undisturbed):
    expected, longest = undisturbed
    dice, kills = random.Random(0), []
    folder = tmp_path / "out"
    # Where a run gets through between two kills, its end is compared and the next one starts. Kills come sooner then:
    # a machine that has become faster since the undisturbed run would get through every time.
    while len(kills) < KILLS or folder.exists():
        delay = dice.uniform(0, longest) if len(kills) < KILLS else None
        if attempts(folder, kill_after=delay).status == -signal.SIGKILL:
            kills.append((delay, *progress(folder)))
            # Killed before its first write, a run leaves nothing; it is resumed all the same.
            folder.mkdir(exist_ok=True)
        else:
            assert_same_end(folder, expected)
            shutil.rmtree(folder)
            longest *= 0.8


def test_killed_in_every_write(tmp_path, attempts, undisturbed):
    expected, _ = undisturbed
    folder, seen = tmp_path / "out", []
    # An attempt gets one checkpoint further than the one before it and dies while it writes the next.
    while "recover" not in progress(folder)[2]:
        assert attempts(folder, die_at_write=2 if seen else 1).status == -signal.SIGKILL
        seen.append(progress(folder))
        assert len(seen) < 30
    assert [("", 0, []), ("fit", 0, ["fit"])] == seen[:2]
    assert {"align", "recover"} <= {stage for stage, *_ in seen}
    for number in range(1, len(FILES) + 1):
        assert attempts(folder, die_at_write=number).status == -signal.SIGKILL
        assert not (folder / "config.json").exists()
        for name in {"model.safetensors", "recipe.yaml"} & {path.name for path in folder.iterdir()}:
            assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert attempts(folder).status == 0
    assert_same_end(folder, expected)


def test_killed_between_the_last_write_and_tidying_up(tmp_path, attempts, undisturbed):
    expected, _ = undisturbed
    folder = tmp_path / "out"
    assert attempts(folder, die_at_unlink=True).status == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, FILE_NAME])
    assert attempts(folder).status == 0
    assert_same_end(folder, expected)


def test_sigterm_is_heard_in_every_stage(tmp_path, attempts, undisturbed):
    expected, _ = undisturbed
    folder = tmp_path / "out"
    # In the fit there is nothing to save.
    assert attempts(folder, terminate_at_read=20).status == INTERRUPTED
    assert progress(folder) == ("", 0, [])
    # The 31st step of align is asked to be the last, and is finished before it is saved.
    assert attempts(folder, terminate_at_read=BEFORE_TRAINING + 2 * 30 + 1).status == INTERRUPTED
    assert progress(folder) == ("align", 31, ["fit"])
    # A resumed run reads the held-out images and goes on with the next step.
    assert attempts(folder, terminate_at_read=8 + 2 * (70 - 31) + 2 * 20 + 1).status == INTERRUPTED
    assert progress(folder) == ("recover", 21, ["fit", "align"])
    assert attempts(folder).status == 0
    assert_same_end(folder, expected)


def test_a_finished_run_is_not_touched_by_resuming_it(attempts, undisturbed):
    folder, _ = undisturbed
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert attempts(folder).status == 0
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


class Blots:
    """Soft random pictures in memory; the one at a chosen read ends the process as if a user did."""

    label_names = ("light", "dark")

    def __init__(self, count, seed, terminate_at_read=None):
        noise = np.random.default_rng(seed)
        small = [Image.fromarray(noise.integers(0, 256, (2, 3, 3), dtype=np.uint8)) for _ in range(count)]
        self._images = [image.resize((24, 16), Image.Resampling.BICUBIC) for image in small]
        self._terminate_at_read, self._reads = terminate_at_read, 0

    def __len__(self):
        return len(self._images)

    def read(self, index):
        self._reads += 1
        if self._reads == self._terminate_at_read:
            signal.raise_signal(signal.SIGTERM)
        return self._images[index], index % 2

    def where(self, index):
        return f"blot {index}"


def make_teacher():
    torch.manual_seed(0)
    sizes = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    teacher = timm.create_model("vit_tiny_patch16_224", **sizes)
    teacher._model_args = sizes  # timm before 1.0.31 does not note them
    return teacher.eval()


def die_instead(module, name, number):
    """Let the process be killed where it would call `module.name` for the given time."""
    real, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, name, call)


def attempt(teacher, folder, *, terminate_at_read=None, die_at_write=None, die_at_unlink=False):
    """Convert in this process; returns its exit status."""
    if die_at_write:
        die_instead(os, "replace", die_at_write)  # the new file is written, and not yet in its place
    if die_at_unlink:
        die_instead(Path, "unlink", 1)
    images, test = Blots(60, 0, terminate_at_read), Blots(10, 1)
    options = Options(output=folder, device="cpu", resume=folder.exists(), quiet=True)
    try:
        distill_student(
            teacher,
            parse_recipe(RECIPE, "test"),
            ImageSet("blots", images),
            ImageSet("blots", test),
            options,
            teacher_name="blot teacher",
        )
    except Interrupted:
        return INTERRUPTED
    return 0


def fork(teacher, folder, kill_after=None, **how):
    """Make an attempt in a child, which is killed after some seconds."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        status = 1
        try:
            status = attempt(teacher, Path(folder), **how)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # it has not been waited for, so its number is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "seconds": time.monotonic() - began}


def main():
    torch.set_num_threads(1)  # one more would not survive the fork
    teacher = make_teacher()
    gc.collect()
    gc.freeze()  # a child's collector would copy every page that it looks at
    for line in sys.stdin:
        sys.stdout.write(json.dumps(fork(teacher, **json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

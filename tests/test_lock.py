"""One run at a time in an output folder. As a script this file is one of two processes of a run that come too late."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gspn2convert.conversion import Conversion
from gspn2convert.distill import Options, distill_student
from gspn2convert.errors import UserError
from gspn2convert.images import ImageSet
from gspn2convert.lock import sole_writer
from gspn2convert.recipe import parse_recipe
from gspn2convert.train import make_accelerator
from helpers.conversions import FILES, RECIPE, Pictures
from helpers.processes import environment, run_two

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSAL = "another run is writing to {}; let it end or stop it, or name another output folder"


def alone(folder, *, resume=False):
    return sole_writer(folder, resume, make_accelerator("cpu"))


def test_a_second_run_is_refused_while_the_first_one_is_there(tmp_path):
    out = tmp_path / "a" / "out"
    with alone(out):
        for resume in (False, True):
            with pytest.raises(UserError) as refused, alone(out, resume=resume):
                raise AssertionError("two at once")
            assert str(refused.value) == REFUSAL.format(out)
        assert not list(out.iterdir())
        with alone(tmp_path / "other"):
            (tmp_path / "other" / "file").write_text("kept")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]  # what was made and stayed empty has gone
    out.mkdir(parents=True)
    with alone(out):
        pass
    assert out.is_dir()


def test_what_a_run_wrote_that_ended_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty; name another"), alone(tmp_path):
        raise AssertionError("two after each other")
    with alone(tmp_path, resume=True):
        pass


def test_a_run_that_was_killed_leaves_no_lock_though_its_workers_live(tmp_path):
    """A worker that reads images outlives a killed run by seconds."""
    script = """
import os, signal, sys, time
from pathlib import Path
from gspn2convert.lock import sole_writer
from gspn2convert.train import make_accelerator
with sole_writer(Path(sys.argv[1]), False, make_accelerator("cpu")):
    worker = os.fork()
    if not worker:
        time.sleep(600)
    print(worker, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    arguments = [sys.executable, "-c", script, tmp_path / "out"]
    process = subprocess.Popen(arguments, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match="another run is writing"), alone(tmp_path / "out"):
            raise AssertionError("two at once")
        process.stdin.write("die\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == -signal.SIGKILL
        os.kill(worker, 0)  # it lives
        with alone(tmp_path / "out"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.communicate()
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_where_there_are_no_locks_runs_go_on_without(tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path / "out"), alone(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_folder_that_an_ending_run_takes_away_is_made_again(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        if not calls:
            (tmp_path / "out").rmdir()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
        with pytest.raises(UserError, match="another run is writing"), alone(tmp_path / "out"):
            raise AssertionError("two at once")
    assert len(calls) == 3


def convert(teacher, output, **options):
    sets = (ImageSet("pictures", Pictures()), ImageSet("test", Pictures(20, seed=1)))
    how = Options(output=output, device="cpu", quiet=True, **options)
    return distill_student(teacher, parse_recipe(RECIPE, "test"), *sets, how, teacher_name="tiny")


@pytest.mark.parametrize("moment", ["_begin", "_score"])
def test_of_two_conversions_the_first_is_left_alone(tiny_teacher, tmp_path, monkeypatch, moment):
    """The second comes before the first one's first checkpoint, or after it."""
    refused, real = [], getattr(Conversion, moment)

    def meanwhile(self, *given):
        monkeypatch.setattr(Conversion, moment, real)
        for resume in (False, True):
            with pytest.raises(UserError) as error:
                convert(tiny_teacher, tmp_path / "out", resume=resume)
            refused.append(str(error.value))
        return real(self, *given)

    convert(tiny_teacher, tmp_path / "alone")
    monkeypatch.setattr(Conversion, moment, meanwhile)
    convert(tiny_teacher, tmp_path / "out")
    assert refused[1] == REFUSAL.format(tmp_path / "out")
    assert refused[0] == refused[1] or (moment == "_score" and "out is not empty" in refused[0])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "alone")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_all_processes_of_a_run_that_is_refused_end(tmp_path, free_ports):
    with alone(tmp_path / "out"):
        outputs = run_two(__file__, tmp_path / "out", MASTER_PORT=free_ports(1)[0])
    said = [f"the main process of this run cannot write to {tmp_path / 'out'}, and says why"]
    assert [output.splitlines()[-1] for output in outputs] == [REFUSAL.format(tmp_path / "out"), *said]
    outputs = run_two(__file__, tmp_path / "out", MASTER_PORT=free_ports(1)[0])
    assert [output.splitlines()[-1] for output in outputs] == ["alone"] * 2


if __name__ == "__main__":
    try:
        with alone(Path(sys.argv[1])):
            sys.stdout.write("alone\n")
    except UserError as error:
        sys.stdout.write(f"{error}\n")

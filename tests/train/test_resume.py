"""An interruption of training leaves no trace."""

import itertools
import signal

import pytest
import torch
from safetensors import safe_open

from gspn2convert.checkpoint import FILE_NAME
from gspn2convert.interrupt import Interrupted, StopWish
from helpers.training import Run, figures, start

pytestmark = pytest.mark.usefixtures("one_thread")


def tensor_bytes(folder):
    """The checkpoint's tensors as stored, without its record, which holds times."""
    content = (folder / FILE_NAME).read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def die_after(run, steps):
    """Batches that end the process's work, as SIGKILL would, when the given number of steps is done."""

    def batches(first_step):
        for _, batch in zip(range(first_step, steps), run.batches(first_step), strict=False):
            yield batch
        raise ConnectionAbortedError

    return batches


def assert_same_end(folder, run, undisturbed):
    expected_folder, expected = undisturbed
    assert tensor_bytes(folder) == tensor_bytes(expected_folder)
    for name, value in expected.student.state_dict().items():
        assert torch.equal(run.student.state_dict()[name], value), name
    assert figures(run.store.history) == figures(expected.store.history)
    assert run.store.finished == ["align", "recover"]


@pytest.mark.parametrize(
    ("stage", "cuts"), [("align", (1,)), ("align", (5, 11)), ("recover", (1, 2)), ("recover", (9,))]
)
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, undisturbed, stage, cuts):
    for cut in cuts:
        run = Run(tmp_path)
        if stage == "recover" and not run.store.finished:
            run.train("align")
        with pytest.raises(ConnectionAbortedError):
            run.train(stage, batches=die_after(run, cut))
    run = Run(tmp_path)
    assert (run.store.stage, run.store.step) == (stage, cuts[-1])
    run.train_both()
    assert run.seen[0] == cuts[-1]
    assert_same_end(tmp_path, run, undisturbed)


def test_the_average_survives_an_interruption(tmp_path):
    ends = []
    for name in ("undisturbed", "resumed"):
        run, rising = Run(tmp_path / name), itertools.count()

        def evaluate(rising=rising):
            return {"cosine": float(next(rising))}  # the average, asked for last, is always the better

        if name == "resumed":
            with pytest.raises(ConnectionAbortedError):
                run.train("recover", batches=die_after(run, 7), evaluate=evaluate)
            run = Run(tmp_path / name)
        assert run.train("recover", evaluate=evaluate).kept == "ema"
        ends.append(tensor_bytes(tmp_path / name))
    assert ends[0] == ends[1]


def test_steps_since_the_last_checkpoint_are_repeated(tmp_path, undisturbed):
    run = Run(tmp_path, every=4)
    with pytest.raises(ConnectionAbortedError):
        run.train("align", batches=die_after(run, 7))
    run = Run(tmp_path, every=4)
    run.train_both()
    assert run.seen[0] == 4
    assert_same_end(tmp_path, run, undisturbed)


def test_the_whole_state_is_in_the_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.train("align")
    with pytest.raises(ConnectionAbortedError):
        run.train("recover", batches=die_after(run, 3))
    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        names = set(file.keys())
    matrices = {f"student.{name}" for name, parameter in run.student.named_parameters() if parameter.ndim == 2}
    parameters = {f"student.{name}" for name, _ in run.student.named_parameters()}
    adapters = {f"adapters.{site}.{part}" for site in (0, 1) for part in ("weight", "bias")}
    by_muon = matrices | {f"adapters.{site}.weight" for site in (0, 1)}
    assert names == {
        *parameters,
        *(name.replace("student.", "ema.", 1) for name in parameters),
        *(f"stage.{name}" for name in {*adapters, "deviations"}),
        *(f"optimizer.{name}.momentum_buffer" for name in by_muon),
        *(
            f"optimizer.{name}.{key}"
            for name in (parameters | adapters) - by_muon
            for key in ("step", "exp_avg", "exp_avg_sq")
        ),
    }


def test_sigterm_saves_and_the_resumed_run_ends_with_the_same_bits(tmp_path, undisturbed):
    process = start(tmp_path, "signal")
    for line in process.stdout:
        if line.strip() == "step 3 of recover":
            process.terminate()
            break
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 3, output
    run = Run(tmp_path)
    assert (run.store.stage, run.store.step) == ("recover", 4)
    assert "stopped in stage recover after 4 of 12; resume to go on" in output
    run.train_both()
    assert_same_end(tmp_path, run, undisturbed)


def test_how_often_is_saved_does_not_decide_the_scale_of_fp16(tmp_path):
    """A stage begins with the scale with which the one before ended, not with that of its last checkpoint."""
    ends = []
    for every in (10**9, 5):
        run = Run(tmp_path / str(every), every=every)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
        run.train_both()
        ends.append((run.accelerator.scaler.get_scale(), run.student.state_dict()))
    (scale, weights), (other_scale, others) = ends
    assert scale == other_scale > 2.0
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = Run(tmp_path)

    def interrupting(first_step):
        for step, batch in enumerate(run.batches(first_step)):
            if step == 2:
                assert signal.getsignal(signal.SIGINT) is not before[0]
                signal.raise_signal(signal.SIGINT)
            yield batch

    with pytest.raises(Interrupted) as stopped:
        run.train("align", batches=interrupting)
    assert (stopped.value.stage, stopped.value.step) == ("align", 3)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_in_the_last_step_comes_after_the_stage_is_closed(tmp_path, undisturbed):
    run = Run(tmp_path)

    def interrupting(first_step):
        for step, batch in enumerate(run.batches(first_step)):
            if step == 11:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.raises(Interrupted):
        run.train("align", batches=interrupting)
    run = Run(tmp_path)
    assert run.store.finished == ["align"]
    run.train_both()
    assert_same_end(tmp_path, run, undisturbed)


def test_a_second_signal_acts_at_once():
    # A shell starts what it puts into the background with SIGINT ignored, these tests for example.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopWish() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.made
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

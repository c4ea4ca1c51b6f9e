"""The training loop: what moves, what stays, and that an interruption leaves no trace.

Run as a script, this file trains in a process of its own; the tests of signals and of several processes do that.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from gspn2convert.checkpoint import FILE_NAME, CheckpointStore
from gspn2convert.errors import UserError
from gspn2convert.interrupt import Interrupted, StopWish
from gspn2convert.losses import token_deviations
from gspn2convert.model import build_student
from gspn2convert.progress import Progress
from gspn2convert.recipe import Align, Mixer, Recover
from gspn2convert.recover import RecoverStage
from gspn2convert.stage import AlignStage
from gspn2convert.train import make_accelerator, train_stage

pytestmark = pytest.mark.usefixtures("one_thread")

SPECS = {
    "align": Align(steps=12, batch_size=4, lr=3e-3),
    "recover": Recover(steps=12, batch_size=4, mixer_lr=1e-3, lr=3e-4, ema=0.9),
}
IDENTITY = {"recipe": "test"}


def make_pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
        teacher = timm.create_model("vit_tiny_patch16_224", reg_tokens=1, init_values=0.5, **sizes).eval()
        if not hasattr(teacher, "_model_args"):  # timm before 1.0.31
            teacher._model_args = {"reg_tokens": 1, "init_values": 0.5, **sizes}
        for block in teacher.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
            torch.nn.init.normal_(block.attn.proj.weight, std=0.3)
        student = build_student(teacher, [0, 1], Mixer(proxy_dim=8).resolve(32))
        for name, parameter in student.named_parameters():
            if name.endswith("attn.proj.weight"):
                torch.nn.init.normal_(parameter, std=0.1)
    return student, teacher


def images(step, share=slice(None)):
    return torch.randn(4, 3, 24, 40, generator=torch.Generator().manual_seed(step))[share]


def fixed(first_step):
    while True:
        yield images(0)


class Run:
    """A run on fresh models, up to a stage; what the tests and the subprocesses share."""

    def __init__(self, folder, *, specs=SPECS, precision="fp32", seconds=1e9, every=1, share=slice(None)):
        self.accelerator = make_accelerator("cpu", precision)
        self.store = CheckpointStore(
            folder, IDENTITY, main=self.accelerator.is_main_process, every=every, seconds=seconds, share=float("inf")
        )
        self.share, self.specs = share, specs
        self.student, self.teacher = make_pair()
        if self.store.load():
            self.student.load_state_dict(self.store.part("student."))
        self.seen = []

    def batches(self, first_step):
        step = first_step
        while True:
            self.seen.append(step)
            yield images(step, self.share)
            step += 1

    @torch.no_grad()
    def evaluate(self):
        held_out = images(10_000)
        ours, theirs = (vit.forward_features(held_out) for vit in (self.student, self.teacher))
        return {"cosine": torch.cosine_similarity(ours, theirs, dim=-1).mean().item()}

    def objective(self, stage):
        if stage == "align":
            return AlignStage(self.student, self.teacher)
        deviations = token_deviations([self.teacher.forward_features(images(step)).detach() for step in (0, 1)], 2)
        return RecoverStage(self.student, self.teacher, self.specs["recover"].losses, deviations)

    def train(self, stage, batches=None, evaluate=None):
        with Progress(quiet=True) as progress:
            return train_stage(
                stage,
                self.objective(stage),
                self.specs[stage],
                batches or self.batches,
                (4, 3, 24, 40),
                accelerator=self.accelerator,
                store=self.store,
                progress=progress,
                evaluate=evaluate or self.evaluate,
                eval_every=5,
            )

    def train_both(self):
        for stage in ("align", "recover"):
            if stage not in self.store.finished:
                self.train(stage)


def tensor_bytes(folder):
    """The checkpoint's tensors as stored, without its record, which holds times."""
    content = (folder / FILE_NAME).read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def figures(history):
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in history]


def die_after(run, steps):
    """Batches that end the process's work, as SIGKILL would, when the given number of steps is done."""

    def batches(first_step):
        for _, batch in zip(range(first_step, steps), run.batches(first_step), strict=False):
            yield batch
        raise ConnectionAbortedError

    return batches


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, every=10**9)
    run.train_both()
    return folder, run


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
    parameters = {f"student.{name}" for name, _ in run.student.named_parameters()}
    adapters = {f"adapters.{site}.{part}" for site in (0, 1) for part in ("weight", "bias")}
    assert names == {
        *parameters,
        *(name.replace("student.", "ema.", 1) for name in parameters),
        *(f"stage.{name}" for name in {*adapters, "deviations"}),
        *(f"optimizer.{name}.{key}" for name in parameters | adapters for key in ("step", "exp_avg", "exp_avg_sq")),
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


def test_align_moves_mixers_and_nothing_else(tmp_path):
    run = Run(tmp_path)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    teacher = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    run.train("align")
    own = {f"blocks.{site}.attn.{name}" for site in (0, 1) for name in run.student.blocks[site].attn.own_parameters()}
    moved = {name for name, value in run.student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == own
    assert all(torch.equal(value, teacher[name]) for name, value in run.teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in run.student.parameters())


def test_recover_moves_everything_but_the_teacher(tmp_path):
    run = Run(tmp_path)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    teacher = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    run.train("recover")
    assert not [name for name, value in run.student.state_dict().items() if torch.equal(value, before[name])]
    assert all(torch.equal(value, teacher[name]) for name, value in run.teacher.state_dict().items())


@pytest.mark.parametrize("stage", ["align", "recover"])
def test_a_fixed_batch_is_learnt(tmp_path, stage):
    specs = {
        "align": Align(steps=60, batch_size=4, lr=2e-2),
        "recover": Recover(steps=60, batch_size=4, mixer_lr=1e-2, lr=3e-3, weight_decay=0.0),
    }
    run = Run(tmp_path, specs=specs, every=10**9)
    with torch.no_grad():
        before = run.objective(stage)(images(0), 1.0)["loss"].item()
    run.train(stage, batches=fixed)
    with torch.no_grad():
        after = run.objective(stage)(images(0), 1.0)["loss"].item()
    assert after < before / 10, (before, after)


def test_the_better_weights_are_kept(tmp_path):
    kept = {}
    for name, scores in {"raw": (0.9, 0.8), "ema": (0.8, 0.9)}.items():
        run, weights, left = Run(tmp_path / name), [], list(scores)

        def evaluate(run=run, weights=weights, left=left):
            weights.append(run.student.head.weight.detach().clone())
            return {"cosine": left.pop(0) if run.seen[-1] == 11 else 0.0}

        result = run.train("recover", evaluate=evaluate)
        assert (result.kept, result.evaluation) == (name, {"cosine": 0.9})
        kept[name] = (run.student.head.weight, weights[-2:])
    raw, averaged = kept["raw"][1]
    assert not torch.equal(raw, averaged)
    assert torch.equal(kept["raw"][0], raw)
    assert torch.equal(kept["ema"][0], averaged)


def test_history_and_result(undisturbed):
    _, run = undisturbed
    records = [(record["stage"], record["step"], "evaluation" in record) for record in run.store.history]
    expected = [(5, True), (10, True), (12, False), (12, True)]
    assert records == [(stage, *each) for stage in ("align", "recover") for each in expected]
    end = run.store.history[-1]
    assert end["evaluation"] == run.evaluate() == end["candidates"][end["kept"]]
    assert set(end["candidates"]) == {"raw", "ema"}
    assert set(run.store.history[3]["candidates"]) == {"raw"}
    first, second = run.store.history[0], run.store.history[4]
    assert {"loss", "layer.0", "layer.1", "gradient"} < set(first)
    assert {"loss", "prefix", "patch", "smooth_l1", "logits", "mixer", "gradient"} < set(second)
    assert "mixer" not in run.store.history[6]
    assert set(run.store.seconds_spent) == {"align", "recover"}


def test_a_stage_without_steps_changes_nothing(tmp_path):
    run = Run(tmp_path, specs=SPECS | {"align": Align(steps=0, batch_size=4)})
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    run.train("align")
    assert run.seen == []
    assert run.store.finished == ["align"]
    assert all(torch.equal(value, before[name]) for name, value in run.student.state_dict().items())


@pytest.mark.parametrize("stage", ["align", "recover"])
def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path, stage):
    run = Run(tmp_path, every=2)

    def poisoned(first_step):
        for step, batch in enumerate(run.batches(first_step)):
            yield batch * float("nan") if step == 5 else batch

    message = rf"became NaN at stage {stage} step 6; .*\(stage {stage}, step 4\) is kept; lower the learning rate"
    with pytest.raises(UserError, match=message) as error:
        run.train(stage, batches=poisoned)
    assert "\n" not in str(error.value)
    resumed = Run(tmp_path)
    assert (resumed.store.stage, resumed.store.step) == (stage, 4)
    assert all(torch.isfinite(value).all() for value in resumed.store.tensors.values())
    assert all(torch.isfinite(value).all() for value in run.student.state_dict().values())


def test_nan_in_the_first_step_says_that_nothing_was_written(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(UserError, match="at stage align step 1; no checkpoint was written yet; lower"):
        run.train("align", batches=lambda first_step: iter([images(0) / 0]))


def test_bf16_follows_fp32(tmp_path, undisturbed):
    run = Run(tmp_path, precision="bf16")
    run.train_both()
    assert all(value.dtype == torch.float32 for value in run.student.state_dict().values())
    pairs = list(zip(run.store.history, undisturbed[1].store.history, strict=True))
    losses = [(low["loss"], full["loss"]) for low, full in pairs if "loss" in full]
    assert all(low != full and low == pytest.approx(full, rel=0.05) for low, full in losses)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp16"), ("cpu", "fp8")])
def test_precision_that_cannot_be_had(device, precision):
    with pytest.raises(UserError, match=rf"precision '{precision}'.*fp32"):
        make_accelerator(device, precision)


def test_two_processes_give_the_losses_of_one(tmp_path, undisturbed, free_ports):
    rendezvous = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    ranks = [start(tmp_path, "shared", RANK=rank, LOCAL_RANK=rank, **rendezvous) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in ranks]
    finally:
        for process in ranks:  # what waits for the other one would wait for long
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs
    histories = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert figures(histories[0]) == figures(histories[1])
    for shared, alone in zip(histories[0], undisturbed[1].store.history, strict=True):
        for name in set(alone) - {"stage", "kept", "images_per_second", "evaluation", "candidates"}:
            assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
        if "loss" in alone:
            assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5, abs=1e-5)
    store = CheckpointStore(tmp_path, IDENTITY)
    assert store.load()
    assert store.finished == ["align", "recover"]


def start(folder, task, **environment):
    """Run this file in another process."""
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), task],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main(folder, task):
    if task == "signal":
        run = Run(folder, every=10**9)
        run.train("align")

        def telling(first_step):
            for step, batch in enumerate(run.batches(first_step)):
                sys.stdout.write(f"step {step} of recover\n")
                sys.stdout.flush()
                # The first signal puts the handler back that was there before.
                while step == 3 and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
                    time.sleep(0.01)
                yield batch

        try:
            run.train("recover", batches=telling)
        except Interrupted as stopped:
            sys.stdout.write(f"{stopped}\n")
            sys.exit(3)
    else:
        rank = int(os.environ["RANK"])
        run = Run(folder, every=10**9, share=slice(2 * rank, 2 * rank + 2))
        run.train_both()
        sys.stdout.write(f"\n{json.dumps(run.store.history)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

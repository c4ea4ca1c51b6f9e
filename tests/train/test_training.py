"""The training loop: what moves, what stays, and what is told of it, by one process and by two."""

import json

import pytest
import torch

from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.errors import UserError
from gspn2convert.recipe import Align, Recover
from gspn2convert.train import make_accelerator
from helpers import training
from helpers.processes import run_two
from helpers.training import IDENTITY, SPECS, Run, figures, images

pytestmark = pytest.mark.usefixtures("one_thread")


def fixed(first_step):
    while True:
        yield images(0)


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
    outputs = run_two(training.__file__, tmp_path, "shared", MASTER_PORT=free_ports(1)[0])
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

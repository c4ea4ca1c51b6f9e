"""Models spread over two processes: the losses, the end and the checkpoints of a run that is not spread.

Run as a script, this file is one of these processes.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gspn2convert.checkpoint import FILE_NAME
from gspn2convert.distill import Options, distill_student
from gspn2convert.errors import UserError
from gspn2convert.fsdp import part, whole
from gspn2convert.images import ImageSet
from gspn2convert.interrupt import Interrupted
from gspn2convert.losses import token_deviations
from gspn2convert.model import build_student
from gspn2convert.optim import make_optimizer
from gspn2convert.recipe import Mixer, RecoverLosses, parse_recipe
from gspn2convert.recover import RecoverStage
from gspn2convert.stage import AlignStage
from helpers.processes import run_two

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
name: tiny
mixer: {proxy_dim: 7}
fit: {images: 16, held_out: 8, batch_size: 8}
align: {steps: 5, batch_size: 4}
recover: {steps: 6, batch_size: 4, ema: 0.5}
curriculum: {sizes: [32], steps: 2, batch_size: 4, target: previous}
eval_every: 2
held_out: 8
"""
KEPT = (1,)
# Of itself a run has to find that there is nothing but CPUs, and that its processes share them.
DEVICE = "cpu" if torch.accelerator.is_available() else "auto"


def make_teacher():
    """Prefix tokens, LayerScale, and widths that two processes cannot share evenly."""
    sizes = {"depth": 2, "embed_dim": 33, "num_heads": 3, "img_size": 24, "patch_size": 8, "num_classes": 5}
    more = {"reg_tokens": 2, "init_values": 0.5, "dynamic_img_size": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = timm.create_model("vit_tiny_patch16_224", **sizes, **more)
        vars(teacher).setdefault("_model_args", sizes | more)  # timm records them since 1.0.31
        for parameter in teacher.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return teacher.eval()


class Pictures:
    """Soft random pictures in memory; the one at a chosen read ends the process as if a user did."""

    label_names = ("ant", "bee", "cat", "dog", "elk")

    def __init__(self, count, seed, terminate_at_read=None):
        noise = np.random.default_rng(seed)
        small = [Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
        self.images = [image.resize((24, 24), Image.Resampling.BICUBIC) for image in small]
        self.reads, self.terminate_at_read = 0, terminate_at_read

    def __len__(self):
        return len(self.images)

    def read(self, index):
        self.reads += 1
        if self.reads == self.terminate_at_read:
            signal.raise_signal(signal.SIGTERM)
        return self.images[index], index % len(self.label_names)

    def where(self, index):
        return f"picture {index}"


def convert(folder, *, terminate_at_read=None, **options):
    """A whole conversion."""
    images = ImageSet("pictures", Pictures(40, 0, terminate_at_read))
    how = Options(output=folder, device=DEVICE, quiet=True, **options)
    test = ImageSet("test", Pictures(8, 1))
    return distill_student(
        make_teacher(), parse_recipe(RECIPE, "test"), images, test, how, teacher_name="tiny", keep=KEPT
    )


def make_objective(stage):
    """A stage on fresh models whose mixers have something to learn, and a batch of it."""
    teacher, generator = make_teacher(), torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = build_student(teacher, (0,), Mixer(proxy_dim=7).resolve(33))
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    images = torch.randn(4, 3, 24, 24, generator=generator)
    if stage == "align":
        return AlignStage(student, teacher), images
    with torch.no_grad():
        deviations = token_deviations([teacher.forward_features(images)], 3)
    return RecoverStage(student, teacher, RecoverLosses(similarity=0.5), deviations), images


def by_muon():
    """Weights after a step of Muon by given gradients; one has fewer rows than there are processes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 1))
        gradients = [torch.randn(parameter.shape) for parameter in module.parameters()]
    if PartialState().num_processes > 1:
        fully_shard(module, mesh=init_device_mesh("cpu", (PartialState().num_processes,)))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = part(gradient, parameter)
    groups = [{"params": list(module.parameters()), "lr": 0.1, "weight_decay": 0.1}]
    make_optimizer("muon", groups, fused=False).step()
    return {name: whole(parameter).detach() for name, parameter in module.named_parameters()}


def local_bytes(parameters):
    return sum(getattr(parameter, "to_local", lambda p=parameter: p)().nbytes for parameter in parameters)


def gradients(stage):
    """Loss and whole gradients of one batch, by one process or by several that share it; bytes that each holds."""
    objective, images = make_objective(stage)
    state = PartialState()
    if state.num_processes > 1:
        objective.shard(torch.device("cpu"))
        images = images.chunk(2)[state.process_index]
    loss = objective(images, 0.25)["loss"]
    loss.backward()
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    held = {
        "student": local_bytes(objective.student.parameters()),
        "teacher": local_bytes(objective.teacher.parameters()),
        "gradients": local_bytes(parameter.grad for _, parameter in named),
    }
    return loss.detach(), {name: whole(parameter.grad) for name, parameter in named}, held


def losses(folder):
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return {(record["stage"], record["step"]): record["loss"] for record in history if "loss" in record}


def assert_same_end(folder, expected):
    """Losses to 1e-5, and weights as near as sums in another order leave them after some steps."""
    assert losses(folder).keys() == losses(expected).keys()
    for key, loss in losses(expected).items():
        assert losses(folder)[key] == pytest.approx(loss, rel=1e-5, abs=1e-5), key
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, free_ports):
    """What two processes made, all of it in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(Interrupted, match="stage recover after 3 of 6"):
        convert(folder / "stopped by one", terminate_at_read=62)
    run_two(__file__, folder, *free_ports(4))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The conversion by one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    convert(folder)
    return folder


def test_a_sharded_run_gives_the_losses_and_the_student_of_one_that_is_not(folder):
    assert len(losses(folder / "whole")) == 3 + 3 + 1
    assert_same_end(folder / "sharded", folder / "whole")


def test_a_sharded_run_gives_the_losses_and_the_student_of_one_process(folder, alone):
    assert_same_end(folder / "sharded", alone)


def test_one_process_goes_on_from_a_sharded_checkpoint(folder, alone):
    assert (folder / "stopped by two" / FILE_NAME).exists()
    convert(folder / "stopped by two", resume=True)
    assert_same_end(folder / "stopped by two", alone)


def test_a_sharded_run_goes_on_from_a_checkpoint_of_one_process(folder, alone):
    assert_same_end(folder / "stopped by one", alone)


def test_checkpoints_hold_whole_tensors(folder):
    """Also those that one process holds no part of, as a class token has but one row."""
    found = load_file(folder / "checkpoint of two.safetensors")
    student = make_objective("recover")[0].student
    for name, parameter in student.named_parameters():
        moments = ["momentum_buffer"] if parameter.ndim == 2 else ["exp_avg", "exp_avg_sq"]
        for key in ("student.{}", "ema.{}", *(f"optimizer.student.{{}}.{moment}" for moment in moments)):
            assert found[key.format(name)].shape == parameter.shape, key.format(name)
            assert found[key.format(name)].isfinite().all()


@pytest.mark.parametrize("stage", ["align", "recover"])
def test_gradients_are_those_of_one_process(folder, stage):
    loss, expected, _ = gradients(stage)
    (first, ours), (second, theirs) = (load_gradients(folder, stage, rank) for rank in (0, 1))
    assert (first + second) / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], theirs[name]), name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)


def test_a_step_of_muon_is_that_of_one_process(folder):
    for rank in (0, 1):
        ours = load_file(folder / f"muon.{rank}.safetensors")
        for name, weight in by_muon().items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", ["align", "recover"])
def test_each_process_holds_half(folder, stage):
    _, _, whole_bytes = gradients(stage)
    held = [json.loads((folder / f"{stage}.{rank}.json").read_text()) for rank in (0, 1)]
    for what, total in whole_bytes.items():
        assert held[0][what] + held[1][what] == total
        assert held[1][what] == pytest.approx(total / 2, rel=0.06), what  # rows do not share out evenly


def test_one_process_has_nobody_to_share_with(tmp_path):
    with pytest.raises(
        UserError, match=r"--shard .* only one; start more, by `accelerate launch .* or leave --shard out"
    ):
        convert(tmp_path / "out", shard=True)
    assert not (tmp_path / "out").exists()


def load_gradients(folder, stage, rank):
    found = load_file(folder / f"{stage}.{rank}.safetensors")
    return found.pop("loss").item(), found


def main(folder, ports):
    """What each of the two processes does; each conversion meets the other process at a port of its own."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)

    def together(name, **options):
        os.environ["MASTER_PORT"] = next(ports)
        convert(folder / name, **options)

    together("whole")
    together("sharded", shard=True)
    together("stopped by one", shard=True, resume=True)
    with pytest.raises(Interrupted, match="stage recover after 3 of 6"):  # asked of the one that does not write
        together("stopped by two", shard=True, terminate_at_read=47 if rank else None)
    if rank == 0:
        shutil.copy(folder / "stopped by two" / FILE_NAME, folder / "checkpoint of two.safetensors")
    for stage in ("align", "recover"):
        loss, found, held = gradients(stage)
        save_file(found | {"loss": loss}, folder / f"{stage}.{rank}.safetensors")
        (folder / f"{stage}.{rank}.json").write_text(json.dumps(held))
    save_file(by_muon(), folder / f"muon.{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), iter(sys.argv[2:]))

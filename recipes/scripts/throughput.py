"""Measure stage 2 on noise: images per second, and where the time of a step goes.

    python recipes/scripts/throughput.py --output recipes/results/throughput.json
    torchrun --nproc-per-node 2 recipes/scripts/throughput.py --output recipes/results/throughput.json

Weights and images are random, for neither decides the time. Results are added under the number of GPUs. The parts of
a step are timed on their own, with the device waited for, so that they add up to a little more than a step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accuracy import SETTINGS, add_row, made_by
from PIL import Image
from torch import Tensor

from gspn2convert.cache import ImageCache
from gspn2convert.data import open_images
from gspn2convert.graphs import RecordedSteps
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.optim import Ema, make_optimizer
from gspn2convert.processes import average_gradients
from gspn2convert.recipe import Recipe, load_recipe
from gspn2convert.recover import RecoverStage
from gspn2convert.stage import frozen_tokens
from gspn2convert.teachers import load_teacher
from gspn2convert.train import make_accelerator
from gspn2convert.vit import data_config, num_prefix

STORED = 448  # side of the images
COUNT = 512
HALVES = {"with the mixer term": 0.0, "without it": 0.99}  # progress: the term fades out


def noise(config: dict[str, Any], recipe: Recipe, device: torch.device) -> ImageCache:
    """A cache of noise, read from files as any other."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(COUNT):
            pixels = rng.integers(0, 256, (STORED, STORED, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{number}.jpg")
        images = open_images(folder, "train")
        return ImageCache(images, range(COUNT), config, recipe.augment, device=device, workers=8)


class Step:
    """Stage 2's step, as `train._Training` takes it."""

    def __init__(
        self, objective: RecoverStage, student: Gspn2Vit, recipe: Recipe, images: Tensor, accelerator: Accelerator
    ) -> None:
        self.objective, self.accelerator, self.clip = objective, accelerator, recipe.recover.clip
        spec = recipe.recover
        optimizer = make_optimizer(spec.optimizer, objective.groups(spec), fused=True, capturable=True)
        with accelerator.autocast():
            objective.record(images, spec.steps)
        self.optimizer = accelerator.prepare(optimizer)
        self.take_step = RecordedSteps(optimizer)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ema, self.loss = Ema(student, recipe.recover.ema), torch.zeros(())

    def forward(self, images: Tensor, progress: float) -> None:
        """Compute the loss; the teacher's pass is a part of it."""
        self.loss = self.objective(images, progress)["loss"]

    def backward(self) -> None:
        """Compute gradients."""
        self.accelerator.backward(self.loss)
        average_gradients(self.parameters)

    def update(self) -> None:
        """Clip, step and average."""
        float(self.accelerator.clip_grad_norm_(self.parameters, self.clip))
        self.take_step()
        self.optimizer.zero_grad()
        self.ema.update(1000)

    def __call__(self, images: Tensor, progress: float) -> None:
        """Take a whole step."""
        self.forward(images, progress)
        self.backward()
        self.update()


def seconds(call: Callable[[], object], times: int) -> float:
    """Median time of a call, the device waited for."""
    spent = []
    for _ in range(times + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[3:])


def parts(step: Step, cache: ImageCache, images: Tensor, progress: float, times: int) -> dict[str, float]:
    """Milliseconds of the parts of a step."""
    places, draws = torch.arange(len(images), device=images.device), torch.rand(len(images), 8, device=images.device)
    teacher = step.objective.teacher

    def teach() -> None:
        with torch.no_grad(), step.accelerator.autocast():
            frozen_tokens(teacher, images)

    def there_and_back() -> None:
        step.forward(images, progress)
        step.backward()

    found = {
        "views": seconds(lambda: cache.view(places, draws), times),
        "teacher": seconds(teach, times),
        "both models forward": seconds(lambda: step.forward(images, progress), times),
        "forward and backward": seconds(there_and_back, times),
    }

    def whole() -> None:
        there_and_back()
        step.update()

    found["optimizer and average"] = seconds(whole, times) - found["forward and backward"]
    return {name: 1e3 * value for name, value in found.items()}


def main() -> None:
    """Measure and add to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", default="dinov2_small", help="as for gspn2convert distill [%(default)s]")
    parser.add_argument("--batch", type=int, default=256, help="images a GPU [%(default)s]")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed [%(default)s]")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, required=True, help="results file to add to")
    arguments = parser.parse_args()
    recipe, accelerator = load_recipe(SETTINGS["dinov2"]), make_accelerator("cuda", "bf16")
    teacher = load_teacher(arguments.teacher, img_size=recipe.size, pretrained=False).to(accelerator.device)
    student = build_student(teacher, range(len(teacher.blocks)), recipe.mixer.resolve(teacher.embed_dim))
    deviations = torch.ones(num_prefix(teacher) + 1, teacher.embed_dim)
    objective = RecoverStage(student, teacher.bfloat16(), recipe.recover.losses, deviations).to(accelerator.device)
    cache = noise(data_config(teacher), recipe, accelerator.device)
    world = accelerator.num_processes
    batches = cache.batches(
        arguments.batch * world, 0, 0, 10**6, rank=accelerator.process_index, world=accelerator.num_processes
    )
    step = Step(objective, student, recipe, next(batches).clone(), accelerator)
    found: dict[str, Any] = {"teacher": arguments.teacher, "batch_per_gpu": arguments.batch, "gpus": world}
    for name, progress in HALVES.items():
        spent = seconds(lambda progress=progress: step(next(batches), progress), arguments.steps)
        found[name] = {"ms": 1e3 * spent, "images_per_second": arguments.batch * world / spent}
        if world == 1:
            found[name]["parts_ms"] = parts(step, cache, next(batches), progress, 10)
    if accelerator.is_main_process:
        found |= made_by(arguments.commit, accelerator.device)
        add_row(arguments.output, f"{world}", found)
        print({name: round(found[name]["images_per_second"]) for name in HALVES})
    accelerator.end_training()


if __name__ == "__main__":
    main()

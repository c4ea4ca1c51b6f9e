"""One conversion: its stages in order, what each came to, and how they share images and checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.models import VisionTransformer
from torch import Tensor

from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.convert import LayerReport, convert
from gspn2convert.cost import count_parameters
from gspn2convert.data import ImageSet, batches, split_held_out, train_batches
from gspn2convert.environment import environment
from gspn2convert.evaluate import class_of_label, evaluate
from gspn2convert.held_out import HeldOut
from gspn2convert.interrupt import Interrupted, StopWish
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.progress import Progress
from gspn2convert.recipe import Align, Recipe, Recover
from gspn2convert.stage import AlignStage, Objective, RecoverStage, channel_statistics
from gspn2convert.train import train_stage
from gspn2convert.vit import data_config

MakeObjective = Callable[[Gspn2Vit, VisionTransformer], Objective]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how a conversion runs; what it does is the recipe's.

    Attributes:
        output: folder to write.
        stages: which of 0 (fit), 1 (align), 2 (recover) run; without 0 the mixers start at random.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16" (autocast).
        workers: processes that read images.
        resume: go on where an interrupted run stopped.
        quiet: show no progress.
    """

    output: Path
    stages: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    resume: bool = False
    quiet: bool = False


class Conversion:
    """One conversion: the stages that are left of it, and what they came to.

    Args:
        teacher: on the accelerator's device, in eval mode.
        recipe: what to do.
        images: training images; calibration and held-out images are taken from them.
        test: images whose top-1 is reported after each stage, where their labels are the teacher's classes.
        options: where and how.
        accelerator: see `train.make_accelerator`.
        store: loaded already if the run is resumed.
        progress: shows what goes on.
    """

    def __init__(
        self,
        teacher: VisionTransformer,
        recipe: Recipe,
        images: ImageSet,
        test: ImageSet,
        options: Options,
        accelerator: Accelerator,
        store: CheckpointStore,
        progress: Progress,
    ) -> None:
        self.teacher, self.recipe, self.images, self.test = teacher, recipe, images, test
        self.options, self.accelerator, self.store, self.progress = options, accelerator, store, progress
        self.data_config = data_config(teacher)
        self.train, self.unseen = split_held_out(len(images), recipe.held_out, recipe.seed)
        self.held_out = HeldOut(teacher, self._plain(self.unseen))
        self.labelled = class_of_label(teacher, test.label_names) is not None

    def stages(self, keep: Sequence[int]) -> Gspn2Vit:
        """Run what the checkpoint does not hold yet; the student that comes out."""
        layers = [i for i in range(len(self.teacher.blocks)) if i not in keep]
        student = build_student(self.teacher, layers, self.recipe.mixer.resolve(self.teacher.embed_dim))
        if self.store.stage:
            student.load_state_dict(self.store.part("student."))
        if "fit" not in self.store.finished:
            student = self._fit(keep)
        self._score("fit", student)
        if 1 in self.options.stages and self.recipe.align.steps:
            self._train("align", AlignStage, student)
        if 2 in self.options.stages and self.recipe.recover.steps:
            self._train("recover", self._recover_stage, student)
        return student

    def metrics(self, student: Gspn2Vit, teacher_name: str, keep: Sequence[int]) -> dict[str, Any]:
        """Everything measured, for metrics.json."""
        layers = self.store.notes["layers"]
        return {
            "teacher": _public(teacher_name),
            "recipe": self.recipe.name,
            "data": _public(self.images.name),
            "seed": self.recipe.seed,
            "stages_run": list(self.options.stages),
            "kept_layers": list(keep),
            "parameters": {"teacher": count_parameters(self.teacher), "student": count_parameters(student)},
            "teacher_top1": self._top1(self.teacher),
            "fit_error": sum(layer["errors"][layer["method"]] for layer in layers) / len(layers),
            "layers": layers,
            "stages": [
                {"stage": name, "seconds": self.store.seconds_spent[name], **scores}
                for name, scores in self.store.notes["scores"].items()
            ],
            "history": self.store.history,
            "environment": environment(self.accelerator.device),
        }

    def _fit(self, keep: Sequence[int]) -> Gspn2Vit:
        """Stage 0; left out by the options, the mixers start at random."""
        fit, began = self.recipe.fit, time.monotonic()
        recipe = self.recipe if 0 in self.options.stages else replace(self.recipe, fit=replace(fit, method="random"))
        layers = len(self.teacher.blocks) - len(keep)
        self.progress.start("fit", layers)
        with StopWish() as stop:

            def layer_done(report: LayerReport, done: int) -> None:
                self.progress.advance(done, {"error": report.error})
                if stop.made:
                    raise Interrupted("fit", done, layers)

            calibration = self._plain(_spread(self.train, fit.images), fit.batch_size)
            held_out = self._plain(_spread(self.unseen, fit.held_out), fit.batch_size)
            student, reports = convert(self.teacher, recipe, calibration, held_out, keep, on_layer=layer_done)
        self.store.notes |= {"layers": [asdict(report) for report in reports], "scores": {}}
        self.store.seconds_spent["fit"] = time.monotonic() - began
        self.store.finish("fit", 0, student)
        return student

    def _train(
        self, name: str, objective: Callable[[Gspn2Vit, VisionTransformer], Objective], student: Gspn2Vit
    ) -> None:
        """Stage 1 or 2, unless the checkpoint says that it is done."""
        spec: Align | Recover = getattr(self.recipe, name)
        if name not in self.store.finished:
            train_stage(
                name,
                objective(student, self.teacher),
                spec,
                lambda first_step: self._training_batches(name, spec, first_step),
                accelerator=self.accelerator,
                store=self.store,
                progress=self.progress,
                evaluate=lambda: self.held_out.compare(student),
                eval_every=self.recipe.eval_every,
            )
        self._score(name, student)

    def _recover_stage(self, student: Gspn2Vit, teacher: VisionTransformer) -> RecoverStage:
        statistics = channel_statistics(teacher, self.held_out.images)
        return RecoverStage(student, teacher, self.recipe.recover.losses, statistics)

    def _score(self, name: str, student: Gspn2Vit) -> None:
        """Note how good the student is after a stage, once."""
        scores = self.store.notes["scores"]
        if name not in scores:
            scores[name] = self.held_out.compare(student) | {"top1": self._top1(student)}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in scores[name].items() if value is not None)
            self.progress.say(f"after {name}: {shown}")

    def _top1(self, model: VisionTransformer) -> float | None:
        """Share of the test images that a model names right; None where their labels are not its classes."""
        if not self.labelled:
            return None
        figures = evaluate(model, None, self.test, device=self.accelerator.device, workers=self.options.workers)
        return float(figures["top1"])

    def _plain(self, indices: Sequence[int], batch_size: int = 32) -> Iterator[Tensor]:
        """Images as evaluation sees them."""
        pairs = batches(
            self.images,
            self.data_config,
            indices=indices,
            batch_size=batch_size,
            augment=None,
            seed=self.recipe.seed,
            workers=self.options.workers,
        )
        return (pixels for pixels, _ in pairs)

    def _training_batches(self, name: str, spec: Align | Recover, first_step: int) -> Iterator[Tensor]:
        """This process's share of the batches, as training sees them; each stage has an order of its own."""
        return train_batches(
            self.images,
            self.data_config,
            indices=self.train,
            batch_size=spec.batch_size,
            augment=self.recipe.augment,
            seed=2 * self.recipe.seed + (name == "recover"),
            first_step=first_step,
            steps=spec.steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.options.workers,
        )


def _public(name: str) -> str:
    """A name for files that travel: the last part of a path says enough, and nothing of the machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, from all over the set, which a folder sorts by class."""
    count = min(count, len(indices))
    return [indices[i * len(indices) // count] for i in range(count)]

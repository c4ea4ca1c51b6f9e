"""One conversion: its stages in order, what each came to, and how they share images and checkpoint."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from accelerate import Accelerator
from timm.models import VisionTransformer

from gspn2convert.artifact import public_name
from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.convert import LayerReport, convert
from gspn2convert.cost import count_parameters
from gspn2convert.curriculum import CURRICULUM, ReducedStage, resized, stages_run, trained, trains_before_stage_3
from gspn2convert.data import ImageSet, split_images
from gspn2convert.environment import environment
from gspn2convert.evaluate import class_of_label, evaluate
from gspn2convert.fsdp import lend
from gspn2convert.held_out import HeldOut
from gspn2convert.images import spread
from gspn2convert.interrupt import Interrupted, StopWish
from gspn2convert.keep import Auto
from gspn2convert.model import Gspn2Vit, build_student, kept_blocks
from gspn2convert.options import Options
from gspn2convert.processes import anywhere
from gspn2convert.progress import Progress
from gspn2convert.recipe import Align, Recipe, Recover
from gspn2convert.recover import RecoverStage
from gspn2convert.selection import STAGE, Selector, build_hybrid
from gspn2convert.stage import AlignStage, Objective
from gspn2convert.supply import Supply
from gspn2convert.train import train_stage
from gspn2convert.views import generator
from gspn2convert.vit import data_config

logger = logging.getLogger(__name__)

_STAGE_SEEDS = {"align": 0, "recover": 1}

MakeObjective = Callable[[Gspn2Vit, VisionTransformer], Objective]


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
        given: a student to start from, in place of stage 0.
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
        given: Gspn2Vit | None = None,
    ) -> None:
        self.teacher, self.recipe, self.images, self.test, self.given = teacher, recipe, images, test, given
        self.options, self.accelerator, self.store, self.progress = options, accelerator, store, progress
        # Half of the memory traffic, and no weights to cast at every step; what is measured is measured in float32.
        self.taught = copy.deepcopy(teacher).bfloat16() if options.precision == "bf16" else teacher
        if images.stream is not None:
            images.stream.facts = store.notes.setdefault("stream", images.stream.facts)
        self.train, self.unseen = split_images(images, recipe)
        self._see(recipe.size)
        self.labelled = class_of_label(teacher, test.label_names) is not None
        if self.labelled and images.stream is None and images.same_as(test):
            logger.warning("data %s has no test split: top-1 will be that of images which are trained on", images.name)

    def stages(self, keep: Sequence[int] | Auto) -> Gspn2Vit:
        """Run what the checkpoint does not hold yet; the student that comes out.

        With `Auto`, stages 0 and 1 convert all blocks; which of them keep attention is settled before stage 2.
        """
        known = self._known(keep)
        auto = keep if isinstance(keep, Auto) else None
        layers = [i for i in range(len(self.teacher.blocks)) if i not in known]
        student = self.given
        if student is None:
            student = build_student(self.teacher, layers, self.recipe.mixer.resolve(self.teacher.embed_dim))
        if self.store.stage:
            if self.store.stage.startswith(CURRICULUM):
                student.set_input_size(_side(self.store.stage))
            student.load_state_dict(self.store.part("student."))
        if "fit" not in self.store.finished:
            student = self._begin(known)
        self._score("fit", student)
        if 1 in self.options.stages and self.recipe.align.steps:
            if auto and "align" not in self.store.finished:
                self._selector(auto).run("fit", student, self.held_out)
            self._train("align", self.recipe.align, AlignStage, student)
        if auto:
            student = self._settle(auto, student)
        if 2 in self.options.stages and self.recipe.recover.steps:
            self._train("recover", self.recipe.recover, self._recover_stage, student)
        if 3 in self.options.stages:
            self._climb(student)
        return student

    def metrics(self, student: Gspn2Vit, teacher_name: str, started_from: str) -> dict[str, Any]:
        """Everything measured, for metrics.json; of a given student the scores stand in the place of the fit's."""
        layers = self.store.notes["layers"]
        chosen = {"selection": self.store.notes["selection"]} if "selection" in self.store.notes else {}
        return {
            "teacher": public_name(teacher_name),
            "started_from": started_from or None,
            "recipe": self.recipe.name,
            "data": public_name(self.images.name),
            "seed": self.recipe.seed,
            "stages_run": stages_run(self.recipe, self.options.stages),
            "kept_layers": kept_blocks(student),
            **chosen,
            "parameters": {"teacher": count_parameters(self.teacher), "student": count_parameters(student)},
            "teacher_top1": self._teacher_top1(student.patch_embed.img_size),
            "fit_error": sum(layer["errors"][layer["method"]] for layer in layers) / len(layers) if layers else None,
            "layers": layers,
            "stages": [
                {"stage": name, "seconds": self.store.seconds_spent[name], **scores}
                for name, scores in self.store.notes["scores"].items()
            ],
            "history": self.store.history,
            "environment": environment(self.accelerator.device),
        }

    def _begin(self, keep: Sequence[int]) -> Gspn2Vit:
        """Stage 0, or the student that was given."""
        if trains_before_stage_3(self.recipe, self.options.stages):
            self.supply.prepare()  # that the images do not fit is better found before stage 0
        if self.given is None:
            return self._fit(keep)
        self.store.notes |= {"layers": [], "scores": {}}
        self.store.seconds_spent["fit"] = 0.0
        self.store.finish("fit", 0, self.given)
        return self.given

    def _fit(self, keep: Sequence[int]) -> Gspn2Vit:
        """Stage 0; left out by the options, the mixers start at random."""
        fit, began = self.recipe.fit, time.monotonic()
        recipe = self.recipe if 0 in self.options.stages else replace(self.recipe, fit=replace(fit, method="random"))
        layers = len(self.teacher.blocks) - len(keep)
        self.progress.start("fit", layers)
        with StopWish() as stop:

            def layer_done(report: LayerReport, done: int) -> None:
                self.progress.advance(done, {"error": report.error})
                if anywhere(stop.made, self.accelerator.device):
                    raise Interrupted("fit", done, layers)

            calibration = self.supply.plain(spread(self.train, fit.images), fit.batch_size)
            held_out = self.supply.plain(spread(self.unseen, fit.held_out), fit.batch_size)
            student, reports = convert(self.teacher, recipe, calibration, held_out, keep, on_layer=layer_done)
        self.store.notes |= {"layers": [asdict(report) for report in reports], "scores": {}}
        self.store.seconds_spent["fit"] = time.monotonic() - began
        self.store.finish("fit", 0, student)
        return student

    def _known(self, keep: Sequence[int] | Auto) -> Sequence[int]:
        """Blocks that have their attention now: with `Auto`, those that are settled already."""
        if not isinstance(keep, Auto):
            return keep
        kept: Sequence[int] = self.store.notes["selection"]["kept"] if STAGE in self.store.finished else ()
        return kept

    def _settle(self, auto: Auto, student: Gspn2Vit) -> Gspn2Vit:
        """Choose on the student as it is now, and give the chosen blocks their attention back."""
        if STAGE not in self.store.finished:
            kept = self._selector(auto).run(self.store.finished[-1], student, self.held_out)
            mixer = self.recipe.mixer.resolve(self.teacher.embed_dim)
            student = build_hybrid(student, self.teacher, kept, mixer)
            self.store.finish(STAGE, 0, student)
        self._score(STAGE, student)
        return student

    def _selector(self, auto: Auto) -> Selector:
        return Selector(self.teacher, auto, self.accelerator, self.store, self.progress)

    def _climb(self, student: Gspn2Vit) -> None:
        """Stage 3: one size after the other; the student stays at the last."""
        climbs, before = self.recipe.curriculum.steps > 0, self.supply.data_config["input_size"][1:]
        for name, spec, size in trained(self.recipe, [3]) if climbs else ():
            self._see(size)
            guide = None
            if name not in self.store.finished:
                # Resumed in this stage, the student has its size already; the guide's weights are in the checkpoint.
                guide = resized(student, before) if self.recipe.curriculum.target == "previous" else None
                student.set_input_size(_side(name))
            self._train(name, spec, functools.partial(self._curriculum_stage, before, guide), student)
            before = _side(name)

    def _see(self, size: int) -> None:
        """Take images of this size from here on; 0 is the teacher's own."""
        config = data_config(self.teacher)
        channels, *own = config["input_size"]
        config["input_size"] = (channels, *((size, size) if size else own))
        self.supply = Supply(
            *(self.images, self.train, config, self.recipe, self.accelerator),
            workers=self.options.workers,
            cached=self.options.cached,
        )
        self.held_out = HeldOut(self.teacher, self.supply.plain(self.unseen))

    def _train(self, name: str, spec: Align | Recover, objective: MakeObjective, student: Gspn2Vit) -> None:
        """Stage 1 or 2, or one size of stage 3, unless the checkpoint says that it is done."""
        if name not in self.store.finished:
            self.supply.prepare()  # before CUDA graphs take their memory
            with lend(student, self.taught, self.teacher, sharded=self.options.shard) as (learner, taught):
                train_stage(
                    name,
                    objective(learner, taught),
                    spec,
                    lambda first_step: self.supply.training(spec, _stage_seed(self.recipe.seed, name), first_step),
                    self.supply.shape(spec),
                    accelerator=self.accelerator,
                    store=self.store,
                    progress=self.progress,
                    evaluate=lambda: self.held_out.compare(learner),
                    eval_every=self.recipe.eval_every,
                    shard=self.options.shard,
                )
        self._score(name, student)

    def _recover_stage(self, student: Gspn2Vit, teacher: VisionTransformer) -> RecoverStage:
        return RecoverStage(student, teacher, self.recipe.recover.losses, self.held_out.deviations())

    def _curriculum_stage(
        self, before: tuple[int, int], guide: Gspn2Vit | None, student: Gspn2Vit, teacher: VisionTransformer
    ) -> RecoverStage:
        """Recovery at a size, taught by the teacher or by a guide at the size before."""
        spec, deviations = self.recipe.curriculum, self.held_out.deviations()
        if spec.target == "teacher":
            return RecoverStage(student, teacher, spec.losses, deviations)
        return ReducedStage(student, teacher, spec.losses, deviations, teacher if guide is None else guide, before)

    def _score(self, name: str, student: Gspn2Vit) -> None:
        """Note how good the student is after a stage, once."""
        scores = self.store.notes["scores"]
        if name not in scores:
            scores[name] = self.held_out.compare(student) | {"top1": self._top1(student)}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in scores[name].items() if value is not None)
            place = f"after {name}"
            if name == "fit" and self.given is not None:
                place = "the given student"
            elif name == "fit" and 0 not in self.options.stages:
                place = "the random start"
            self.progress.say(f"{place}: {shown}")

    def _top1(self, model: VisionTransformer) -> float | None:
        """Share of the test images that a model names right; None where their labels are not its classes."""
        if not self.labelled:
            return None
        how = {"device": self.accelerator.device, "workers": self.options.workers}
        found: float | None = evaluate(model, None, self.test, config=self.supply.data_config, **how).get("top1")
        return found

    def _teacher_top1(self, size: tuple[int, int]) -> float | None:
        """The same of the teacher, at the size (height, width) of the student's last scores."""
        as_it_is = not self.labelled or tuple(self.teacher.patch_embed.img_size) == tuple(size)
        return self._top1(self.teacher if as_it_is else resized(self.teacher, size))


def _side(name: str) -> tuple[int, int]:
    """Height and width of a size of stage 3, from its name."""
    size = int(name.removeprefix(CURRICULUM))
    return size, size


def _stage_seed(seed: int, name: str) -> int:
    """Seed of a stage's order and views; each stage has its own."""
    number = _STAGE_SEEDS.get(name)
    return generator(seed, name).initial_seed() if number is None else 2 * seed + number

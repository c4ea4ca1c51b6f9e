"""The training loop of all stages, on Accelerate: one process, several GPUs and several machines run the same code.

A step is a function of the weights, the optimizer's state, the images and the step's number. Nothing random and no
clock enters it, so a run that was killed and resumed ends, on the CPU, with the same bits as one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.errors import UserError
from gspn2convert.fsdp import part, whole
from gspn2convert.graphs import RecordedSteps
from gspn2convert.interrupt import Interrupted, StopWish
from gspn2convert.optim import Ema, load_optimizer, make_optimizer, optimizer_tensors, set_rates
from gspn2convert.processes import anywhere, average_gradients, start_alike
from gspn2convert.progress import Progress
from gspn2convert.recipe import Align, Recover
from gspn2convert.stage import Objective

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
MAX_SKIPPED = 24  # in a row: the fp16 scaler starts at 2^16, so by then it multiplies by less than 1/100

Batches = Callable[[int], Iterator[Tensor]]
Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What became of a stage.

    Attributes:
        stage: its name.
        steps: its steps.
        kept: "raw" or "ema", the weights that the student has now.
        evaluation: held-out figures of these weights.
        seconds: time it took, interruptions excluded.
    """

    stage: str
    steps: int
    kept: str
    evaluation: dict[str, float]
    seconds: float


def make_accelerator(device: str = "auto", precision: str = "fp32") -> Accelerator:
    """Set up training on this process, or as one of those that torchrun or `accelerate launch` started.

    Args:
        device: "auto" takes an accelerator if there is one; "cpu"; "cuda".
        precision: "fp32", "bf16" or "fp16"; the latter two by autocast, weights stay float32.

    Raises:
        UserError: the device is not there or cannot do this precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda': no CUDA device was found; use --device cpu, or see `gspn2convert doctor`")
    # Accelerate allows one setting for the life of a process; two conversions in one may differ.
    AcceleratorState._reset_state(reset_partial_state=not (dist.is_available() and dist.is_initialized()))
    # Where there is nothing else, processes must be told that they share the CPU's work, or each does all of it.
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=PRECISIONS[precision])
    if precision == "fp16" and accelerator.scaler is None:
        raise UserError(f"precision 'fp16' needs a GPU, not {accelerator.device.type}; use bf16 or fp32")
    return accelerator


def train_stage(
    name: str,
    objective: Objective,
    spec: Align | Recover,
    batches: Batches,
    shape: tuple[int, ...],
    *,
    accelerator: Accelerator,
    store: CheckpointStore,
    progress: Progress,
    evaluate: Evaluate,
    eval_every: int,
    shard: bool = False,
) -> StageResult:
    """Run a stage from its start, or from where the store's checkpoint left it.

    At the end the student has the better of its last weights and their moving average, is free of the stage's
    frozen parameters, and the store marks the stage as finished.

    Args:
        name: "align", "recover" or a size of the curriculum; names the stage in the checkpoint and messages.
        objective: the stage's loss; its teacher must be on the accelerator's device.
        spec: the stage's part of the recipe.
        batches: gives this process's images from a step on, on its device; step s must get the same images whenever
            asked.
        shape: of one of these batches, (B, channels, height, width).
        accelerator: see `make_accelerator`.
        store: where checkpoints go; loaded before if the run is resumed.
        progress: shows loss terms and speed.
        evaluate: held-out figures of the student as it is; "cosine" decides between raw and averaged weights.
        eval_every: steps between two evaluations.
        shard: spread the objective's models over the processes; they stay so. Otherwise each holds all of them.

    Raises:
        UserError: the loss or its gradient became NaN or infinite; the last checkpoint stays.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    training = _Training(name, objective, spec, shape, accelerator, store, shard)
    try:
        with StopWish() as stop:
            training.run(batches, progress, evaluate, eval_every, stop)
            result = training.finish(evaluate)
        if anywhere(stop.made, accelerator.device):
            raise Interrupted(name, spec.steps, spec.steps)
    finally:
        objective.forget()
        accelerator.free_memory()
    return result


class _Training:
    """State of a stage in training."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        spec: Align | Recover,
        shape: tuple[int, ...],
        accelerator: Accelerator,
        store: CheckpointStore,
        shard: bool,
    ) -> None:
        self.name, self.objective, self.spec = name, objective, spec
        self.accelerator, self.store, self.shard = accelerator, store, shard
        if shard:
            objective.shard(accelerator.device)
        else:
            start_alike(objective)
        groups = objective.groups(spec)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
        assert {id(p) for _, p in self.named} == {id(p) for p in self.parameters}
        on_gpu = accelerator.device.type == "cuda"
        # An fp16 scaler decides on the host whether a step is taken.
        capturable = on_gpu and not shard and accelerator.scaler is None
        optimizer = make_optimizer(spec.optimizer, groups, fused=on_gpu, capturable=capturable)
        if on_gpu and not shard:
            with accelerator.autocast():
                objective.record(torch.zeros(shape, device=accelerator.device), spec.steps)
        self.optimizer = accelerator.prepare(optimizer)
        self.take_step = RecordedSteps(optimizer) if capturable and objective.recorded else self.optimizer.step
        decay = spec.ema if isinstance(spec, Recover) else 0.0
        self.ema = Ema(objective.student, decay) if decay else None
        self.skipped = 0
        self.seconds = 0.0
        self.began = time.monotonic()
        self.first_step = self._restore()

    def run(self, batches: Batches, progress: Progress, evaluate: Evaluate, eval_every: int, stop: StopWish) -> None:
        """Take all steps that are left."""
        steps = self.spec.steps
        progress.start(self.name, steps, self.first_step)
        remaining = zip(range(self.first_step, steps), batches(self.first_step), strict=True)
        for step, images in remaining if self.first_step < steps else ():
            figures, stopping, due = self._step(step, images, stop)
            done = step + 1
            progress.advance(done, figures, len(images) * self.accelerator.num_processes)
            if done == steps:
                self._record(done, figures, progress.images_per_second)
                return
            if done % eval_every == 0:
                self._record(done, figures, progress.images_per_second, evaluate())
            if stopping or due:
                self._save(done)
            if stopping:
                raise Interrupted(self.name, done, steps)

    def finish(self, evaluate: Evaluate) -> StageResult:
        """Keep the better weights and close the stage."""
        student, kept, candidates = self.objective.student, "raw", {"raw": evaluate()}
        if self.ema is not None:
            self.ema.swap()
            candidates["ema"] = evaluate()
            raw, ema = self._everywhere([candidates["raw"]["cosine"], candidates["ema"]["cosine"]])
            if ema > raw:
                kept = "ema"
            else:
                self.ema.swap()
            logger.info("stage %s: held-out cosine raw %.4f, averaged %.4f; kept %s", self.name, raw, ema, kept)
        student.requires_grad_(True)
        self._note()
        seconds, scores = self.store.seconds_spent[self.name], candidates[kept]
        end = {"stage": self.name, "step": self.spec.steps, "kept": kept, "evaluation": scores}
        self.store.history.append(end | {"candidates": candidates})
        self.store.finish(self.name, self.spec.steps, student)
        return StageResult(stage=self.name, steps=self.spec.steps, kept=kept, evaluation=scores, seconds=seconds)

    def _step(self, step: int, images: Tensor, stop: StopWish) -> tuple[dict[str, float], bool, bool]:
        """One step; its loss terms over all processes, whether any of them wishes to stop, and whether to save."""
        set_rates(self.optimizer, step, self.spec.steps, self.spec.warmup)
        with self.accelerator.autocast():
            terms = self.objective(images, step / self.spec.steps)
        self.accelerator.backward(terms["loss"])
        if not self.shard:  # which averages its parts by itself
            average_gradients(self.parameters)
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters, self.spec.clip))
        # Each process has a clock of its own; that of the one that writes decides.
        wishes = stop.made, self.store.main and self.store.due(step + 1)
        asked = (torch.full_like(norm, float(wish)) for wish in wishes)
        figures = self._everywhere([*(term.detach() for term in terms.values()), norm, *asked])
        named = dict(zip([*terms, "gradient"], figures, strict=False))
        self._check(step, named)
        self.take_step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(step)
        return named, figures[-2] > 0, figures[-1] > 0

    def _everywhere(self, figures: list[Tensor] | list[float]) -> list[float]:
        """Means over all processes, so that all of them decide alike."""
        values = torch.stack([torch.as_tensor(each, device=self.accelerator.device).float() for each in figures])
        return self.accelerator.reduce(values, "mean").tolist()

    def _check(self, step: int, figures: dict[str, float]) -> None:
        """Stop before a bad gradient reaches the weights; a step that the fp16 scaler will skip may pass."""
        if math.isfinite(figures["loss"]) and math.isfinite(figures["gradient"]):
            self.skipped = 0
            return
        self.skipped += 1
        if self.accelerator.scaler is not None and self.skipped < MAX_SKIPPED:
            return
        what = "loss" if not math.isfinite(figures["loss"]) else "gradient"
        value = "NaN" if math.isnan(figures[what]) else "infinite"
        last = f"the last good checkpoint (stage {self.store.stage}, step {self.store.step})"
        kept = f"{last} is kept" if self.store.stage else "no checkpoint was written yet"
        raise UserError(
            f"{what} became {value} at stage {self.name} step {step + 1}; {kept}; "
            f"lower the learning rates (of {self.spec.place}) or train in fp32, and start again in a new folder"
        )

    def _record(
        self, done: int, figures: dict[str, float], rate: float, scores: dict[str, float] | None = None
    ) -> None:
        record: dict[str, Any] = {"stage": self.name, "step": done, **figures, "images_per_second": rate}
        self.store.history.append(record | ({"evaluation": scores} if scores else {}))

    def _note(self) -> None:
        """Bring what the store holds beside tensors up to date."""
        self.store.seconds_spent[self.name] = self.seconds + time.monotonic() - self.began
        if self.accelerator.scaler is not None:
            self.store.scaler = self.accelerator.scaler.state_dict()

    def _save(self, done: int) -> None:
        student_prefix = "student."
        tensors = {
            name if name.startswith(student_prefix) else f"stage.{name}": value
            for name, value in self.objective.state_dict().items()
        }
        state = optimizer_tensors(self.optimizer, self.named)
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": value for name, value in self.ema.average.items()}
        self._note()
        self.store.save(self.name, done, tensors)

    def _restore(self) -> int:
        """Go back to the store's checkpoint if it is of this stage; steps of it that are done."""
        store = self.store
        if self.accelerator.scaler is not None and store.scaler:
            self.accelerator.scaler.load_state_dict(store.scaler)
        if store.stage != self.name or self.name in store.finished:
            return 0
        student = {f"student.{name}": value for name, value in store.part("student.").items()}
        own = self.objective.state_dict()
        full = student | store.part("stage.")
        self.objective.load_state_dict({name: part(value, own[name]) for name, value in full.items()})
        load_optimizer(self.optimizer, self.named, store.part("optimizer."))
        if self.ema is not None:
            self.ema.load(store.part("ema."))
        self.seconds = store.seconds_spent.get(self.name, 0.0)
        store.tensors.clear()
        logger.info("stage %s: resumed after step %d of %d", self.name, store.step, self.spec.steps)
        return store.step

"""One file that holds a run: weights, optimizer and moving average as tensors, all else as JSON in its metadata."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gspn2convert.artifact import make_folder, write_atomic
from gspn2convert.differences import tell_differences
from gspn2convert.errors import UserError
from gspn2convert.fsdp import whole
from gspn2convert.unfinished import FILE_NAME, KEY


class CheckpointStore:
    """The checkpoint of one output folder, and what a run has to remember from stage to stage.

    Written atomically and by one process alone; every process reads it. When it is written depends on the clock
    and has no influence on what is computed.

    Args:
        folder: output folder.
        identity: what must be the same for a run to go on, for example the recipe's text; compared on `load`.
        main: whether this process writes.
        every: steps from one checkpoint to the next.
        seconds: at the latest after so many seconds, however few steps these are.
        share: at most this share of the time goes into writing, if need be by writing less often.

    Attributes:
        stage: the stage that the checkpoint was written in, "" without one.
        step: steps of that stage that are done.
        finished: stages that are done, in order.
        history: figures recorded on the way, one dictionary a record.
        seconds_spent: seconds that each stage has taken, interruptions excluded.
        notes: anything else that JSON can hold; it travels with each checkpoint.
        tensors: what the file held: "student.", "stage.", "ema." and "optimizer." followed by a name.
        scaler: state of the fp16 gradient scaler, {} without one.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        *,
        main: bool = True,
        every: int = 50,
        seconds: float = 30.0,
        share: float = 0.05,
    ) -> None:
        self.path = Path(folder) / FILE_NAME
        self.identity = dict(identity)
        self.main = main
        self.every, self.seconds, self.share = every, seconds, share
        self.stage, self.step = "", 0
        self.finished: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.seconds_spent: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self.scaler: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._cost, self._saved_at, self._saved_step = 0.0, time.monotonic(), 0

    def load(self) -> bool:
        """Read the file.

        Returns:
            Whether there is one.

        Raises:
            UserError: it is damaged, no checkpoint, or one of another run.
        """
        if not self.path.exists():
            return False
        record, self.tensors = _read(self.path)
        theirs = record["identity"]
        if theirs != self.identity:
            differing = sorted(k for k in {*theirs, *self.identity} if theirs.get(k) != self.identity.get(k))
            raise UserError(
                f"{self.path}: this run was started with different {', '.join(differing)}; "
                "resume with what it was started with, or choose another output folder"
                f"{tell_differences(theirs, self.identity)}"
            )
        for name in _RECORDED:
            setattr(self, name, record[name])
        self._saved_step = 0 if self.stage in self.finished else self.step
        return True

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Loaded tensors whose name starts with `prefix`, such as "student.", under the rest of their name."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def due(self, step: int) -> bool:
        """Whether it is time to save after so many steps of the stage."""
        elapsed = time.monotonic() - self._saved_at
        enough = elapsed >= self.seconds or abs(step - self._saved_step) >= self.every
        return enough and elapsed * self.share >= self._cost

    def save(self, stage: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the file; the old one stays until the new one is complete.

        Args:
            stage: the current stage.
            step: steps of it that are done.
            tensors: named as in `tensors`; of sharded ones the whole is written, so that all processes have to save.

        Raises:
            UserError: it cannot be written, for example because the disk is full.
        """
        began = time.monotonic()
        self.stage, self.step = stage, step
        content = {}
        for name, value in tensors.items():
            full = whole(value.detach())  # by all processes together
            if self.main:
                content[name] = full.cpu().contiguous()
        if self.main:
            record = {"identity": self.identity} | {name: getattr(self, name) for name in _RECORDED}
            make_folder(self.path.parent)
            write_atomic(self.path, save(content, {KEY: json.dumps(record)}))
        self._saved_at, self._saved_step = time.monotonic(), step
        self._cost = self._saved_at - began

    def finish(self, stage: str, step: int, student: nn.Module) -> None:
        """Mark a stage as done and save the student, which is all that later stages need."""
        self.finished.append(stage)
        self.tensors = {}
        self.save(stage, step, {f"student.{name}": value for name, value in student.state_dict().items()})
        self._saved_step = 0


_RECORDED = ("stage", "step", "finished", "history", "seconds_spent", "notes", "scaler")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of a checkpoint; the tensors are copies, the file is closed."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            # Fresh memory: aligned as torch aligns it, which vectorised sums may depend on in the last bit.
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({error}); remove it to start afresh, or restore it from a copy"
        ) from error
    if text is None:
        raise UserError(f"{path}: a safetensors file, but no checkpoint of this version of gspn2convert; move it away")
    return json.loads(text), tensors

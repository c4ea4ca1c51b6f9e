"""Where and how a conversion runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how a conversion runs; what it does is the recipe's.

    Attributes:
        output: folder to write.
        stages: which of 0 (fit), 1 (align), 2 (recover), 3 (curriculum) run; without 0 the mixers start at random.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16" (autocast).
        workers: processes that read images.
        cached: decode training images once and keep them on the device.
        resume: go on where an interrupted run stopped.
        quiet: show no progress.
        shard: spread models in training over the processes (FSDP2).
    """

    output: Path
    stages: tuple[int, ...] = (0, 1, 2, 3)
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    cached: bool = False
    resume: bool = False
    quiet: bool = False
    shard: bool = False

"""Which blocks keep attention: restored one by one in the converted student, the most useful first.

A block is restored for the time of a comparison by putting the teacher's own in its place. Before stage 2 nothing
but the mixers differs from the teacher, so what is compared is the hybrid itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.models import VisionTransformer

from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.held_out import HeldOut
from gspn2convert.interrupt import Interrupted, StopWish
from gspn2convert.keep import Auto
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.processes import anywhere
from gspn2convert.progress import Progress
from gspn2convert.vit import attention_sites

IMAGES = 256  # at most so many of those held out

STAGE = "select"

Figures = dict[str, float]
Measure = Callable[[Sequence[int]], Figures]

logger = logging.getLogger(__name__)


@contextmanager
def restored(student: Gspn2Vit, teacher: VisionTransformer, blocks: Sequence[int]) -> Iterator[None]:
    """Lend some of the teacher's blocks to the student, inside a `with`."""
    own = {i: student.blocks[i] for i in blocks}
    try:
        for i in own:
            student.blocks[i] = teacher.blocks[i]
        yield
    finally:
        for i, block in own.items():
            student.blocks[i] = block


def build_hybrid(student: Gspn2Vit, teacher: VisionTransformer, kept: Sequence[int], mixer: dict[str, Any]) -> Gspn2Vit:
    """Build the student in which some blocks have their attention back; the others keep their mixers as they are.

    Args:
        student: before stage 2, with mixers at all blocks; it is not changed.
        teacher: of this student.
        kept: blocks that get their attention back.
        mixer: keyword arguments of the student's mixers.
    """
    layers = [i for i in range(len(teacher.blocks)) if i not in kept]
    hybrid = build_student(teacher, layers, mixer)
    ours, theirs = attention_sites(student), attention_sites(hybrid)
    for i in layers:
        theirs[i].load_state_dict(ours[i].state_dict())
    return hybrid


def measure(student: Gspn2Vit, teacher: VisionTransformer, held_out: HeldOut, blocks: Sequence[int]) -> Figures:
    """Tell how far the student is from its teacher with some blocks restored.

    Returns:
        `divergence`, 1 - cosine of the final tokens, of which the prefix tokens count half and the patches half;
        `kl`, KL(teacher || student) of the logits, with a head; `retention`, the share of equal first guesses with
        a head and the cosine without one.
    """
    with restored(student, teacher, blocks):
        found = held_out.compare(student, with_kl=True)
    figures = {"divergence": 1 - found["cosine"], "retention": found.get("agreement", found["cosine"])}
    return figures | ({"kl": found["kl"]} if "kl" in found else {})


def greedy(depth: int, auto: Auto, rank: str, measured: Measure) -> list[int]:
    """Add the block that helps most, again and again, until there are enough or only one is left to convert.

    Args:
        depth: blocks of the teacher.
        auto: says when there are enough.
        rank: which figure is to be small; of equals, the first block is taken.
        measured: the figures of a set of blocks.

    Returns:
        Blocks in the order in which they were added.
    """
    chosen: list[int] = []
    while not auto.satisfied(len(chosen), measured(chosen)["retention"]) and len(chosen) < depth - 1:
        rest = [i for i in range(depth) if i not in chosen]
        chosen.append(min(rest, key=lambda i: measured([*chosen, i])[rank]))
    return chosen


def evenly_spaced(depth: int, count: int) -> list[int]:
    """`count` blocks at equal distances, the last of all among them: 3, 7, 11 for three of twelve."""
    return [(i + 1) * depth // count - 1 for i in range(count)]


class Selector:
    """Chooses blocks on the student as it is, and notes in the checkpoint what it found.

    Args:
        teacher: frozen ViT.
        auto: how many blocks.
        accelerator: where it has several processes, the first one's figures count.
        store: gets the note "selection": one record a pass, and `kept`, the blocks that the last one chose.
        progress: shows what goes on.
    """

    def __init__(
        self,
        teacher: VisionTransformer,
        auto: Auto,
        accelerator: Accelerator,
        store: CheckpointStore,
        progress: Progress,
    ) -> None:
        self.teacher, self.auto, self.depth = teacher, auto, len(teacher.blocks)
        self.accelerator, self.store, self.progress = accelerator, store, progress

    @property
    def passes(self) -> list[dict[str, Any]]:
        """What each pass found, in order."""
        note = self.store.notes.setdefault("selection", {"keep": str(self.auto), "passes": [], "kept": []})
        passes: list[dict[str, Any]] = note["passes"]
        return passes

    def run(self, after: str, student: Gspn2Vit, held_out: HeldOut) -> list[int]:
        """Choose on the student that a stage has left, unless this is noted already.

        Args:
            after: the stage.
            student: mixers at all blocks; as it was when this returns.
            held_out: images with what the teacher makes of them.

        Returns:
            The blocks, ascending.

        Raises:
            Interrupted: Ctrl-C or SIGTERM.
        """
        if after not in [each["after"] for each in self.passes]:
            began = time.monotonic()
            record = {"after": after, **self._pass(student.eval(), held_out.sample(IMAGES))}
            self._tell(record)
            self.passes.append(record)
            self.store.notes["selection"]["kept"] = record["chosen"]
            spent = self.store.seconds_spent
            spent[STAGE] = spent.get(STAGE, 0.0) + time.monotonic() - began
        kept: list[int] = self.store.notes["selection"]["kept"]
        return kept

    def _pass(self, student: Gspn2Vit, held_out: HeldOut) -> dict[str, Any]:
        """Every block alone, the greedy choice, and what to compare it with."""
        known: dict[tuple[int, ...], Figures] = {}
        rank = "kl" if held_out.with_logits else "divergence"
        tries = self._tries()
        self.progress.start(STAGE, tries)
        with StopWish() as stop:

            def measured(blocks: Sequence[int]) -> Figures:
                key = tuple(sorted(blocks))
                if key not in known:
                    figures = measure(student, self.teacher, held_out, key)
                    known[key], stopping = self._settled(figures, stop.made)
                    self.progress.advance(min(len(known), tries), {rank: known[key][rank]})
                    if stopping:
                        raise Interrupted(STAGE, len(known), tries)
                return known[key]

            alone = [{"layer": i, **measured([i])} for i in range(self.depth)]
            order = greedy(self.depth, self.auto, rank, measured)
            sets: dict[str, Sequence[int]] = {"none": (), "chosen": sorted(order)}
            if count := len(order):
                sets |= {"evenly spaced": evenly_spaced(self.depth, count)}
                sets |= {"last": range(self.depth - count, self.depth)}
            compared = [{"set": name, "layers": list(blocks), **measured(blocks)} for name, blocks in sets.items()]
        images = sum(map(len, held_out.images))
        found = {"images": images, "ranked_by": rank, "layers": alone, "order": order, "chosen": sorted(order)}
        return found | {"sets": compared}

    def _tries(self) -> int:
        """Sets that are measured, at most: those of each round, none, and two to compare with."""
        rounds = self.auto.count or self.depth - 1
        return rounds * self.depth - rounds * (rounds - 1) // 2 + 3

    def _settled(self, figures: Figures, stop: bool) -> tuple[Figures, bool]:
        """The figures of the first process, for the last bit may differ on another; and whether any of all stops."""
        if self.accelerator.num_processes == 1:
            return figures, stop
        values = torch.tensor([*figures.values()], dtype=torch.float64, device=self.accelerator.device)
        stopping = anywhere(stop, self.accelerator.device)
        return dict(zip(figures, broadcast(values).tolist(), strict=True)), stopping

    def _tell(self, record: dict[str, Any]) -> None:
        rank, chosen = record["ranked_by"], ", ".join(map(str, record["chosen"])) or "none"
        before = [each["chosen"] for each in self.passes[-1:]]
        change = "" if before in ([], [record["chosen"]]) else f" (before: {', '.join(map(str, before[0])) or 'none'})"
        compared = ", ".join(f"{each['set']} {each[rank]:.4f}" for each in record["sets"])
        self.progress.say(f"blocks to keep attention, after {record['after']}: {chosen}{change}; {rank}: {compared}")
        retention = record["sets"][1]["retention"]
        if not self.auto.satisfied(len(record["order"]), retention):
            logger.warning(
                "keep %s: retention is %.4f even with all blocks but one; %d of %d keep attention",
                *(self.auto, retention, len(record["order"]), self.depth),
            )

"""A training run of a few steps.

Run as a script, this file trains in a process of its own; the tests of signals and of several processes do that.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import timm
import torch

from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.interrupt import Interrupted
from gspn2convert.losses import token_deviations
from gspn2convert.model import build_student
from gspn2convert.progress import Progress
from gspn2convert.recipe import Align, Mixer, Recover
from gspn2convert.recover import RecoverStage
from gspn2convert.stage import AlignStage
from gspn2convert.train import make_accelerator, train_stage
from helpers import processes

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


def figures(history):
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in history]


def start(folder, task, **environment):
    """Run this file in another process."""
    return processes.start(__file__, folder, task, **environment)


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
        with torch.no_grad():
            for weight in run.student.parameters():
                weight.add_(rank)  # the first process's count
        run.train_both()
        sys.stdout.write(f"\n{json.dumps(run.store.history)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

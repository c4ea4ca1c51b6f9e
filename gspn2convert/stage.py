"""The training stages: what trains, and the loss of one batch.

Stage 1, align: every mixer alone learns to give what the attention gave, on the teacher's own inputs.
Stage 2, recover: the student as a whole learns to give the teacher's final tokens and logits.
Stage 3, curriculum: the same at larger and larger sizes.

All run the student in eval mode, gradients and all: dropout and stochastic depth stay off, so that a step
depends on weights and images alone and a resumed run repeats it exactly.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from gspn2_kernels import backend
from gspn2convert.fsdp import shard, whole
from gspn2convert.graphs import Pass, compiled, record
from gspn2convert.losses import relative_error, variance
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit
from gspn2convert.processes import several, world_mean
from gspn2convert.recipe import Align
from gspn2convert.taps import Taps
from gspn2convert.vit import attention_sites, blocks, final_tokens, grid_size, layer_scale, num_prefix

logger = logging.getLogger(__name__)

# Steps from which on to compile pays: by hand, it took 17 s and then 17 ms less of a step (DINOv2 ViT-S, H200).
COMPILED = 1000

Terms = dict[str, Tensor]
Group = dict[str, Any]  # a parameter group of a torch optimizer, with its "peak" and "final" learning rate


class Objective(nn.Module):
    """What the stages share.

    Args:
        student: put into eval mode.
        teacher: same architecture with its attention, on the same device as the images. It is no submodule:
            optimizers and checkpoints do not see it.
    """

    def __init__(self, student: Gspn2Vit, teacher: VisionTransformer) -> None:
        super().__init__()
        self.student = student.eval()
        self._teacher = (teacher.eval(),)
        mixers = dict(enumerate(attention_sites(student)))
        self.mixers = {site: mixer for site, mixer in mixers.items() if isinstance(mixer, Gspn2Mixer)}
        self.prefix = num_prefix(student)
        self.recorded: dict[int, Pass] = {}
        self.recorded_shape = torch.Size()
        assert self.mixers, "no converted layers: nothing to train"

    @property
    def teacher(self) -> VisionTransformer:
        """The frozen teacher."""
        return self._teacher[0]

    def groups(self, spec: Any) -> list[Group]:  # noqa: ANN401 - each stage has a spec type of its own
        """Parameter groups of what trains, with their peak and final learning rates."""
        raise NotImplementedError

    def record(self, images: Tensor, steps: int) -> None:
        """Record the stage's passes as CUDA graphs.

        Args:
            images: a batch (B, channels, height, width) of the shape that all will have.
            steps: how many there will be; many are worth the time that compiling takes.
        """

    def compiled(self, steps: int) -> AbstractContextManager[None]:
        """Have the parts of the student that train compiled inside a `with`, if for so many steps that is worth it."""
        if steps < COMPILED or backend("cuda") != "triton":  # which torch.compile needs as well
            return nullcontext()
        logger.info("compiling the student, whose %d steps will be shorter by that", steps)
        methods: list[tuple[nn.Module, str]] = [(mixer, "forward") for mixer in self.mixers.values()]
        for block in blocks(self.student):
            # Not the block itself: taps between these parts would have each block compiled by itself.
            methods += [(block.get_submodule("norm1"), "forward"), (block, "finish")]
        return compiled(methods)

    def run(self, terms: Pass, *inputs: Tensor) -> Terms:
        """Run a pass, by replay where it is recorded for so many inputs."""
        replay = self.recorded.get(len(inputs))
        assert not replay or inputs[0].shape == self.recorded_shape, "a graph would read other images as its own"
        return (replay or terms)(*inputs)

    def forget(self) -> None:
        """Free what `record` made."""
        self.recorded.clear()

    def shard(self, device: torch.device) -> None:
        """Spread all models over the processes of the run, for good."""
        shard(self, self.models(), device)

    def models(self) -> list[VisionTransformer]:
        """All models that a step runs."""
        return [self.student, self.teacher]

    def group(self, named: Iterable[tuple[str, nn.Parameter]], peak: float, final: float, decay: float) -> list[Group]:
        """Split by weight decay: vectors, and what timm exempts (position embeddings, prefix tokens), get none."""
        exempt = self.student.no_weight_decay()
        split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in named:
            split[parameter.ndim < 2 or name in exempt].append(parameter)
        rates = {"lr": peak, "peak": peak, "final": final}
        return [
            {"params": part, "weight_decay": each, **rates}
            for part, each in zip(split, (decay, 0.0), strict=True)
            if part
        ]


class AlignStage(Objective):
    """Layer-wise alignment: one teacher pass gives every converted layer its input and its target.

    The mixers' own parameters train; what they inherited to read prefix tokens and regions stays as it is: on the
    teacher's inputs the prefix tokens read exactly what they should already.
    """

    def __init__(self, student: Gspn2Vit, teacher: VisionTransformer) -> None:
        super().__init__(student, teacher)
        student.requires_grad_(False)
        for mixer in self.mixers.values():
            for parameter in mixer.own_parameters().values():
                parameter.requires_grad_(True)

    def groups(self, spec: Align) -> list[Group]:
        """One learning rate for all mixers, and a higher one for what makes their scans depend on content.

        Those weights start at 0. At the rate of the others they stay so small that neighbours count nearly alike.
        """
        named = [(name, value) for name, value in self.student.named_parameters() if value.requires_grad]
        control = [(name, value) for name, value in named if name.endswith(".control.weight")]
        others = [(name, value) for name, value in named if not name.endswith(".control.weight")]
        final, decay = spec.final_lr, spec.weight_decay
        return [*self.group(others, spec.lr, final, decay), *self.group(control, spec.control_lr, final, decay)]

    def forward(self, images: Tensor, progress: float) -> Terms:
        """Loss of one batch.

        Args:
            images: (B, channels, height, width), normalised.
            progress: unused; the loss is the same throughout.

        Returns:
            "loss", the mean over layers of the patches' relative error behind LayerScale, and "layer.I", each of them.
        """
        errors = self.run(self.terms, images)
        return {"loss": torch.stack(list(errors.values())).mean(), **errors}

    def terms(self, images: Tensor) -> Terms:
        """The "layer.I" of `forward`."""
        with torch.no_grad(), Taps(self.teacher, self.mixers) as taps:
            frozen_tokens(self.teacher, images)
        grid = grid_size(self.student, *images.shape[-2:])
        scales = [layer_scale(self.student.blocks[site]) for site in self.mixers]
        gammas = [None if scale is None else whole(scale) for scale in scales]
        targets = [taps.outputs[site][:, self.prefix :] for site in self.mixers]
        spreads = batch_spread(targets, gammas)
        errors = {}
        for (site, mixer), target, gamma, spread in zip(self.mixers.items(), targets, gammas, spreads, strict=True):
            output = mixer(taps.inputs[site], grid)[:, self.prefix :]
            errors[f"layer.{site}"] = relative_error(output, target, gamma, spread)
        return errors

    def record(self, images: Tensor, steps: int) -> None:
        """Record the pass, see `graphs.record`; not where processes must add their spreads up in the midst of it."""
        if not several():
            with self.compiled(steps):
                self.recorded = record(self.terms, [self.student], [(images,)])
            self.recorded_shape = images.shape


def frozen_tokens(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Final tokens (B, N, C) of a model that does not train, in its own dtype unless that is float32.

    Autocast would run the norms of a model in bfloat16 in float32.
    """
    dtype, device = vit.patch_embed.proj.weight.dtype, images.device.type
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and dtype == torch.float32):
        return final_tokens(vit, images.to(dtype))


@torch.no_grad()
def batch_spread(targets: list[Tensor], gammas: list[Tensor | None]) -> Tensor:
    """Denominators of the relative errors, one a layer, over the batch of all processes together."""
    means = world_mean(torch.stack([target.float().mean((0, 1)) for target in targets]))
    spreads = [variance(*each) for each in zip(targets, gammas, means, strict=True)]
    return world_mean(torch.stack(spreads))

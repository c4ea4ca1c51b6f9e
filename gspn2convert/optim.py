"""Learning rates, the optimizer's state by name, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gspn2convert.fsdp import own, part

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


def learning_rate(step: int, steps: int, *, warmup: float, peak: float, final: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine down to `final` at the last step.

    Args:
        step: number of the step, from 0.
        steps: steps of the stage.
        warmup: share of the steps that warm up.
        peak: highest rate, reached with the last step of the warm-up.
        final: rate of the last step.
    """
    warm = round(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - 1 - warm)
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


def optimizer_tensors(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """State of AdamW under the names of its parameters; those that have not had a gradient yet have none."""
    return {f"{name}.{key}": value for name, p in named for key, value in optimizer.state.get(p, {}).items()}


def load_optimizer(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back, moments where their parameter is, sharded if it is."""
    fused = optimizer.defaults["fused"]
    for name, parameter in named:
        if f"{name}.step" in tensors:
            step, *moments = (tensors[f"{name}.{key}"] for key in MOMENTS)
            moved = (part(moment, parameter) for moment in moments)
            # A fused step counts on the device, any other on the CPU.
            counted = step.to(parameter.device) if fused else step.cpu()
            optimizer.state[parameter] = dict(zip(MOMENTS, (counted, *moved), strict=True))


class Ema:
    """Exponential moving average of a module's parameters, in float32.

    The first steps average over less, so that a short stage is not held back by the weights it began with.

    Args:
        module: whose parameters are averaged.
        decay: share of the average that stays at each step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(module.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, numbered from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [own(p.detach()).float() for p in self._parameters.values()]
        torch._foreach_lerp_([own(each) for each in self.average.values()], weights, 1 - decay)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put an average back."""
        for name, value in self.average.items():
            value.copy_(part(tensors[name], value))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights with their average; a second call undoes it."""
        for name, parameter in self._parameters.items():
            weights = parameter.float().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weights)

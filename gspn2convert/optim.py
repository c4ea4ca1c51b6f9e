"""Learning rates, the optimizers and their state by name, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gspn2convert.fsdp import own, part
from gspn2convert.muon import Muon
from gspn2convert.recipe_values import OptimizerName

STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what AdamW keeps for a parameter, and Muon
BETAS = (0.9, 0.95)


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


def make_optimizer(
    kind: OptimizerName, groups: list[dict[str, Any]], *, fused: bool, capturable: bool = False
) -> Optimizer:
    """Make the optimizer of a stage.

    Args:
        kind: "adamw", or "muon" for `MuonAdamW`.
        groups: parameter groups, each with its learning rate and weight decay.
        fused: whether AdamW is one kernel, as it can be on a GPU.
        capturable: whether a CUDA graph may be made of its steps, which reads learning rates from the device.
    """
    how = {"fused": fused, "capturable": capturable}
    if capturable:
        groups = [{**group, "lr": torch.tensor(group["lr"], device=group["params"][0].device)} for group in groups]
    return MuonAdamW(groups, **how) if kind == "muon" else AdamW(groups, betas=BETAS, **how)


def set_rates(optimizer: Optimizer, step: int, steps: int, warmup: float) -> None:
    """Set the `learning_rate` of each group, between its "peak" and its "final" one."""
    for group in optimizer.param_groups:
        rate = learning_rate(step, steps, warmup=warmup, peak=group["peak"], final=group["final"])
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def moments(kind: OptimizerName, parameters: Iterable[nn.Parameter]) -> int:
    """Count the numbers that an optimizer keeps of its parameters: two of each by AdamW, one of a matrix's by Muon."""
    return sum(p.numel() * (1 if kind == "muon" and p.ndim == 2 else 2) for p in parameters)


class MuonAdamW(Optimizer):
    """Muon for weights of two dimensions and AdamW for all others, as one optimizer; arguments as above."""

    def __init__(self, groups: list[dict[str, Any]], *, fused: bool, capturable: bool) -> None:
        halves = []
        for group in groups:
            split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
            for parameter in group["params"]:
                split[parameter.ndim == 2].append(parameter)
            halves += [{**group, "params": half, "muon": bool(i)} for i, half in enumerate(split) if half]
        super().__init__(halves, {"fused": fused, "capturable": capturable})
        self._parts: dict[bool, Optimizer] = {}
        if matrices := self._groups(muon=True):
            self._parts[True] = Muon(matrices)
        if others := self._groups(muon=False):
            self._parts[False] = AdamW(others, betas=BETAS, fused=fused, capturable=capturable)

    def _groups(self, *, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    # Gradients are there already: a closure that computes them is not taken, but Accelerate says that it has none.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients."""
        assert closure is None
        for muon, optimizer in self._parts.items():
            # Groups and state are this optimizer's: loading a state makes them new.
            optimizer.param_groups, optimizer.state = self._groups(muon=muon), self.state
            optimizer.step()


def optimizer_tensors(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """State of an optimizer under the names of its parameters; those that have not had a gradient yet have none."""
    return {f"{name}.{key}": value for name, p in named for key, value in optimizer.state.get(p, {}).items()}


def load_optimizer(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back, moments where their parameter is, sharded if it is."""
    fused = optimizer.defaults["fused"]
    for name, parameter in named:
        found = {key: tensors[f"{name}.{key}"] for key in STATE if f"{name}.{key}" in tensors}
        state = {key: part(moment, parameter) for key, moment in found.items() if key != "step"}
        if "step" in found:
            # A fused step counts on the device, any other on the CPU.
            state["step"] = found["step"].to(parameter.device) if fused else found["step"].cpu()
        if state:
            optimizer.state[parameter] = state


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

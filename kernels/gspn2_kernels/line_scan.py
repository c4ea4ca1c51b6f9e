"""The torch op `gspn2::line_scan`: checks, fake, autograd, autocast and FLOP rules, and the choice of a backend.

Shapes: B batch, H W grid, C channels, G groups, K = 3 neighbours.
"""

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.eager import line_scan_bwd, line_scan_fwd
from gspn2_kernels.operands import DTYPES, autocast_wanted, empty_result, exporting, register_autocast
from gspn2_kernels.registration import define

_log = logging.getLogger(__name__)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Gradients]


class _Context(Protocol):
    """What autograd hands from the forward to the backward."""

    segment: int
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...  # noqa: FBT001


class Training(NamedTuple):
    """How a backend trains if its backward wants more than the inputs.

    Attributes:
        forward: `(x, lam, logits, u, segment)` to y and states.
        backward: `(dy, x, lam, logits, u, segment, states)` to the gradients of x, lam, logits and u.
        empty_states: x to a tensor like the states, whose values do not matter.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor], Gradients]
    empty_states: Callable[[Tensor], Tensor]


class _Backend(NamedTuple):
    name: str
    forward: Forward
    backward: Backward
    training: Training | None = None


_EAGER = _Backend("eager", line_scan_fwd, line_scan_bwd)
_BACKENDS: dict[str, _Backend] = {}
_ARGUMENTS = "Tensor x, Tensor lam, Tensor logits, Tensor u, int segment"
# Multiply-adds per element of y: three neighbours, lam * x and u * h; 2 FLOPs each, as for a matrix product.
FLOPS_PER_ELEMENT = 2 * 5


def line_scan(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int = 0) -> Tensor:
    """Scan the grid line by line in four directions: down, up, right, left.

    The four tensors share one dtype (fp64, fp32, fp16 or bf16) and one device, and may be strided views. Under
    autocast they are cast to the autocast dtype, except fp64 tensors. Weights and state are fp32, or fp64 for fp64.

    Args:
        x: Activations (B, H, W, C).
        lam: Input scale of each direction (B, H, W, 4, C).
        logits: Propagation logits of each direction (B, H, W, 4, G, K), shared by the C/G channels of a group.
        u: Output gate of each direction (B, H, W, 4, C).
        segment: Lines after which a scan restarts, counted in scan order; 0 for one scan over the whole grid.

    Returns:
        u * h of each direction (B, H, W, 4, C) in the dtype of x: contiguous, or in planes of one direction if lam is,
        without gaps.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    y: Tensor
    # Autocast first: its rule comes back here with tensors of one dtype. An export wants the one plain node.
    if not autocast_wanted(x.device.type) and not exporting():
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, lam, logits, u))
        if wanted and _backend(x.device, x.dtype).training is not None:
            y, _ = torch.ops.gspn2.line_scan_train(x, lam, logits, u, segment)
            return y
    y = torch.ops.gspn2.line_scan(x, lam, logits, u, segment)
    return y


def register_backend(
    device_type: str, name: str, forward: Forward, backward: Backward, training: Training | None = None
) -> None:
    """Run the op on one type of device, such as "cuda", with these two functions instead of plain torch.

    `forward(x, lam, logits, u, segment)` returns y, laid out as `operands.empty_result`, and
    `backward(dy, x, lam, logits, u, segment)` the gradients of x, lam, logits and u, new and contiguous. All are in the
    dtype of x, and inputs have any strides. With `training`, a forward whose gradients are wanted keeps states for the
    backward. fp64 always runs in plain torch.
    """
    _BACKENDS[device_type] = _Backend(name, forward, backward, training)
    _log.info("line_scan on %s runs with backend %s", device_type, name)


def backend(device: str | torch.device = "cpu") -> str:
    """Name the backend that the op uses on a device: "triton" or "eager", or what `register_backend` named."""
    return _backend(torch.device(device)).name


def _backend(device: torch.device, dtype: torch.dtype = torch.float32) -> _Backend:
    if device.type == "cuda":
        _register_triton()
    return _EAGER if dtype == torch.float64 else _BACKENDS.get(device.type, _EAGER)


@cache
def _register_triton() -> None:
    """Make Triton the backend of CUDA devices, at their first use: most programs on a CPU never need the import."""
    if "cuda" in _BACKENDS:
        return
    try:
        from gspn2_kernels import triton_line_scan as kernels
    except ImportError as error:
        _log.warning("line_scan on CUDA runs in plain torch, which is far slower: %s; pip install triton", error)
        return
    training = Training(kernels.line_scan_train, kernels.line_scan_bwd, kernels.empty_states)
    register_backend("cuda", "triton", kernels.line_scan_fwd, kernels.line_scan_recomputed_bwd, training)


def _check(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int) -> None:
    """Raise a ValueError that names the first argument that does not fit the others."""
    _check_shapes(x, lam, logits, u)
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("lam", lam), ("logits", logits), ("u", u)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {x.dtype}, the dtype of x")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device}, the device of x")
    check_segment(segment)


def check_segment(segment: int) -> None:
    """Raise a ValueError where scans cannot restart after so many lines."""
    if segment < 0:
        raise ValueError(f"segment is {segment}, expected 0 (no restart) or a number of lines")


def _check_shapes(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, H, W, C)")
    *grid, channels = x.shape
    for name, tensor in (("lam", lam), ("u", u)):
        expected = (*grid, 4, channels)
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (B, H, W, 4, C) = {expected}")
    if logits.ndim != 6 or logits.shape[:4] != (*grid, 4) or logits.shape[5] != 3:
        expected_text = f"({', '.join(map(str, grid))}, 4, G, 3)"
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, H, W, 4, G, 3) = {expected_text}")
    groups = logits.shape[4]
    if groups < 1 or channels % groups:
        raise ValueError(f"logits has {groups} groups, expected a divisor of the {channels} channels of x")


@define(f"line_scan({_ARGUMENTS}) -> Tensor")
def _line_scan(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int) -> Tensor:
    _check(x, lam, logits, u, segment)
    return _backend(x.device, x.dtype).forward(x, lam, logits, u, segment)


@torch.library.register_fake("gspn2::line_scan")
def _line_scan_fake(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int) -> Tensor:
    _check(x, lam, logits, u, segment)
    return empty_result(x, lam)


@define(f"line_scan_train({_ARGUMENTS}) -> (Tensor y, Tensor states)")
def _line_scan_train(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int) -> tuple[Tensor, Tensor]:
    _check(x, lam, logits, u, segment)
    return _training(x).forward(x, lam, logits, u, segment)


@torch.library.register_fake("gspn2::line_scan_train")
def _line_scan_train_fake(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int) -> tuple[Tensor, Tensor]:
    _check(x, lam, logits, u, segment)
    return empty_result(x, lam), _training(x).empty_states(x)


def _training(x: Tensor) -> Training:
    training = _backend(x.device, x.dtype).training
    assert training is not None
    return training


@define(
    f"line_scan_backward(Tensor dy, {_ARGUMENTS}, Tensor? states=None)"
    " -> (Tensor dx, Tensor dlam, Tensor dlogits, Tensor du)"
)
def _line_scan_backward(
    dy: Tensor, x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int, states: Tensor | None = None
) -> Gradients:
    if states is None:
        return _backend(x.device, x.dtype).backward(dy, x, lam, logits, u, segment)
    return _training(x).backward(dy, x, lam, logits, u, segment, states)


@torch.library.register_fake("gspn2::line_scan_backward")
def _line_scan_backward_fake(
    dy: Tensor, x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int, states: Tensor | None = None
) -> Gradients:
    return x.new_empty(x.shape), x.new_empty(lam.shape), x.new_empty(logits.shape), x.new_empty(u.shape)


def _save_inputs(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    *tensors, ctx.segment = inputs
    ctx.save_for_backward(*tensors)


def _save_states(
    ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.segment = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    # PyTorch would make a gradient of zeros for the states, as large as they are.
    ctx.set_materialize_grads(False)


def _gradients(ctx: _Context, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if dy is None:  # of a function that gives none
        return (None,) * 5
    x, lam, logits, u, *states = ctx.saved_tensors
    return *torch.ops.gspn2.line_scan_backward(dy, x, lam, logits, u, ctx.segment, *states), None


torch.library.register_autograd("gspn2::line_scan", _gradients, setup_context=_save_inputs)
torch.library.register_autograd("gspn2::line_scan_train", _gradients, setup_context=_save_states)


# The function, not the op: after the cast it still has to choose the forward that keeps states.
register_autocast("line_scan", line_scan)


@register_flop_formula([torch.ops.gspn2.line_scan, torch.ops.gspn2.line_scan_train])
def _line_scan_flops(x: torch.Size, lam: torch.Size, *_: object, **__: object) -> int:
    return FLOPS_PER_ELEMENT * math.prod(lam)

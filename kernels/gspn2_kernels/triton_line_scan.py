"""The line scan on a GPU by Triton: checks of memory layout, and launches.

Shapes: B batch, H W grid, C channels, G groups, K = 3 neighbours; T lines of M positions in a direction.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gspn2_kernels.memory import CACHE_LINE, by_pixel, cdiv, power_of_2, shared_memory, takes_hints
from gspn2_kernels.operands import empty_result
from gspn2_kernels.triton_backward import line_scan_bwd_kernel
from gspn2_kernels.triton_forward import line_scan_fwd_kernel
from gspn2_kernels.triton_gradients import gradients_kernel
from gspn2_kernels.triton_weights import line_weights
from gspn2_kernels.tuning import Plan, plan

# Of the pass of the gradients: bytes of dx that a program makes, a vector for each of its threads, its warps, and most
# pixels, where channels are few.
_MADE, _WARPS = 1024, 2
_PIXELS = 256
# States of 16-bit inputs are saved in fp16 up to this number of lines; beyond, its rounding would show in the logits'
# gradients, which live on differences of neighbouring states.
_FP16_LINES = 256


def line_scan_fwd(
    x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int, *, chosen: Plan | None = None
) -> Tensor:
    """Compute `gspn2::line_scan`; arguments as for `line_scan_train`."""
    return _forward(x, lam, logits, u, segment, None, chosen)


def line_scan_train(
    x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int, *, chosen: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `gspn2::line_scan` and keep the states; arguments as in `line_scan_ref`, in fp32, fp16 or bf16.

    Args:
        x: (B, H, W, C).
        lam: (B, H, W, 4, C).
        logits: (B, H, W, 4, G, K).
        u: (B, H, W, 4, C).
        segment: Lines after which a scan restarts, or 0.
        chosen: Constants of the kernel; by default those of the table.

    Returns:
        y (B, H, W, 4, C), and the states as `line_scan_bwd` takes them.

    Raises:
        ValueError: An image is too large for the offsets of the kernel.
    """
    states = empty_states(x)
    return _forward(x, lam, logits, u, segment, states, chosen), states


def _forward(
    x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int, states: Tensor | None, chosen: Plan | None
) -> Tensor:
    batch, height, width, channels = x.shape
    y = empty_result(x, lam)
    if y.numel() == 0:
        return y
    chosen = chosen or _table(x, logits, "forward" if states is None else "train")
    x, lam, u, logits = by_pixel(x), by_pixel(lam), by_pixel(u), _readable(logits, chosen)
    _check_offsets(x, lam, logits, u, y)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device_of(x):
        weights = line_weights(logits, segment) if chosen.APART else logits
        scan_forward((x, lam, weights, u), y, states, segment, chosen, _strides(x, lam, u, logits))
    return y


def scan_forward(
    inputs: tuple[Tensor | None, Tensor, Tensor, Tensor],
    y: Tensor,
    states: Tensor | None,
    segment: int,
    chosen: Plan,
    constants: dict[str, int],
) -> None:
    """Launch the forward on the current device, which is to be that of the tensors.

    Args:
        inputs: x, lam, weights or logits, and u as `line_scan_fwd_kernel` takes them: without x, the others in planes.
        y: Where the result goes (B, H, W, 4, C).
        states: Where the states go, or None.
        segment: Lines after which a scan restarts, or 0.
        chosen: Constants of the kernel.
        constants: The strides among them, and the channels of a group.
    """
    batch, height, width, _, channels = y.shape
    shape = (batch, height, width, channels)
    x, lam, weights, u = inputs
    # Those of planes follow from the sizes.
    by_image = [0, 0, 0] if x is None else [t.stride(0) for t in (x, lam, u)]
    by_image.insert(2, _between_images(weights, chosen))
    constants = {**constants, "SY": y.stride(2), "SYD": y.stride(3), "HOLD": x is not None and _holds(x, chosen)}
    scratch = _scratch(shape, chosen, y.device)
    for launch, first, last in _launches(shape, chosen):
        line_scan_fwd_kernel[_grid(shape, chosen)](
            *inputs, y, y if states is None else states, scratch, first, last, launch, height, width,
            segment or height + width, 1 / _state_scale(y), *by_image, C=channels, SAVE=states is not None,
            **constants, **_planned(chosen, constants["GC"]),
        )  # fmt: skip


def line_scan_recomputed_bwd(
    dy: Tensor, x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of a forward that kept no states: scan once more, then as `line_scan_bwd`."""
    _, states = line_scan_train(x, lam, logits, u, segment)
    return line_scan_bwd(dy, x, lam, logits, u, segment, states)


def line_scan_bwd(
    dy: Tensor,
    x: Tensor,
    lam: Tensor,
    logits: Tensor,
    u: Tensor,
    segment: int,
    states: Tensor,
    *,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, lam, logits and u from dy (B, H, W, 4, C) and the states that the forward saved.

    The sums over directions and channels are made in a fixed order: equal bits from run to run.
    """
    batch, height, width, channels = x.shape
    dx, dlam, dlogits, du = (torch.empty(t.shape, dtype=x.dtype, device=x.device) for t in (x, lam, logits, u))
    if lam.numel() == 0:
        return dx.zero_(), dlam, dlogits.zero_(), du
    chosen = chosen or _table(x, logits, "backward")
    dy, x, lam, u, logits = by_pixel(dy), by_pixel(x), by_pixel(lam), by_pixel(u), _readable(logits, chosen)
    strides = {**_strides(x, lam, u, logits), "SY": dy.stride(2), "SYD": dy.stride(3)}
    _check_offsets(x, lam, logits, u, dy, dlogits)
    with torch.cuda.device_of(x):
        # A gradient of a state can be far larger or smaller than those of the inputs, and fp16 ends at 65504 and 6e-8.
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        g = torch.empty(batch, 4, height * width, channels, dtype=dtype, device=x.device)
        weights = line_weights(logits, segment) if chosen.APART else logits
        _scan_backward((u, dy, weights), g, segment, chosen, strides)
        _gradients((x, lam, logits, dy), states, g, segment, strides, (dx, dlam, dlogits, du))
    return dx, dlam, dlogits, du


def _scan_backward(
    inputs: tuple[Tensor, Tensor, Tensor], g: Tensor, segment: int, chosen: Plan, strides: dict[str, int]
) -> None:
    """Fill g (B, 4, T M, C), the gradients of the states, line by line in scan order."""
    u, dy, weights = inputs
    batch, height, width, _, channels = u.shape
    shape = (batch, height, width, channels)
    constants = {name: strides[name] for name in ("GC", "SU", "SUD", "SY", "SYD", "SA", "SAD", "SAG")}
    scratch = _scratch(shape, chosen, g.device)
    for launch, first, last in _launches(shape, chosen):
        line_scan_bwd_kernel[_grid(shape, chosen)](
            u, dy, weights, g, scratch, first, last, launch, height, width, segment or height + width, u.stride(0),
            dy.stride(0), _between_images(weights, chosen), C=channels, **constants,
            **_planned(chosen, constants["GC"]),
        )  # fmt: skip


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    states: Tensor,
    g: Tensor,
    segment: int,
    strides: dict[str, int],
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill the gradients of x, lam, logits and u, from those of the states and x, lam, logits and dy."""
    x, lam, logits, dy = inputs
    batch, height, width, channels = x.shape
    groups = logits.shape[4]
    wide = power_of_2(channels // groups)
    pixels = min(_PIXELS, max(1, _MADE // x.element_size() // (power_of_2(groups) * wide)))
    rows = 1 << (pixels.bit_length() - 1) // 2
    columns = pixels // rows
    constants = {name: value for name, value in strides.items() if name not in ("GC", "SU", "SUD")}
    gradients_kernel[(cdiv(height, rows) * cdiv(width, columns), batch)](
        x, lam, logits, dy, states, g, *out, height, width, segment or height + width, _state_scale(x), x.stride(0),
        lam.stride(0), logits.stride(0), dy.stride(0), C=channels, G=groups, TH=rows, TW=columns, BG=power_of_2(groups),
        BC=wide, num_warps=_WARPS, **constants,
    )  # fmt: skip


def empty_states(x: Tensor) -> Tensor:
    """Make room for the states of a forward, line by line in scan order: (B, 4, T M, C), fp16 or fp32."""
    batch, height, width, channels = x.shape
    dtype = torch.float16 if _keeps_fp16(x) else torch.float32
    return torch.empty(batch, 4, height * width, channels, dtype=dtype, device=x.device)


def _table(x: Tensor, logits: Tensor, kernel: str) -> Plan:
    return plan(*x.shape, logits.shape[4], x.element_size(), kernel, shared=shared_memory(x.device))


def _grid(shape: Sequence[int], chosen: Plan) -> tuple[int, int, int]:
    return cdiv(shape[3], chosen.tile) * chosen.GRID, 4, shape[0]


def _launches(shape: Sequence[int], chosen: Plan) -> Iterator[tuple[int, int, int]]:
    """Number the launches for a shape (B, H, W, C); each has a first line and the one after its last."""
    longest = max(shape[1], shape[2])
    lines = chosen.lines_per_launch(shape[1], shape[2])
    for launch, first in enumerate(range(0, longest, lines)):
        yield launch, first, first + lines


def _check_offsets(*tensors: Tensor) -> None:
    """Make sure that 32 bits hold the size of every image, and 16 their number."""
    for t in tensors:
        if t.shape[0] >= 2**16:
            raise ValueError(f"{t.shape[0]} images are more than a launch can take; scan at most 65535 at a time")
        if 1 + sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31:
            raise ValueError(
                f"an image of shape {tuple(t.shape[1:])} spans over 2^31 elements; split it, or scan on the CPU"
            )


def _planned(chosen: Plan, group: int) -> dict[str, int]:
    """Name what a scan's launch takes from its plan, for groups of so many channels."""
    return {**chosen._asdict(), "SHARE": chosen.shares(group), "num_warps": chosen.WC}


def _holds(x: Tensor, chosen: Plan) -> bool:
    """Tell whether a program's channels of a pixel are a line of a cache that takes hints, with a lane for each."""
    size = x.element_size()
    aligned = not any(n % CACHE_LINE for n in (x.data_ptr(), x.stride(0) * size, x.stride(2) * size))
    return chosen.tile * size == CACHE_LINE and aligned and chosen.P <= chosen.CL and takes_hints(x.device)


def _between_images(weights: Tensor, chosen: Plan) -> int:
    """Tell the batch stride of logits; that of weights follows from the sizes, and is not to compile a kernel anew."""
    return 0 if chosen.APART else weights.stride(0)


def _strides(x: Tensor, lam: Tensor, u: Tensor, logits: Tensor) -> dict[str, int]:
    """Name the strides that are constants of a kernel, and the channels of a group: with them, loads are vectors."""
    strides = {"SX": x.stride(2), "SL": lam.stride(2), "SLD": lam.stride(3), "SU": u.stride(2), "SUD": u.stride(3)}
    strides |= dict(zip(("SA", "SAD", "SAG"), logits.stride()[2:5], strict=True))
    return {"GC": x.shape[3] // logits.shape[4], **strides}


def _readable(logits: Tensor, chosen: Plan) -> Tensor:
    """Give every three logits room for a fourth, which a scan reads along and ignores; copy only if there is none."""
    if chosen.APART:
        return by_pixel(logits)
    room = logits.untyped_storage().nbytes() // logits.element_size() - logits.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True))
    regular = logits.stride(-1) == 1 and logits.stride(1) == logits.shape[2] * logits.stride(2)
    if regular and logits.stride(3) % 4 == 0 and logits.stride(4) % 4 == 0 and last + 4 <= room:
        return logits
    return torch.nn.functional.pad(logits, (0, 1))[..., :3]


def _scratch(shape: Sequence[int], chosen: Plan, device: torch.device) -> Tensor:
    """Make room for the states that one launch hands to the next: two buffers of a line, for every scan."""
    batch, height, width, channels = shape
    block = chosen.tile
    numbers = batch * 4 * 2 * max(height, width) * cdiv(channels, block) * block
    return torch.empty(numbers if chosen.GRID > 1 else 0, dtype=torch.float32, device=device)


def _keeps_fp16(x: Tensor) -> bool:
    return x.element_size() == 2 and max(x.shape[1], x.shape[2]) <= _FP16_LINES


def _state_scale(x: Tensor) -> float:
    """Tell the power of two that saved states are divided by: |h| grows with the lines, and fp16 ends at 65504."""
    return float(2 ** math.ceil(math.log2(max(x.shape[1], x.shape[2])))) if _keeps_fp16(x) else 1.0

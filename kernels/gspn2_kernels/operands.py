"""What the ops ask of their tensors, and how autocast casts them."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gspn2_kernels.registration import LIBRARY, Function

_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def empty_result(x: Tensor, lam: Tensor) -> Tensor:
    """Make the tensor that the scans write, in the memory layout of lam where that has the directions outermost.

    Args:
        x: (B, H, W, C).
        lam: (B, H, W, 4, C).

    Returns:
        (B, H, W, 4, C) in the dtype of x: contiguous, or in planes of one direction if lam is, without gaps.
    """
    batch, height, width, channels = x.shape
    planes = (height * width * channels, width * channels, channels, batch * height * width * channels, 1)
    if all(map(_equal, lam.stride(), planes)):
        return x.new_empty_strided(lam.shape, planes)
    return x.new_empty(lam.shape)


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Compare two strides, False where it depends on data: a mask's number of images is not known ahead."""
    equal = a == b
    if isinstance(equal, bool):
        return equal
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import

    return bool(guard_or_false(equal))


def by_triton(t: Tensor) -> bool:
    """Tell whether kernels run on this tensor: not in an export, whose result shall run anywhere."""
    return t.is_cuda and t.dtype != torch.float64 and _TRITON and not (exporting() or torch.onnx.is_in_onnx_export())


def _called(function: Function) -> Function:
    """Have torch.compile call a function where it traces, and take the result for a constant.

    PyTorch 2.11 takes `is_exporting` for true where it traces it, and knows no way through `is_autocast_available`.
    This is all that `torch.compiler.assume_constant_result` does, whose import takes two seconds.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@_called
def exporting() -> bool:
    """Tell whether torch.export runs."""
    return torch.compiler.is_exporting()


def at_least(size: Any, least: float) -> Any:  # noqa: ANN401 - a number, symbolic in an export, a tensor in a trace
    """Return the larger of a size, or a ratio of sizes, and a bound."""
    return size.clamp(min=least) if isinstance(size, Tensor) else torch.sym_max(size, least)


def at_most(size: Any, most: float) -> Any:  # noqa: ANN401 - as above
    """Return the smaller of a size and a bound."""
    return size.clamp(max=most) if isinstance(size, Tensor) else torch.sym_min(size, most)


def check_first(name: str, form: str, t: Tensor) -> None:
    """Raise a ValueError where the tensor that all others are compared with has another form or a dtype unknown."""
    if t.ndim != form.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {form}")
    if t.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def check_kernel(name: str, t: Tensor) -> None:
    """Raise a ValueError for a dtype that plain torch alone computes in."""
    if t.dtype == torch.float64:
        raise ValueError(f"{name} has dtype {t.dtype}, for which there is no kernel")


def check_other(
    name: str, form: str, t: Tensor | None, shape: tuple[int, ...], first: Tensor, *other_dtypes: torch.dtype
) -> None:
    """Raise a ValueError that says how a tensor, if there is one, does not fit the first one."""
    if t is None:
        return
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {form} = {shape}")
    if t.dtype not in (first.dtype, *other_dtypes):
        choices = " or ".join(map(str, (first.dtype, *other_dtypes)))
        raise ValueError(f"{name} of shape {shape} has dtype {t.dtype}, expected {choices}, as others have")
    if t.device != first.device:
        raise ValueError(f"{name} of shape {shape} is on {t.device}, expected {first.device}, where others are")


def autocast_wanted(device_type: str) -> bool:
    """Tell whether autocast is on for a type of device; some types, such as "meta", know no autocast."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


@_called
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """Switch autocast off within a `with`, where it is on."""
    return torch.autocast(device_type, enabled=False) if autocast_wanted(device_type) else nullcontext()


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast tensors as autocast, where it is on, casts those of a linear layer."""
    if not autocast_wanted(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def register_autocast(name: str, function: Callable[..., Any], wide: tuple[int, ...] = ()) -> None:
    """Give an op its rule: cast all tensors but those at the places `wide`, then call the function.

    `torch.library.register_autocast` knows one fixed dtype only, not the dtype that the user chose.
    """
    for device_type in ("cpu", "cuda"):
        LIBRARY.impl(name, _rule(function, wide, device_type), f"Autocast{device_type.upper()}")


def _rule(function: Callable[..., Any], wide: tuple[int, ...], device_type: str) -> Callable[..., Any]:
    def rule(*arguments: Any) -> Any:  # noqa: ANN401  whatever the op takes and returns
        cast = [
            autocast(device_type, t)[0] if isinstance(t, Tensor) and i not in wide else t
            for i, t in enumerate(arguments)
        ]
        with torch.autocast(device_type, enabled=False):
            return function(*cast)

    return rule

"""What the launchers of Triton kernels ask of a tensor's memory, and how they count blocks."""

import math
from functools import cache

import torch
from torch import Tensor

from gspn2_kernels.tuning import SHARED

# Bytes that a lane reads at once.
VECTOR = 16
# Bytes of a line of NVIDIA's caches.
CACHE_LINE = 128
# Of an H100: as many programs at least keep it busy.
MULTIPROCESSORS = 132


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; as on an H100 where Triton interprets."""
    if device.type != "cuda":
        return SHARED
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def takes_hints(device: torch.device) -> bool:
    """Whether the L2 cache takes hints by line of CACHE_LINE bytes: NVIDIA's do, from compute capability 8.0 on."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def by_pixel(t: Tensor) -> Tensor:
    """Make sure that channels lie side by side and pixels at equal distances, row after row; copy if they don't.

    Args:
        t: (B, H, W, ..., C).
    """
    regular = t.stride(-1) == 1 and t.stride(1) == t.shape[2] * t.stride(2)
    # Not `contiguous`, which hands back a tensor whose axis of one element has any stride.
    return t if regular else t.clone(memory_format=torch.contiguous_format)


def by_token(t: Tensor) -> Tensor:
    """Make sure that channels lie side by side; copy if they don't.

    Args:
        t: (B, N, C).
    """
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def batch_unit(t: Tensor) -> int:
    """Numbers by which a batch stride is handed to a kernel, which multiplies by them: so vectors are seen aligned."""
    return math.gcd(t.stride(0), VECTOR // t.element_size())


# Triton's own two are made for kernels, and take ten times as long where a launch waits for them.
def cdiv(number: int, block: int) -> int:
    """How many blocks hold a number of things."""
    return -(-number // block)


def power_of_2(number: int) -> int:
    """The smallest power of two that is no less than a number of at least 1."""
    return 1 << (number - 1).bit_length()

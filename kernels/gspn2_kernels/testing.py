"""How close two implementations must be, for tests, benchmarks and the check after an export."""

import torch
from torch import Tensor

# Relative RMS error against an fp64 reference of the same (rounded) inputs. fp64 and fp32: rounding of the sums.
# fp16 and bf16: one rounding of the result (about 3e-4 and 1.7e-3), with room for an interpreter that truncates.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def random_inputs(
    shape: tuple[int, int, int, int],
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x, lam, logits and u of a grid (B, H, W, C), the same on every call and, rounded, in every dtype.

    x has mean 0.5, because a zero mean hides the precision errors that matter (a common mode of the state).

    Args:
        shape: B, H, W, C.
        groups: G, a divisor of C.
        dtype: Dtype of the four tensors.
        device: Device of the four tensors.
        packed: Make lam, logits and u strided views of one tensor, as the projection of a mixer does.
    """
    *grid, channels = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [4 * channels, 4 * channels, 12 * groups]
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    control = torch.randn(*grid, sum(sizes), generator=generator, dtype=torch.float64)
    control[..., : sizes[0]].sigmoid_()
    lam, u, logits = control.to(device, dtype).split(sizes, dim=-1)
    lam, u = lam.unflatten(-1, (4, channels)), u.unflatten(-1, (4, channels))
    logits = logits.unflatten(-1, (4, groups, 3))
    if not packed:
        lam, u, logits = lam.contiguous(), u.contiguous(), logits.contiguous()
    return x.to(device, dtype), lam, logits, u


def relative_rms(ref: Tensor, out: Tensor) -> float:
    """Return rms(out - ref) / rms(ref), or rms(out) where ref is zero throughout; 0 for empty tensors."""
    if ref.numel() == 0:
        return 0.0
    ref, out = ref.detach().cpu().double(), out.detach().cpu().double()
    scale = ref.square().mean().sqrt()
    error = (out - ref).square().mean().sqrt()
    return float(error / scale if scale > 0 else error)


def assert_close(name: str, ref: Tensor, out: Tensor, tolerance: float | None = None) -> None:
    """Compare a result with its reference.

    Args:
        name: What is compared, for the message.
        ref: Expected values, of any floating dtype and device.
        out: Values under test, of the same shape.
        tolerance: Largest relative RMS error; by default that of the dtype of `out`.

    Raises:
        AssertionError: The shapes differ, or the error is above the tolerance or not a number.
    """
    if ref.shape != out.shape:
        raise AssertionError(f"{name} has shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    limit = TOLERANCES[out.dtype] if tolerance is None else tolerance
    error = relative_rms(ref, out)
    if not error <= limit:
        raise AssertionError(f"{name}: relative RMS error {error:.2e}, expected at most {limit:.2e}")

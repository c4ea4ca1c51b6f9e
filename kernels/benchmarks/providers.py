"""Who computes the line scan: the reference, the same compiled, and the backends; and what each is made to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from cases import Case, Inputs, bytes_moved
from timing import Call, TooSlow
from torch import Tensor

from gspn2_kernels import backend, line_scan, line_scan_ref
from gspn2_kernels.eager import line_scan_bwd, line_scan_fwd

Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Pass by pass, the maker of the call that is timed: what it needs is made when its turn comes and dropped after it.
Passes = dict[str, Callable[[], Call]]

# Relative RMS error of (result, gradients, the logits' gradient).
EXACT = {"fp32": (2e-6, 1e-5, 1e-5), "fp16": (4e-3, 4e-3, 1e-2), "bf16": (4e-3, 4e-3, 1e-2)}


def ours(case: Case, name: str) -> dict[str, int]:
    """Bytes of a pass over all four directions."""
    return {"bytes": bytes_moved(case, name)}


class Provider(NamedTuple):
    """An implementation.

    Attributes:
        name: In the tables.
        scan: x, lam, logits, u to the result, differentiable.
        passes: scan, inputs and dy to the calls that are timed.
        truth: What the scan must agree with, in fp64.
        tolerances: By dtype, as EXACT.
        work: Bytes that a pass must move, and of other ways to count if there are any.
        directions: How many are scanned in a call.
        slow: May take too long for a call to be worth timing.
        repeatable: Promises equal bits on every run.
        capture: Can be captured in a CUDA graph; one that cannot runs on the default stream.
        longest: Most lines that are worth trying.
    """

    name: str
    scan: Scan
    passes: Callable[[Scan, Inputs, Tensor], Passes]
    truth: Scan = line_scan_ref
    tolerances: dict[str, tuple[float, float, float]] = EXACT
    work: Callable[[Case, str], dict[str, int]] = ours
    directions: int = 4
    slow: bool = False
    repeatable: bool = True
    capture: bool = True
    longest: int | None = None


def names(device: torch.device) -> list[str]:
    """List who can run on a device; what GSPN-1 needs is not here but with its user."""
    found = ["reference", "compiled", "eager"]
    return found if backend(device) == "eager" else [*found, backend(device)]


def provider(name: str, device: torch.device, compile_lines: int) -> Provider:
    """Make a provider ready for one case.

    Args:
        name: One of `names`.
        device: Where it will run.
        compile_lines: Most lines of a grid for which the reference is compiled.
    """
    if name == "compiled":
        # Every case compiles afresh, and a retained graph may not give its buffers away.
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False
        compiled = torch.compile(line_scan_ref, dynamic=False)
        return Provider(name, compiled, passes, slow=True, repeatable=False, longest=compile_lines)
    if name == "reference":
        return Provider(name, line_scan_ref, passes, slow=True, repeatable=False)
    if name == "eager" and backend(device) != "eager":
        return Provider(name, _Eager.apply, passes)
    return Provider(name, line_scan, passes)


class _Eager(torch.autograd.Function):
    """The plain-torch backend on a device that has a backend of its own, which the op would run instead."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(*inputs)
        return line_scan_fwd(*inputs, 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        return line_scan_bwd(dy, *ctx.saved_tensors, 0)


def passes(scan: Scan, inputs: Inputs, dy: Tensor) -> Passes:
    """Make the calls that are timed: `backward` alone, with the graph kept, and `train`, which saves what it needs."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)

    def infer() -> Tensor:
        with torch.no_grad():
            return scan(*inputs)

    def backward() -> Call:
        y = scan(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return {
        "infer": lambda: infer,
        "train": lambda: lambda: scan(*leaves),
        "backward": backward,
        "forward+backward": lambda: lambda: torch.autograd.grad(scan(*leaves), leaves, dy),
    }


def refusal(who: Provider, case: Case) -> str | None:
    """Say why a provider is not even tried on a case, if so."""
    if who.longest is None or case.lines <= who.longest:
        return None
    return f"torch.compile unrolls the loop over {case.lines} lines; tried up to {who.longest}, see --compile-lines"


def attempt(function: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """Call a function that runs a provider; returns its result, and why there is none: too slow or too large."""
    try:
        return function(), None
    except TooSlow as error:
        return {}, str(error)
    except torch.OutOfMemoryError as error:
        return {}, "does not fit: " + str(error).partition(" GPU ")[0]

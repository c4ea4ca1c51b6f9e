"""Time a mixer in the place of attention: the sub-layer from norm to residual, x + LayerScale(mixer(LayerNorm(x))).

    python kernels/benchmarks/mixer.py --device cuda --output kernels/benchmarks/results/mixer_h200.json

Against timm's Attention on scaled_dot_product_attention, with the implementation that PyTorch picks and with cuDNN's.
Patches only, no prefix tokens. Every sub-layer must first agree with itself in fp32, on the first image. `ms` is the
time of a call within a CUDA graph, `eager_ms` the time of one launched from Python; `compiled` by torch.compile or
not. The rows with `activation_bytes` are of training: what a forward leaves allocated, its result included.

Shapes: B batch, N = H W tokens, C channels, R proxy dimension.
"""

import argparse
import contextlib
import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conditions import DEVICES, DTYPES, conditions, numbers, set_up, write
from timing import measure, own_stream, peak_bytes, synchronize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn2_kernels.testing import assert_close, relative_rms
from gspn2convert.block import GspnBlock, KeptBlock
from gspn2convert.mixer import Gspn2Mixer

SUBLAYERS = ("mixer", "mixer without LPU and global branch", "attention", "attention, cuDNN")
# bf16 within a sub-layer: some roundings of 2e-3 each.
TOLERANCE = 1e-2


class Case(NamedTuple):
    """A sub-layer's input (B, H W, C), and what it is made of."""

    batch: int
    height: int
    width: int
    channels: int
    heads: int
    proxy: int

    def label(self) -> str:
        """Name the case in a table."""
        return f"B{self.batch} {self.height}x{self.width} C{self.channels} h{self.heads} R{self.proxy}"


# A ViT of SigLIP's width at 1036 and 2058 pixels; for the memory a ViT-B at 1024 pixels, patch 16.
TIMED = {
    "cpu": [Case(2, 6, 5, 64, 4, 8)],
    "cuda": [Case(32, 74, 74, 1152, 16, 64), Case(32, 147, 147, 1152, 16, 64)],
}
TRAINED = {"cpu": [Case(2, 6, 5, 64, 4, 8)], "cuda": [Case(4, 64, 64, 768, 12, 96)]}


class SubLayer(nn.Module):
    """The first half of a block, as the block itself runs it: in inference a mixer adds to the residual stream."""

    def __init__(self, block: GspnBlock | KeptBlock, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm, self.mixer, self.scale, self.grid = block.norm1, block.attn, block.ls1, grid

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        if not isinstance(self.mixer, Gspn2Mixer):
            return x + self.scale(self.mixer(self.norm(x)))
        if torch.is_grad_enabled():
            return x + self.scale(self.mixer(self.norm(x), self.grid))
        return self.mixer.add_to(x, self.norm, self.grid, self.scale.gamma)


def main() -> None:
    """Parse the command line, time, write the JSON and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results, written as they come")
    case = numbers("BxHxWxCxHEADSxR", "32x74x74x1152x16x64")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="[%(default)s]")
    parser.add_argument("--timed", nargs="*", type=case, metavar="BxHxWxCxHEADSxR", help="default: for the device")
    parser.add_argument("--trained", nargs="*", type=case, metavar="BxHxWxCxHEADSxR", help="default: for the device")
    parser.add_argument("--sublayers", nargs="+", choices=SUBLAYERS, default=SUBLAYERS, help="[all]")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile"), default=("eager", "compile"), help="[both]")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each row, of 10 calls at least")
    arguments = parser.parse_args()
    device = set_up(parser, arguments)
    found, rows = conditions(device, arguments.commit), []
    for row in run(arguments, device):
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        write(arguments.output, {**found, "dtype": arguments.dtype}, rows)
    print(f"{found['device']}, {arguments.dtype}, torch {found['torch']}", *map(line, rows), sep="\n")


def run(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the sub-layers, then measure what they keep for a backward."""
    work = [("time", TIMED, arguments.timed), ("memory", TRAINED, arguments.trained)]
    jobs = [
        (what, Case(*case))
        for what, default, given in work
        for case in (default[device.type] if given is None else given)
    ]
    for (what, case), name, mode in itertools.product(jobs, arguments.sublayers, arguments.modes):
        title = {"sublayer": name, **case._asdict(), "compiled": mode == "compile", "what": what}
        with own_stream(device):
            found = figures(name, case, what, arguments, device, compiled=mode == "compile")
        yield {**title, **found}


def figures(
    name: str, case: Case, what: str, arguments: argparse.Namespace, device: torch.device, *, compiled: bool
) -> dict[str, Any]:
    """Check one sub-layer on one case, then measure its time or its memory; or say why not."""
    if "cuDNN" in name and device.type != "cuda":
        return {"skipped": "cuDNN's attention needs a GPU"}
    layer = sublayer(name, case).to(device, DTYPES[arguments.dtype])
    generator = torch.Generator(device).manual_seed(0)
    size = (case.batch, case.height * case.width, case.channels)
    x = torch.randn(size, generator=generator, dtype=layer.scale.gamma.dtype, device=device)
    expected = copy.deepcopy(layer).float()(x[:1].float()).detach()
    torch._dynamo.reset()
    function = torch.compile(layer, dynamic=False) if compiled else layer
    training = what == "memory"
    x.requires_grad_(training)
    backend = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if "cuDNN" in name else contextlib.nullcontext()
    with backend, torch.set_grad_enabled(training):
        try:
            out = function(x)[:1].detach()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            return {"skipped": "cuDNN's attention does not take this case"}
        assert_close(name, expected, out, TOLERANCE)
        found: dict[str, Any] = {"error": float(f"{relative_rms(expected, out):.1e}")}
        del out
        if training:
            return {**found, **activation_bytes(lambda: function(x), layer, x)}
        times = measure(lambda: function(x), device, arguments.seconds)
        return {**found, **times, "peak_bytes": peak_bytes(lambda: function(x), device)}


def sublayer(name: str, case: Case) -> SubLayer:
    """Build a sub-layer with random weights, none of them zero: what multiplies zeros may run faster."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dim": case.channels, "num_heads": case.heads, "qkv_bias": True, "init_values": 1.0}
    block: GspnBlock | KeptBlock
    if name.startswith("mixer"):
        all_parts = name == "mixer"
        parts = {"proxy_dim": case.proxy, "lpu": all_parts, "global_branch": all_parts}
        block = GspnBlock(mixer={"has_prefix": False, **parts}, **options)
    else:
        block = KeptBlock(**options)
    for weight in block.attn.parameters():
        nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.5)
    return SubLayer(block, (case.height, case.width)).eval()


def activation_bytes(function: Callable[[], Tensor], layer: nn.Module, x: Tensor) -> dict[str, int]:
    """Measure what a forward leaves allocated for its backward, the result included; on a CPU, count it.

    Weights and the input exist before and are not counted. `output_bytes` is the part of the result.
    """
    if x.device.type == "cuda":
        synchronize(x.device)
        before = torch.cuda.memory_allocated(x.device)
        y = function()
        synchronize(x.device)
        kept = torch.cuda.memory_allocated(x.device) - before
    else:
        saved: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = function()
        note(y)
        before_call = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
        kept = sum(count for address, count in saved.items() if address not in before_call)
    return {"activation_bytes": kept, "output_bytes": y.numel() * y.element_size()}


def line(row: dict[str, Any]) -> str:
    """Put a row into one line of the table."""
    case = Case(*(row[name] for name in Case._fields))
    head = f"{row['sublayer']:<35} {case.label():<30} {'compiled' if row['compiled'] else '':<8}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    if "activation_bytes" in row:
        return f"{head} {row['activation_bytes'] / 2**20:9.1f} MiB kept, {row['output_bytes'] / 2**20:.1f} the result"
    python = f", {row['eager_ms']:.4f} from Python" if "eager_ms" in row else ""
    return f"{head} {row['ms']:9.4f} ms by {row['timed']} ({row['ms_20']:.4f} to {row['ms_80']:.4f}){python}"


if __name__ == "__main__":
    main()

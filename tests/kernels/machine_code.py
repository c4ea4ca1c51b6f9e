"""Compiles the line scan for an H100, without one, and prints what its inner loop consists of, as JSON.

A program of its own, run by test_triton_code.py: a process in which Triton interprets cannot compile.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspn2_kernels import triton_merge as merge_plan
from gspn2_kernels.prefix import share_columns
from gspn2_kernels.triton_backward import line_scan_bwd_kernel
from gspn2_kernels.triton_forward import line_scan_fwd_kernel
from gspn2_kernels.triton_gated import FEWEST, NARROW, WIDE, predict_kernel
from gspn2_kernels.triton_gated import Plan as PredictPlan
from gspn2_kernels.triton_gradients import gradients_kernel
from gspn2_kernels.triton_merge import product_kernel
from gspn2_kernels.triton_prefix import _group as prefix_group
from gspn2_kernels.triton_prefix import _plan as prefix_plan
from gspn2_kernels.triton_prefix import read_kernel
from gspn2_kernels.tuning import Plan, plan

BATCH_STRIDES = ("sxb", "slb", "sab", "sub", "syb")
INTEGERS = ("first", "last", "launch", "H", "W", "segment", "N", "T", "M", *BATCH_STRIDES)
LEAST = 89  # of the capabilities with 99 KiB of shared memory for a program


def main() -> None:
    """Compile the plans of bf16, 64 channels, 74 x 74, and those of one image of 64 x 64, 256 x 256 and 512 x 512."""
    shape = (32, 74, 74, 64, 1, 2)
    of_a_lane = Plan(4, 4, 1, 8, 1, 4, AHEAD=True, APART=True)
    forward, train, backward = plan(*shape), plan(*shape, "train"), plan(*shape, "backward")
    strides = {"C": 64, "GC": 64, "SX": 64, "SL": 256, "SLD": 64, "SU": 256, "SUD": 64, "SA": 16, "SAD": 4, "SAG": 4}
    strides |= {"SY": 256, "SYD": 64}
    of_planes = {**strides, **dict.fromkeys(("SX", "SLD", "SUD", "SA", "SAD", "SAG"), 0), "SL": 64, "SU": 64}
    of_planes |= {"SAVE": False, "HOLD": False, "x": None}
    of_fp32_planes = {**of_planes, **dict.fromkeys(("SL", "SU"), plan(1, 64, 64, 64, 1, 4, "planes").tile)}
    alone = {**strides, "SAVE": False, "HOLD": False}
    narrow = {**alone, **dict.fromkeys(("C", "GC", "SX", "SLD", "SUD", "SYD"), 8)}
    narrow |= dict.fromkeys(("SL", "SU", "SY"), 32)
    print(
        json.dumps(
            {
                "shared": shared_bytes(),
                "wide": wide_products(),
                "infer": describe(line_scan_fwd_kernel, forward, {**strides, "SAVE": False, "HOLD": True}),
                "train": describe(line_scan_fwd_kernel, train, {**strides, "SAVE": True, "HOLD": True}),
                "planes": describe(line_scan_fwd_kernel, plan(*shape, "planes")._replace(APART=True), of_planes),
                "segments of planes": describe(line_scan_fwd_kernel, of_a_lane, of_planes),
                "few warps": describe(line_scan_fwd_kernel, plan(1, 64, 64, 32, 1, 2), alone),
                "few warps of fp32": describe(line_scan_fwd_kernel, plan(1, 64, 64, 64, 1, 4), alone, fp32=True),
                "segments of fp32": describe(line_scan_fwd_kernel, plan(1, 128, 128, 64, 1, 4), alone, fp32=True),
                "planes of fp32": describe(
                    line_scan_fwd_kernel, plan(1, 64, 64, 64, 1, 4, "planes"), of_fp32_planes, fp32=True
                ),
                "segments": describe(line_scan_fwd_kernel, plan(1, 256, 256, 64, 1, 2), alone),
                "segments of ten stages": describe(line_scan_fwd_kernel, plan(1, 512, 512, 8, 1, 2), narrow),
                "backward": describe(line_scan_bwd_kernel, backward, strides),
                "gradients": gradients(strides),
            }
        )
    )


def shared_bytes() -> dict[int, int]:
    """Compile the products of a latent for the widest latents of both plans, and tell the shared memory of each."""
    found = {}
    for channels, chosen in ((NARROW, PredictPlan()), (256, WIDE)):
        tile = {"TH": chosen.rows, "TW": chosen.columns, "BN": chosen.numbers, "BK": chosen.step, "NS": chosen.stages}
        constants = {"R": channels, "G": 1, "PLANES": channels // 16, "E": 16, "BL": FEWEST, **tile}
        types = {"weights": "*fp32"}
        found[channels] = compiled(predict_kernel, constants, types, chosen.warps, LEAST).metadata.shared
    return found


def wide_products() -> dict[str, dict[str, int]]:
    """Compile for 99 KiB of shared memory what needs most of it: the read of five prefix tokens, a merge of fp32."""
    read, (places, group) = prefix_plan(torch.bfloat16, 5, 12), prefix_group(5, 12)
    of_read = {
        **{"C": 768, "H": 12, "P": 5, "S": share_columns(5, 12), "SX": 768, "UX": 8, "BM": read.tokens},
        **{"BC": read.channels, "HG": group, "PG": 8, "PR": places, "NB": 12, "NS": read.stages},
    }
    in_fp32 = dict.fromkeys(("statistics", "sums", "parts", "top", "total"), "*fp32")
    merge = merge_plan.FP32
    of_merge = {"C": 768, "K": 192, "S": 128, "BM": merge.patches, "BN": merge.channels, "BK": merge.step, "BS": 128}
    of_merge["NS"] = merge.stages
    types = dict.fromkeys(product_kernel.arg_names, "*fp32") | {"ratio": "fp32", "inverse": "fp32", "M": "i32"}
    found = {
        "read_kernel": compiled(read_kernel, of_read, in_fp32, read.warps, LEAST),
        "product_kernel": compiled(product_kernel, of_merge, types, merge.warps, LEAST),
    }
    return {
        name: {"shared": one.metadata.shared, "STACK": count(one.asm["cubin"])["STACK"]} for name, one in found.items()
    }


def gradients(strides: dict[str, int]) -> dict[str, int]:
    """Compile the pass that makes the gradients, 8 pixels of 64 channels a program."""
    tile = {"G": 1, "TH": 2, "TW": 4, "BG": 1}
    return describe(gradients_kernel, Plan(WC=2, GRID=1, CL=1, BC=64, P=1, NS=1), {**strides, **tile})


def describe(
    kernel: triton.JITFunction, chosen: Plan, strides: dict[str, int], *, fp32: bool = False
) -> dict[str, int]:
    """Count registers, bytes of stack and the instructions of the longest loop."""
    shares = {"SHARE": "GC" in strides and chosen.shares(strides["GC"])}
    constants = {n: value for n, value in {**strides, **chosen._asdict(), **shares}.items() if n in kernel.arg_names}
    types = {"state_scale": "fp32", "states": "*fp16", "scratch": "*fp32"}
    types |= {"weights": "*fp32"} if chosen.APART else {}
    if fp32:
        types |= dict.fromkeys({"x", "lam", "weights", "u", "y", "states"} - set(constants), "*fp32")
    made = compiled(kernel, constants, types, chosen.WC, 90)
    # The pass of the gradients has a plan only in name.
    room = chosen.shared(4 if fp32 else 2) - made.metadata.shared if "NS" in kernel.arg_names else 0
    return count(made.asm["cubin"]) | {"room": room}


def compiled(
    kernel: triton.JITFunction, constants: dict[str, int], types: dict[str, str], warps: int, capability: int
) -> triton.compiler.CompiledKernel:
    """Compile a kernel of bf16 and 32-bit integers but for other types that are named; pointers are aligned."""
    others = dict.fromkeys(INTEGERS, "i32") | types | dict.fromkeys(constants, "constexpr")
    signature = {name: others.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in BATCH_STRIDES and name not in kernel.do_not_specialize)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def count(cubin: bytes) -> dict[str, int]:
    """Disassemble with the tools that Triton brings along."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    resources = {key: int(re.search(rf"{key}:(\d+)", usage.stdout + usage.stderr)[1]) for key in ("REG", "STACK")}
    return resources | Counter(longest_loop(code))


def longest_loop(code: str) -> list[str]:
    """List the operations between a label and the longest jump back to it."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_?\w*):", line):
            labels[label[1]] = len(operations)
        elif instruction := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)[^;]*?(\.L_x_?\w*)?\)?\s*;", line
        ):
            operations.append(instruction[1])
            start = labels.get(instruction[2] or "")
            if instruction[1] == "BRA" and start is not None and len(operations) - start > len(longest):
                longest = operations[start:]
    return longest


if __name__ == "__main__":
    main()

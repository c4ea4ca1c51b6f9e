"""The scans of a latent on a GPU by Triton: lam, u and weights come of products of it, written as a scan reads them.

A scan in the order of pixels reads short runs of memory, and those of a row or of a column far apart. Here every number
has been written by ourselves, so it lies where it is read: in planes, one for each direction and each program's
channels, which hold line after line. lam comes times the latent, which no direction then reads.

Shapes: B batch, H W grid, R latent channels, G groups, E channels of a plane, T lines of M positions in a direction; a
tile is TH TW pixels by BN numbers, in steps of BK channels. A half is two directions: with rows, or columns, as lines.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import cdiv, shared_memory
from gspn2_kernels.triton_line_scan import scan_forward
from gspn2_kernels.triton_norm import MOST_PADDING
from gspn2_kernels.triton_tiles import repeated
from gspn2_kernels.triton_weights import outer_weights
from gspn2_kernels.tuning import Plan as ScanPlan
from gspn2_kernels.tuning import plan


class Plan(NamedTuple):
    """Rows and columns of a tile's pixels, most numbers of it, channels of a step, warps, and steps under way."""

    rows: int = 16
    columns: int = 8
    numbers: int = 64
    step: int = 64
    warps: int = 4
    stages: int = 2


# With more channels than NARROW, so that a tile of the latent fits into shared memory.
WIDE, NARROW = Plan(8, 8, 32, 64, 4, 1), 128
# Products of fp32 keep all they multiply in registers.
FP32 = Plan(8, 4, 16, 16, 4, 2)
# Programs of the large tile from which it is the quicker one: with 256 it was, with 64 it was not (H200).
MANY = 192
# The fewest columns of a product.
FEWEST = 16


def gated_scan(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    groups: int,
    segment: int,
    *,
    chosen: ScanPlan | None = None,
) -> Tensor:
    """Compute `gspn2::gated_scan`, arguments as there; `chosen` are the constants of the scan."""
    (height, width), (batch, _, channels) = grid, latent.shape
    y = torch.empty(batch, height, width, 4, channels, dtype=latent.dtype, device=latent.device)
    if y.numel() == 0:
        return y
    shape, shared = (batch, height, width, channels, groups), shared_memory(latent.device)
    chosen = chosen or plan(*shape, latent.element_size(), "planes", shared=shared)
    chosen = chosen._replace(APART=True)  # for the weights are written with the planes
    lam, u, weights = predict(latent, weight, bias, grid, groups, segment, chosen)
    strides = {"SA": 0, "SAD": 0, "SAG": 0, "SX": 0, "SL": chosen.tile, "SLD": 0, "SU": chosen.tile, "SUD": 0}
    scan_forward((None, lam, weights, u), y, None, segment, chosen, {"GC": channels // groups, **strides})
    return y


def predict(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    groups: int,
    segment: int,
    scan: ScanPlan,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute lam times the latent, u and the weights, as the forward kernel reads them.

    Args:
        latent: (B, H W, R).
        weight: (8 R + 12 G, R).
        bias: (8 R + 12 G,).
        grid: H, W.
        groups: G.
        segment: Lines after which a scan restarts, or 0.
        scan: Constants of the scan.
        chosen: Constants of this kernel.

    Returns:
        Two planes (B, 4, R / E, T M, E), R rounded up to what a program of the scan takes, and what `line_weights`
        makes of the logits, (B, 4, G, T M, 2).
    """
    (height, width), (batch, _, channels) = grid, latent.shape
    chosen = chosen or _plan(latent, grid)
    planes = cdiv(channels, scan.tile)
    # 32 bits hold every offset inside an image.
    if 4 * height * width * max(planes * scan.tile, 2 * groups) >= 2**31:
        raise ValueError(f"a grid of {height} x {width} with a latent of {channels} channels is too large; split it")
    gates = latent.new_empty(2, batch, 4, planes, height * width, scan.tile)
    weights = latent.new_empty(batch, 4, groups, height * width, 2, dtype=torch.float32)
    step = min(chosen.step, _block(channels, 64))
    pixels = batch * cdiv(height, chosen.rows) * cdiv(width, chosen.columns)
    predict_kernel[(2 * pixels,)](
        latent.contiguous(), weight.contiguous(), bias.contiguous(), *gates, weights, height, width,
        segment or height + width, R=channels, G=groups, PLANES=planes, E=scan.tile, TH=chosen.rows, TW=chosen.columns,
        BN=_block(channels, chosen.numbers), BL=FEWEST, BK=step, NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    return gates[0], gates[1], weights


def _plan(latent: Tensor, grid: tuple[int, int]) -> Plan:
    """Choose the constants of the products: smaller tiles where larger ones leave multiprocessors without one."""
    if latent.dtype == torch.float32:
        return FP32
    if latent.shape[2] > NARROW:
        return WIDE
    large = Plan()
    tiles = 2 * latent.shape[0] * cdiv(grid[0], large.rows) * cdiv(grid[1], large.columns)
    return large if tiles >= MANY else large._replace(rows=large.rows // 2)


def _block(channels: int, most: int) -> int:
    """Choose how many channels a product has at once: fewer where the last one would hold much padding."""
    while most > FEWEST and cdiv(channels, most) * most > MOST_PADDING * channels:
        most //= 2
    return most


@triton.jit(do_not_specialize=("H", "W", "segment"))
def predict_kernel(
    latent, weight, bias, lam, u, weights, H, W, segment, R: tl.constexpr, G: tl.constexpr, PLANES: tl.constexpr,
    E: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr,
    NS: tl.constexpr,
):  # fmt: skip
    """Compute what two directions need of a tile of pixels."""
    half, i = tl.program_id(0) % 2, tl.program_id(0) // 2
    i_h, i_w, i_b = i // tl.cdiv(W, TW) % tl.cdiv(H, TH), i % tl.cdiv(W, TW), i // tl.cdiv(W, TW) // tl.cdiv(H, TH)
    i_b = i_b.to(tl.int64)
    # Pixels in the order of the directions' positions, so that runs of them are written.
    o_m = tl.arange(0, TH * TW)
    o_h = i_h * TH + tl.where(half == 0, o_m // TW, o_m % TH)
    o_w = i_w * TW + tl.where(half == 0, o_m % TW, o_m // TH)
    there = (o_h < H) & (o_w < W)
    o_q = tl.where(half == 0, o_h * W + o_w, o_w * H + o_h)
    p_z = latent + (i_b * (H * W) + o_h * W + o_w)[:, None] * R
    b_z: tl.tuple = ()
    for k in tl.static_range(0, R, BK):
        o_k = k + tl.arange(0, BK)
        b_z = b_z + (tl.load(p_z + o_k[None, :], mask=there[:, None] & (o_k < R)[None, :], other=0.0),)
    tiles: tl.constexpr = (R + BN - 1) // BN
    for n in tl.range(0, 2 * tiles, num_stages=NS):
        d, c = 2 * half + n // tiles, n % tiles * BN + tl.arange(0, BN)
        o, mask = _place(d * PLANES + c // E, c % E, o_q, H * W, E), there[:, None] & (c < R)[None, :]
        b_l = _product(b_z, weight, bias, d * R + c, c < R, R, BK)
        b_l *= tl.load(p_z + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(lam + i_b * (4 * PLANES * E) * (H * W) + o, b_l.to(lam.dtype.element_ty), mask=mask)
        b_u = _product(b_z, weight, bias, (4 + d) * R + c, c < R, R, BK)
        tl.store(u + i_b * (4 * PLANES * E) * (H * W) + o, b_u.to(u.dtype.element_ty), mask=mask)
    # A direction's logits follow those of the one before: groups of three, each taken as four.
    for n in tl.range(0, 8 * G, BL):
        o_n = n + tl.arange(0, BL)
        b_a = _product(
            b_z, weight, bias, 8 * R + 6 * half * G + o_n // 4 * 3 + tl.minimum(o_n % 4, 2), o_n < 8 * G, R, BK
        )
        planes = 2 * half * G + n // 4 + tl.arange(0, BL // 4)
        b_w = _weights_of_planes(b_a, planes // G, o_h, o_w, H, W, segment, TH * TW, BL // 4)
        p_w = weights + i_b * (8 * G) * (H * W) + (planes[None, :] * (H * W) + o_q[:, None])[:, :, None] * 2
        m_w = there[:, None] & (planes < (2 * half + 2) * G)[None, :]
        tl.store(p_w + tl.arange(0, 2), b_w, mask=m_w[:, :, None])


@triton.jit
def _weights_of_planes(b_a, i_d, row, column, H, W, segment, pixels: tl.constexpr, planes: tl.constexpr):
    """Normalise four logits of each plane (pixels, 4 planes), the last of them padding: (pixels, planes, 2)."""
    rows: tl.constexpr = pixels * planes
    i_d = tl.reshape(tl.broadcast_to(i_d[None, :], (pixels, planes)), (rows,))
    row, column = repeated(row, pixels, planes), repeated(column, pixels, planes)
    b_w = outer_weights(tl.reshape(b_a, (rows, 4)), i_d, row, column, H, W, segment, rows)
    return tl.reshape(b_w, (pixels, planes, 2))


@triton.jit
def _place(plane, e, o_q, pixels, E: tl.constexpr):
    """Tell where number e of each plane's E is, for positions o_q of its lines."""
    return (plane * (pixels * E) + e)[None, :] + (o_q * E)[:, None]


@triton.jit
def _product(b_z, weight, bias, o_r, inside, R: tl.constexpr, BK: tl.constexpr):
    """Multiply pixels by rows of the weight, and add their bias."""
    b_n = tl.zeros((b_z[0].shape[0], o_r.shape[0]), tl.float32)
    for k in tl.static_range(len(b_z)):
        o_k = k * BK + tl.arange(0, BK)
        p_w = weight + (o_r * R)[:, None] + o_k[None, :]
        b_w = tl.load(p_w, mask=inside[:, None] & (o_k < R)[None, :], other=0.0)
        b_n = tl.dot(b_z[k], tl.trans(b_w), b_n, input_precision="ieee")
    return b_n + tl.load(bias + o_r, mask=inside, other=0.0).to(tl.float32)[None, :]

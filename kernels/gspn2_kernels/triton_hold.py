"""Hints to the L2 cache for x, which every direction reads at another time, mostly long after the cache has lost it.

Scans of all directions take about as long, so of the four that come by a pixel the one that starts at the nearest
edge, measured in parts of the side, is the first, and the one from the opposite edge the last. The first asks the cache
to hold the pixel, the last lets it go: what is held after the last reader would only take room from others. Programs do
not wait for each other, but nothing except time depends on it. A program's channels of a pixel are a whole line of the
cache, and each lane hints at one of the positions that it shares with others.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_HOLD = tl.constexpr("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2::evict_last [$1]; mov.s32 $0, 0; }")
_LET_GO = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p applypriority.global.L2::evict_normal [$1], 128; mov.s32 $0, 0; }"
)


@triton.jit
def hinted(
    x, image, start, across, o_own, o_c, SX: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """Point to the pixel of the first line that each lane hints at, at position o_own.

    `image` are the numbers before the image, `start` and `across` as `direction` tells them.
    """
    if HOLD:
        return x + image + (start + o_own * across) * SX + o_c // (CL * BC) * (CL * BC)
    else:
        return o_own  # nothing points there


@triton.jit
def hold(p_x, step, i, ahead, T, M, o_own, low, high):
    """Hold what this scan is the first to read `ahead` lines after line i, and let go what it is the last to read now.

    What it reads before its loop begins, `ahead` lines, is not held. p_x points to the pixels of line 0 that the lanes
    hint at, at positions o_own; lines are `step` numbers apart. Of a line low to high are this program's.
    """
    here = (o_own >= low) & (o_own < high)
    edge = tl.minimum(o_own, M - 1 - o_own) * T
    far = i + ahead
    _hint(_HOLD, p_x + far * step, here & (2 * far < T - 1) & (far * M <= edge))
    _hint(_LET_GO, p_x + i * step, here & (2 * i > T - 1) & ((T - 1 - i) * M <= edge))


@triton.jit
def _hint(asm: tl.constexpr, p_x, m_hint):
    """Run an instruction on the lines of the cache at p_x, masked."""
    tl.inline_asm_elementwise(
        asm, "=r,l,r", [p_x.to(tl.int64), m_hint.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )

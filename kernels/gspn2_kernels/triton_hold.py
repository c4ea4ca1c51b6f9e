"""Hints to the L2 cache for x, which every direction reads at another time, mostly long after the cache has lost it.

Of the four scans that come by a pixel, the one whose lines run along the nearest edge is the first, and the one that
comes from the opposite edge the last. The first asks the cache to hold the pixel, the last lets it go: what is held
after the last reader would only take room from others. Nothing but time depends on it. Pixels are whole lines of the
cache (`takes_hints`), and each lane hints at one of the positions that it shares with others.
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
    x, image, start, across, M, o_q, o_c, SX: tl.constexpr, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr,
    P: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Tell the position that each lane hints at, M for lanes without one, and point to its pixel of the first line.

    `image` are the numbers before the image, `start` and `across` as `direction` tells them.
    """
    own = tl.arange(0, WC * 32) % CL
    o_own = tl.where(own < P, o_q + own, M)
    if HOLD:
        return o_own, x + image + (start + o_own * across) * SX + o_c // (CL * BC) * (CL * BC)
    else:
        return o_own, o_own  # nothing points there


@triton.jit
def hold(p_x, step, i, ahead, T, M, o_own, low, high):
    """Hold what this scan is the first to read `ahead` lines after line i, and let go what it is the last to read now.

    p_x points to the pixels of line 0 that the lanes hint at, at positions o_own; lines are `step` numbers apart. Of a
    line low to high are this program's.
    """
    here = (o_own >= low) & (o_own < high)
    edge = tl.minimum(o_own, M - 1 - o_own)
    far = i + ahead
    _hint(_HOLD, p_x + far * step, here & (2 * far < T - 1) & (far <= edge))
    _hint(_LET_GO, p_x + i * step, here & (2 * i > T - 1) & (T - 1 - i <= edge))


@triton.jit
def _hint(asm: tl.constexpr, p_x, m_hint):
    """Run an instruction on the lines of the cache at p_x, masked."""
    tl.inline_asm_elementwise(
        asm, "=r,l,r", [p_x.to(tl.int64), m_hint.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )

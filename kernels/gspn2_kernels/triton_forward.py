"""The forward kernel of the line scan: lam * x, the recurrence and u * h in one pass over memory.

One launch scans all four directions. See `triton_tiles` for who holds what.
"""

import triton
import triton.language as tl

from gspn2_kernels.triton_hold import hinted, hold
from gspn2_kernels.triton_tiles import (
    SIZES,
    direction,
    get,
    handed_on,
    neighbours,
    own_position,
    place,
    put,
    read_line,
    segments,
    weights_of,
    within,
    zeros,
)


@triton.jit(do_not_specialize=SIZES)
def line_scan_fwd_kernel(
    x, lam, weights, u, y, states, scratch, first, last, launch, H, W, segment, state_scale, sxb, slb, sab, sub,
    C: tl.constexpr, GC: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SLD: tl.constexpr, SA: tl.constexpr,
    SAD: tl.constexpr, SAG: tl.constexpr, SU: tl.constexpr, SUD: tl.constexpr, SY: tl.constexpr, SYD: tl.constexpr,
    SAVE: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
    NS: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr, SHARE: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Scan lines `first` to `last` of one direction of one image: program (channels and segment, direction, image).

    x, lam, weights and u have batch strides s?b; S? are the strides of a pixel, S?D of a direction, SAG of a group of
    GC channels. `weights` are logits, or with APART what `line_weights` makes of them, whose strides follow from the
    sizes. So do those of planes (see `_planes`), in which lam times x, called lam, and u lie if there is no x. Pixels
    of y follow each other through the images. With SAVE, the states times state_scale go to `states` (B, 4, T, M, C),
    line by line. Where GRID is above 1, `scratch` holds 2 max(H, W) C numbers, C rounded up, a direction and image.
    AHEAD reads a line one step before it is used: a warp that is alone then waits less, and holds more. SHARE lets the
    lanes of a position share out its weights, HOLD keeps x in the L2 cache between the directions.
    """
    i_d, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    T, M, step, across, start = direction(i_d, H, W)
    own, origin = segments(M, GRID, WC * 32 // CL, P)
    o_q, o_c = place(M, origin, C, WC, GRID, CL, BC, P)
    o_own, low = own_position(o_q, M, WC, CL, P), tl.program_id(0) % GRID * own
    o_v, o_pixel = o_c[:, None] + tl.arange(0, BC)[None, :], start + o_q * across
    w_step = tl.where(step < 0, -M, M)
    p_w = weights_of(
        weights, i_b, i_d, sab, H, W, T, M, step, across, start, o_q, o_own, o_c, C, GC, SA, SAD, SAG, APART, SHARE,
    )  # fmt: skip
    if x is None:
        p_x, steps = x, (w_step, 1)
        p_l, p_u = _planes(lam, u, i_b * 4 + i_d, H, W, T, M, step, o_q, o_c, GRID, CL, BC)
    else:
        steps = (step, across)
        p_x = x + i_b * sxb + (o_pixel * SX)[:, None] + o_v
        p_l = lam + i_b * slb + i_d * SLD + (o_pixel * SL)[:, None] + o_v
        p_u = u + i_b * sub + i_d * SUD + (o_pixel * SU)[:, None] + o_v
    p_y = y + i_b * (H * W * SY) + i_d * SYD + (o_pixel * SY)[:, None] + o_v
    p_s = states + (i_b * 4 + i_d) * (H * W * C) + (o_q * C)[:, None] + o_v
    p_k = hinted(x, i_b * sxb, start, across, o_own, o_c, SX, CL, BC, HOLD)
    p_h = handed_on(scratch, i_b * 4 + i_d, H, W, GRID, CL, BC)
    b_h = zeros(WC, BC, P)
    if GRID > 1:
        if launch > 0:
            b_h = get(p_h, launch % 2, M, origin, WC, CL, BC, P)
    _lines(
        b_h, first, tl.minimum(last, T), segment, state_scale, step, across, steps, w_step, T, M, p_x, p_k, p_l, p_u,
        p_w, p_y, p_s, p_h, (launch + 1) % 2, origin, o_q, o_own, low, tl.minimum(low + own, M), C, SX, SL, SU, SA, SY,
        SAVE, WC, GRID, CL, BC, P, NS, AHEAD, APART, SHARE, HOLD,
    )  # fmt: skip


@triton.jit
def _planes(
    lam, u, i, H, W, T, M, step, o_q, o_c, GRID: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Point to the first line of direction i, counted through the images, in planes (plane, T, M, channels of one).

    Programs read a plane from one end to the other.
    """
    block, blocks = tl.program_id(0) // GRID, tl.num_programs(0) // GRID
    first = tl.where(step < 0, (T - 1) * M, 0)
    # Without a remainder of o_c, of which Triton could not tell that vectors begin there.
    o_v = (first + o_q) * (CL * BC) + (o_c - block * (CL * BC))
    o_v = (i * blocks + block) * (H * W * CL * BC) + (o_v[:, None] + tl.arange(0, BC)[None, :])
    return lam + o_v, u + o_v


@triton.jit
def _lines(
    b_h, first, last, segment, state_scale, step, across, steps, w_step, T, M, p_x, p_k, p_l, p_u, p_w, p_y, p_s, p_h,
    buffer, origin, o_q, o_own, low, high, C: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SU: tl.constexpr,
    SA: tl.constexpr, SY: tl.constexpr, SAVE: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr,
    BC: tl.constexpr, P: tl.constexpr, NS: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr, SHARE: tl.constexpr,
    HOLD: tl.constexpr,
):  # fmt: skip
    """Scan lines for which a segment needs nothing from its neighbours."""
    if AHEAD:
        keep = tl.where(first % segment == 0, 0.0, 1.0)
        line = read_line(first, last, keep, steps, w_step, M, low, high, p_x, p_l, p_u, p_w, o_q, o_own,
                         SX, SL, SU, SA, 0, WC, GRID, CL, P, APART, SHARE)  # fmt: skip
    # Lines to read before the scan restarts; to divide in each step costs 3 % at 256 x 256.
    begin = first + 1 if AHEAD else first
    until = tl.cdiv(begin, segment) * segment - begin
    # Counted, not computed from i: else Triton computes them where it loads, and hands them on through all stages.
    o_line, o_state = first * step, first * M
    for i in tl.range(first, last, num_stages=NS):
        i_r = i + 1 if AHEAD else i
        if HOLD:
            hold(p_k, steps[0] * SX, i, NS - 1, T, M, o_own, low, high)
        keep = tl.where(until == 0, 0.0, 1.0)
        until = tl.where(until == 0, segment, until) - 1
        read = read_line(i_r, last, keep, steps, w_step, M, low, high, p_x, p_l, p_u, p_w, o_q, o_own,
                         SX, SL, SU, SA, 0, WC, GRID, CL, P, APART, SHARE)  # fmt: skip
        b_h = _advance(
            b_h, line if AHEAD else read, o_line, o_state, across, state_scale, p_y, p_s, o_q, low, high,
            C, SY, SAVE, WC, GRID, CL, BC, P,
        )  # fmt: skip
        o_line, o_state = o_line + step, o_state + M
        # In the loop: for states that are used after it LLVM keeps two copies, and computes both.
        if GRID > 1:
            if i == last - 1:
                put(b_h, p_h, buffer, M, origin, low, high, WC, CL, BC, P)
        if AHEAD:
            line = read


@triton.jit
def _advance(
    b_h, line, o_line, o_state, across, state_scale, p_y, p_s, o_q, low, high, C: tl.constexpr, SY: tl.constexpr,
    SAVE: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Take the states of one line to the next, and write u * h."""
    h_before, h_after = neighbours(b_h, WC, CL, BC, P)
    b_new = ()
    for p in tl.static_range(P):
        h_down = h_before if p == 0 else b_h[p - 1]
        h_up = h_after if p == P - 1 else b_h[p + 1]
        b_t = line[5 * p + 1] * b_h[p] + line[5 * p + 3]
        # What comes from another lane last: its shuffle is the longest wait.
        if p == P - 1:
            b_t = line[5 * p] * h_down + b_t
            b_t = line[5 * p + 2] * h_up + b_t
        else:
            b_t = line[5 * p + 2] * h_up + b_t
            b_t = line[5 * p] * h_down + b_t
        m_own = within(o_q + p, low, high, GRID)
        if SAVE:
            tl.store(p_s + (o_state + p) * C, (b_t * state_scale).to(p_s.dtype.element_ty), mask=m_own)
        b_y = b_t * line[5 * p + 4]
        tl.store(p_y + (o_line + p * across) * SY, b_y.to(p_y.dtype.element_ty), mask=m_own)
        b_new = b_new + (b_t,)
    return b_new

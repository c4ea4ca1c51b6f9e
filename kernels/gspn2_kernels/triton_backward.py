"""The scan of the backward: the gradients of the states, from the last line to the first, by transposed weights.

The derivation is in `kernels/README.md`. With g_i the gradient of the state of line i,

    g_i = u_i dy_i + W_(i+1)^T g_(i+1)

Every input's gradient follows from g, the states and the inputs without another scan: see `triton_gradients`.
"""

import triton
import triton.language as tl

from gspn2_kernels.triton_tiles import (
    SIZES,
    direction,
    get,
    handed_on,
    neighbour,
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
def line_scan_bwd_kernel(
    u, dy, weights, g, scratch, first, last, launch, H, W, segment, sub, syb, sab, C: tl.constexpr, GC: tl.constexpr,
    SU: tl.constexpr, SUD: tl.constexpr, SY: tl.constexpr, SYD: tl.constexpr, SA: tl.constexpr, SAD: tl.constexpr,
    SAG: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
    NS: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Scan lines `first` to `last`, counted from the last line, of one direction of one image backwards.

    Programs, strides and constants as in `line_scan_fwd_kernel`. g (B, 4, T, M, C) lies line by line, as states do.
    """
    i_d, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    T, M, step, across, start = direction(i_d, H, W)
    own, origin = segments(M, GRID, WC * 32 // CL, P)
    o_q, o_c = place(M, origin, C, WC, GRID, CL, BC, P)
    o_own, low = own_position(o_q, M, WC, CL, P), tl.program_id(0) % GRID * own
    o_v, start = o_c[:, None] + tl.arange(0, BC)[None, :], start + (T - 1) * step
    o_pixel = start + o_q * across
    p_u = u + i_b * sub + i_d * SUD + (o_pixel * SU)[:, None] + o_v
    p_y = dy + i_b * syb + i_d * SYD + (o_pixel * SY)[:, None] + o_v
    # From the last line on.
    w_step = tl.where(step < 0, M, -M)
    p_w = weights_of(
        weights, i_b, i_d, sab, H, W, T, M, -step, across, start, o_q, o_own, o_c, C, GC, SA, SAD, SAG, APART, SHARE,
    )  # fmt: skip
    p_g = g + (i_b * 4 + i_d) * (H * W * C) + (o_q * C + o_c)[:, None] + tl.arange(0, BC)[None, :]
    p_h = handed_on(scratch, i_b * 4 + i_d, H, W, GRID, CL, BC)
    b_g = zeros(WC, BC, P)
    if GRID > 1:
        if launch > 0:
            b_g = get(p_h, launch % 2, M, origin, WC, CL, BC, P)
    b_g = _lines(
        b_g, first, tl.minimum(last, T), T, segment, (-step, across), w_step, M, p_y, p_u, p_w, p_g, o_q, o_own,
        low, tl.minimum(low + own, M), C, SY, SU, SA, WC, GRID, CL, BC, P, NS, AHEAD, APART, SHARE,
    )  # fmt: skip
    if GRID > 1:
        put(b_g, p_h, (launch + 1) % 2, M, origin, low, tl.minimum(low + own, M), WC, CL, BC, P)


@triton.jit
def _lines(
    b_g, first, last, T, segment, steps, w_step, M, p_y, p_u, p_w, p_g, o_q, o_own, low, high,
    C: tl.constexpr, SY: tl.constexpr, SU: tl.constexpr, SA: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr,
    CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr, NS: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    """Go through lines for which a segment needs nothing from its neighbours."""
    if AHEAD:
        keep = tl.where((T - 1 - first) % segment == 0, 0.0, 1.0)
        line = read_line(first, last, keep, steps, w_step, M, low, high, p_y, p_u, None, p_w, o_q, o_own,
                         SY, SU, 0, SA, 1, WC, GRID, CL, P, APART, SHARE)  # fmt: skip
    until = (T - 1 - (first + 1 if AHEAD else first)) % segment  # lines before a forward scan restarts
    for i in tl.range(first, last, num_stages=NS):
        i_r = i + 1 if AHEAD else i
        keep = tl.where(until == 0, 0.0, 1.0)
        until = tl.where(until == 0, segment, until) - 1
        read = read_line(i_r, last, keep, steps, w_step, M, low, high, p_y, p_u, None, p_w, o_q, o_own,
                         SY, SU, 0, SA, 1, WC, GRID, CL, P, APART, SHARE)  # fmt: skip
        b_g = _advance(b_g, line if AHEAD else read, p_g + (T - 1 - i) * M * C, o_q, low, high, C,
                       WC, GRID, CL, BC, P)  # fmt: skip
        if AHEAD:
            line = read
    return b_g


@triton.jit
def _advance(
    b_g, line, p_g, o_q, low, high, C: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr,
    BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write g of one line; return what it adds to that of the line before, W^T g."""
    b_full = ()
    for p in tl.static_range(P):
        b_t = b_g[p] + line[4 * p + 3]
        tl.store(p_g + p * C, b_t.to(p_g.dtype.element_ty), mask=within(o_q + p, low, high, GRID))
        b_full = b_full + (b_t,)
    # The lanes beside weight what reaches a position from theirs, for they hold the weights; ends get nothing.
    o_lane = tl.arange(0, WC * 32)[:, None]
    g_after = neighbour(line[0] * b_full[0], False, WC, CL, BC)
    g_before = neighbour(line[4 * P - 2] * b_full[P - 1], True, WC, CL, BC)
    g_after, g_before = tl.where(o_lane < WC * 32 - CL, g_after, 0.0), tl.where(o_lane >= CL, g_before, 0.0)
    b_next = ()
    for p in tl.static_range(P):
        g_up = g_after if p == P - 1 else line[4 * p + 4] * b_full[p + 1]
        g_down = g_before if p == 0 else line[4 * p - 2] * b_full[p - 1]
        b_next = b_next + (g_up + line[4 * p + 1] * b_full[p] + g_down,)
    return b_next

"""The backward kernel of the line scan: the scan run backwards with transposed weights, and every input's gradient.

The derivation is in `kernels/README.md`. With g_i the gradient of the state of line i,

    g_i = u_i dy_i + W_(i+1)^T g_(i+1)      du = h dy      dlam = x g      dx = sum over directions of lam g

Only g moves between lanes. Shifted, it serves the transposed step and, at the lane it came to, the sums over channels
of g_i[j +- 1] h_(i-1)[j]; these are one number a lane and move once more. A warp writes its two sums of a position, L
and R, and a second kernel makes gradients of logits of them.
"""

import triton
import triton.language as tl

from gspn2_kernels.triton_tiles import (
    SIZES,
    complements,
    direction,
    get,
    handed_on,
    neighbour_lanes,
    per_lane,
    per_row,
    place,
    put,
    segments,
    to_rows,
    to_state,
    weights,
    within,
    zeros,
)


@triton.jit(do_not_specialize=SIZES)
def line_scan_bwd_kernel(
    x, lam, logits, u, dy, states, dx, dlam, du, sums, scratch, first, last, launch, H, W, segment, state_scale,
    sxb, slb, sab, sub, syb, C: tl.constexpr, GC: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SLD: tl.constexpr,
    SA: tl.constexpr, SAD: tl.constexpr, SAG: tl.constexpr, SU: tl.constexpr, SUD: tl.constexpr, SY: tl.constexpr,
    SYD: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, WP: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr,
    P: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Scan lines `first` to `last`, counted from the last line, of one direction of one image backwards.

    Programs and inputs as in `line_scan_fwd_kernel`; dx, dlam and du are contiguous (B, H, W, 4, C), a share of dx for
    each direction. Every warp of channels writes its own share of L and R (shares, B, 4, T, M, 2), line by line;
    nothing is added up in memory, so the result does not depend on who comes first.
    """
    i_d, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    T, M, step, across, start = direction(i_d, H, W)
    own, origin = segments(M, GRID, 32 // CL, P)
    o_q, o_c = place(M, origin, C, WC, GRID, WP, CL, BC, P)
    r_q, r_c = place(M, origin, C, WC, GRID, 1, CL, BC, P)
    o_v, r_v = o_c[:, None] + tl.arange(0, BC)[None, :], r_c[:, None] + tl.arange(0, BC)[None, :]
    o_pixel, r_pixel = start + o_q * across, start + r_q * across
    p_x = x + i_b * sxb + (o_pixel * SX)[:, None] + o_v
    p_l = lam + i_b * slb + i_d * SLD + (o_pixel * SL)[:, None] + o_v
    p_u = u + i_b * sub + i_d * SUD + (o_pixel * SU)[:, None] + o_v
    p_y = dy + i_b * syb + i_d * SYD + (o_pixel * SY)[:, None] + o_v
    p_s = states + (i_b * 4 + i_d) * (H * W * C) + (o_q * C)[:, None] + o_v
    p_a = logits + i_b * sab + i_d * SAD + (r_pixel * SA + r_c // GC * SAG)[:, None] + tl.arange(0, 4)[None, :]
    o_out = i_b * (H * W * 4 * C) + i_d * C + (r_pixel * (4 * C))[:, None] + r_v
    p_dx, p_dl, p_du = dx + o_out, dlam + o_out, du + o_out
    o_share = (r_c // (CL * BC)).to(tl.int64) * tl.num_programs(2) * 4 + i_b * 4 + i_d
    p_lr = sums + (o_share * (H * W * 2) + r_q * 2)[:, None] + tl.arange(0, 2)[None, :]
    low = tl.program_id(0) % GRID * own
    _scan(
        first, tl.minimum(last, T), launch, T, segment, state_scale, step, across, M, origin, p_x, p_l, p_u, p_y, p_s,
        p_a, p_dx, p_dl, p_du, p_lr, handed_on(scratch, i_b * 4 + i_d, H, W, WC, GRID, CL, BC), o_q, r_q, low,
        tl.minimum(low + own, M), C, SX, SL, SU, SY, SA, WC, GRID, WP, CL, BC, P, NS,
    )  # fmt: skip


@triton.jit
def _scan(
    first, last, launch, T, segment, state_scale, step, across, M, origin, p_x, p_l, p_u, p_y, p_s, p_a, p_dx, p_dl,
    p_du, p_lr, p_g, o_q, r_q, low, high, C: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SU: tl.constexpr,
    SY: tl.constexpr, SA: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, WP: tl.constexpr, CL: tl.constexpr,
    BC: tl.constexpr, P: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Go through the lines, last first, with the g that the launch before left."""
    b_g, b_h = zeros(WC, BC, P), ()
    same = tl.broadcast_to(tl.arange(0, 32)[None, :, None], (BC, 32, WC))
    for p in tl.static_range(P):
        m_load = within(o_q + p, 0, M, GRID) & (first < last)
        b_s = tl.load(p_s + ((T - 1 - first) * M + p) * C, mask=m_load, other=0.0)
        # An identity, for the layout in registers that the loop works in.
        b_h = b_h + (tl.gather(to_state(b_s, WC, WP, CL, BC), same, 1),)
    if GRID > 1:
        if launch > 0:
            b_g = get(p_g, launch % 2, M, origin, WC, CL, BC, P)
    b_g, b_h = _lines(
        b_g, b_h, first, last, T, segment, state_scale, step, across, M, p_x, p_l, p_u, p_y, p_s, p_a, p_dx, p_dl,
        p_du, p_lr, o_q, r_q, low, high, C, SX, SL, SU, SY, SA, WC, GRID, WP, CL, BC, P, NS,
    )  # fmt: skip
    if GRID > 1:
        put(b_g, p_g, (launch + 1) % 2, M, origin, low, high, WC, CL, BC, P)


@triton.jit
def _lines(
    b_g, b_h, first, last, T, segment, state_scale, step, across, M, p_x, p_l, p_u, p_y, p_s, p_a, p_dx, p_dl, p_du,
    p_lr, o_q, r_q, low, high, C: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SU: tl.constexpr,
    SY: tl.constexpr, SA: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, WP: tl.constexpr,
    CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Go through lines for which a segment needs nothing from its neighbours."""
    for i_s in tl.range(first, last, num_stages=NS):
        i = T - 1 - i_s
        keep = tl.where(i % segment == 0, 0.0, 1.0)
        b_g, b_h = _step(
            b_g, b_h, keep, i, i * step, M, across, state_scale, p_x, p_l, p_u, p_y, p_s, p_a, p_dx, p_dl, p_du,
            p_lr, o_q, r_q, low, high, C, SX, SL, SU, SY, SA, WC, GRID, WP, CL, BC, P,
        )  # fmt: skip
    return b_g, b_h


@triton.jit
def _step(
    b_g, b_h, keep, i, o_line, M, across, state_scale, p_x, p_l, p_u, p_y, p_s, p_a, p_dx, p_dl, p_du, p_lr,
    o_q, r_q, low, high, C: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SU: tl.constexpr, SY: tl.constexpr,
    SA: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, WP: tl.constexpr, CL: tl.constexpr,
    BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one line; return what its g adds to the line before, and the states of that line."""
    b_full, b_before, b_w = (), (), ()
    for p in tl.static_range(P):
        o = o_line + p * across
        m_load, m_all = within(o_q + p, 0, M, GRID), within(r_q + p, 0, M, GRID)
        m_own = within(r_q + p, low, high, GRID)
        b_x = to_state(tl.load(p_x + o * SX, mask=m_load, other=0.0), WC, WP, CL, BC).to(tl.float32)
        b_l = to_state(tl.load(p_l + o * SL, mask=m_load, other=0.0), WC, WP, CL, BC).to(tl.float32)
        b_u = to_state(tl.load(p_u + o * SU, mask=m_load, other=0.0), WC, WP, CL, BC).to(tl.float32)
        b_dy = to_state(tl.load(p_y + o * SY, mask=m_load, other=0.0), WC, WP, CL, BC).to(tl.float32)
        b_s = tl.load(p_s + ((i - 1) * M + p) * C, mask=m_load & (i > 0), other=0.0)
        b_a = tl.load(p_a + o * SA, mask=m_all, other=0.0)
        outside = (r_q + p < 0) | (r_q + p >= M)
        m_first, m_last = outside | (r_q + p == 0), outside | (r_q + p == M - 1)
        w0, w1, w2 = weights(b_a, m_first, m_last, keep, WC * 32)
        b_w = b_w + ((per_lane(w0, WC), per_lane(w1, WC), per_lane(w2, WC)),)
        b_t = b_g[p] + b_u * b_dy
        b_full = b_full + (b_t,)
        b_before = b_before + (to_state(b_s, WC, WP, CL, BC),)
        b_du = b_h[p].to(tl.float32) * state_scale * b_dy
        tl.store(p_du + o * (4 * C), to_rows(b_du, WC, BC).to(p_du.dtype.element_ty), mask=m_own)
        tl.store(p_dx + o * (4 * C), to_rows(b_l * b_t, WC, BC).to(p_dx.dtype.element_ty), mask=m_own)
        tl.store(p_dl + o * (4 * C), to_rows(b_x * b_t, WC, BC).to(p_dl.dtype.element_ty), mask=m_own)
    b_next, b_left, b_mid, b_right = _transposed_step(b_full, b_before, b_w, WC, CL, BC, P)
    _write_sums(b_left, b_mid, b_right, state_scale, p_lr + i * (M * 2), r_q, low, high, WC, GRID, CL, P)
    return b_next, b_before


@triton.jit
def _transposed_step(b_g, b_h, b_w, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """Compute W^T g, and sums over a lane's channels of h[j] times g[j + 1], g[j] and g[j - 1]."""
    before, after = neighbour_lanes(CL)
    lane = tl.broadcast_to(tl.arange(0, 32)[:, None], (32, WC))
    to_left, to_right = tl.broadcast_to(after[:, None], (32, WC)), tl.broadcast_to(before[:, None], (32, WC))
    # A lane without a neighbour reads itself, and nothing of it.
    w_after = tl.where(lane < 32 - CL, tl.gather(b_w[0][0], to_left, 0), 0.0)
    w_before = tl.where(lane >= CL, tl.gather(b_w[P - 1][2], to_right, 0), 0.0)
    g_after = tl.gather(b_g[0], tl.broadcast_to(after[None, :, None], (BC, 32, WC)), 1)
    g_before = tl.gather(b_g[P - 1], tl.broadcast_to(before[None, :, None], (BC, 32, WC)), 1)
    b_next, b_left, b_mid, b_right = (), (), (), ()
    for p in tl.static_range(P):
        g_up = g_after if p == P - 1 else b_g[p + 1]
        g_down = g_before if p == 0 else b_g[p - 1]
        w_up = w_after if p == P - 1 else b_w[p + 1][0]
        w_down = w_before if p == 0 else b_w[p - 1][2]
        b_t = b_h[p].to(tl.float32)
        b_left = b_left + (tl.sum(g_up * b_t, 0),)
        b_mid = b_mid + (tl.sum(b_g[p] * b_t, 0),)
        b_right = b_right + (tl.sum(g_down * b_t, 0),)
        b_next = b_next + (w_up[None] * g_up + b_w[p][1][None] * b_g[p] + w_down[None] * g_down,)
    return b_next, b_left, b_mid, b_right


@triton.jit
def _write_sums(
    b_left, b_mid, b_right, state_scale, p_lr, r_q, low, high, WC: tl.constexpr, GRID: tl.constexpr,
    CL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write L and R of one line, sums of g[j] (h[j - 1] - h[j]) and g[j] (h[j + 1] - h[j]) over a warp's channels."""
    before, after = neighbour_lanes(CL)
    to_left, to_right = tl.broadcast_to(after[:, None], (32, WC)), tl.broadcast_to(before[:, None], (32, WC))
    l_before, r_after = tl.gather(b_left[P - 1], to_right, 0), tl.gather(b_right[0], to_left, 0)
    for p in tl.static_range(P):
        b_l = ((l_before if p == 0 else b_left[p - 1]) - b_mid[p]) * state_scale
        b_r = ((r_after if p == P - 1 else b_right[p + 1]) - b_mid[p]) * state_scale
        b_lr = tl.join(per_row(_over_channels(b_l, WC, CL), WC), per_row(_over_channels(b_r, WC, CL), WC))
        m_own = within(r_q + p, low, high, GRID) & (tl.arange(0, WC * 32) % CL == 0)[:, None]
        tl.store(p_lr + p * 2, b_lr, mask=m_own)


@triton.jit
def _over_channels(v, WC: tl.constexpr, CL: tl.constexpr):
    """Add up (32, WC) over the CL lanes of a position; every one of them gets the sum."""
    lane = tl.arange(0, 32)
    if CL >= 2:
        v += tl.gather(v, tl.broadcast_to((lane ^ 1)[:, None], (32, WC)), 0)
    if CL >= 4:
        v += tl.gather(v, tl.broadcast_to((lane ^ 2)[:, None], (32, WC)), 0)
    if CL >= 8:
        v += tl.gather(v, tl.broadcast_to((lane ^ 4)[:, None], (32, WC)), 0)
    return v


@triton.jit(do_not_specialize=("H", "W", "segment"))
def sum_shares_kernel(
    shares, sums, logits, dx, dlogits, H, W, segment, sab, C: tl.constexpr, G: tl.constexpr, SA: tl.constexpr,
    SAD: tl.constexpr, SAG: tl.constexpr, TILES: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the shares of dx over the directions, and L and R over the tiles of a group, for TH x TW pixels.

    The shares of L and R lie line by line, as the scans wrote them, and a line is a row or a column: a block of both
    reads either in runs. dlogits lies pixel by pixel.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o, tiles = tl.arange(0, TH * TW), tl.cdiv(W, TW)
    row, column = tl.program_id(0) // tiles * TH + o // TW, tl.program_id(0) % tiles * TW + o % TW
    there, o_p = (row < H) & (column < W), row * W + column
    o_c = tl.arange(0, BLOCK_C)
    m_x = there[:, None] & (o_c < C)[None, :]
    b_x = tl.zeros((TH * TW, BLOCK_C), tl.float32)
    o_x = (i_b * (H * W) + o_p)[:, None] * C
    for i_d in tl.static_range(4):
        b_x += tl.load(shares + o_x * 4 + i_d * C + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    tl.store(dx + o_x + o_c[None, :], b_x.to(dx.dtype.element_ty), mask=m_x)
    p_a = logits + i_b * sab + (o_p * SA)[:, None] + tl.arange(0, 4)[None, :]
    for i_d in tl.static_range(4):
        line = row if i_d == 0 else H - 1 - row if i_d == 1 else column if i_d == 2 else W - 1 - column
        q = column if i_d < 2 else row
        M = W if i_d < 2 else H
        keep = tl.where(line % segment == 0, 0.0, 1.0)
        for i_g in tl.static_range(G):
            b_lr = tl.zeros((TH * TW, 2), tl.float32)
            for i_t in range(i_g * TILES // G, (i_g + 1) * TILES // G):
                o_w = ((i_t * tl.num_programs(1) + i_b) * 4 + i_d) * (H * W) + line * M + q
                b_lr += tl.load(sums + o_w[:, None] * 2 + tl.arange(0, 2)[None, :], mask=there[:, None], other=0.0)
            b_a = tl.load(p_a + i_d * SAD + i_g * SAG, mask=there[:, None], other=0.0)
            b_da = _logit_gradients(b_lr, b_a, q == 0, q == M - 1, keep, TH * TW)
            o_k = tl.arange(0, 4)[None, :]
            o_a = (((i_b * (H * W) + o_p) * 4 + i_d) * G + i_g)[:, None] * 3 + o_k
            tl.store(dlogits + o_a, b_da.to(dlogits.dtype.element_ty), mask=there[:, None] & (o_k < 3))


@triton.jit
def _logit_gradients(b_lr, b_a, first, last, keep, rows: tl.constexpr):
    """Compute dlogits_k = (1 - s_k) w_k (dw_k - sum_m w_m dw_m) of (rows, 4) logits, the last of them padding.

    The weights sum to 1, so dw_k counts only against dw_1: L for k = 0, R for k = 2.
    """
    b_l, b_r = tl.split(b_lr)
    w0, w1, w2 = weights(b_a, first, last, keep, rows)
    s0, s1, s2 = complements(b_a, first, last, rows)
    b_t = w0 * b_l + w2 * b_r
    d0, d1, d2 = w0 * (b_l - b_t) * s0, -w1 * b_t * s1, w2 * (b_r - b_t) * s2
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, tl.zeros_like(d1))), (rows, 4))

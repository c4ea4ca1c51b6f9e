"""Pieces that the Triton kernels of the line scan share: who holds what, the weights, the exchange of neighbours.

A program is a handful of warps that scan one direction of one image, for a block of CL BC channels. It holds a line in
registers: its 32 WC lanes are positions x CL groups of BC channels, in the order of memory, so that a load of a warp is
runs of whole pixels, and every lane keeps P adjacent positions, one tensor each (a tuple). Neighbours are mostly the
lane's own registers; the rest is a shuffle in a program of one warp, else a pass through shared memory. A line that is
too long for that is split into GRID segments, one program each.

Shapes: lanes 32 WC, BC channels of a lane; tensors of states and of memory are (lanes, BC).
"""

import triton
import triton.language as tl

# Arguments whose values are not worth a compilation of their own: a new image size runs the code of the last.
SIZES = ("first", "last", "launch", "H", "W", "segment")


@triton.jit
def direction(i_d, H, W):
    """Tell lines T, positions M, the pixels between lines and between positions, and the first pixel of a scan."""
    vertical = i_d < 2
    T = tl.where(vertical, H, W)
    M = tl.where(vertical, W, H)
    step = tl.where(vertical, W, 1)
    across = tl.where(vertical, 1, W)
    backwards = i_d % 2 == 1
    return T, M, tl.where(backwards, -step, step), across, tl.where(backwards, (T - 1) * step, 0)


@triton.jit
def segments(M, GRID: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """Share M positions out to GRID segments that hold K P each: tell a segment's own number, and where it starts.

    What it holds besides, the halo of n positions that overlaps with a neighbour's own, lets a segment do n steps
    before it needs the neighbour's states again; see `Plan.lines_per_launch`.
    """
    own = tl.cdiv(M, GRID)
    seg = tl.program_id(0) % GRID
    if GRID == 1:
        return own, 0
    elif GRID == 2:
        # Both segments touch an end of the line, where nothing is missing: one halo each.
        return own, seg * (2 * own - K * P)
    else:
        return own, seg * own - (K * P - own) // 2


@triton.jit
def exponentials(b_a, first, last, rows: tl.constexpr):
    """Compute exp(-a) of three logits, shifted alike where those of the neighbours that exist are all very low.

    b_a holds 4 logits a row, the last of them padding. Below -20 a sigmoid is exp(a) in fp32, so a common shift
    leaves the weights as they are. After it a product of two terms stays finite, and one that was cut off is a weight
    of 1e-10.
    """
    even, odd = tl.split(tl.reshape(b_a, (rows, 2, 2)))
    a0, a2 = tl.split(even)
    a1, _ = tl.split(odd)
    log2e: tl.constexpr = 1.4426950408889634
    a0, a1, a2 = -log2e * a0.to(tl.float32), -log2e * a1.to(tl.float32), -log2e * a2.to(tl.float32)
    least = tl.minimum(tl.minimum(tl.where(first, a1, a0), tl.where(last, a1, a2)), a1)
    shift = tl.maximum(least - 28.0, 0.0)
    return _exp2(a0 - shift), _exp2(a1 - shift), _exp2(a2 - shift)


@triton.jit
def _exp2(b_a):
    """Compute 2^a of at most 2^62; a logit that is no number shows in the result."""
    return tl.exp2(tl.minimum(b_a, 62.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def weights(b_a, first, last, keep, rows: tl.constexpr):
    """Normalise logits (rows, 4) over the neighbours that exist; keep = 0 cuts the line off from the one before."""
    e0, e1, e2 = exponentials(b_a, first, last, rows)
    s0, s1, s2 = 1 + e0, 1 + e1, 1 + e2
    # 1/s0 : 1/s1 : 1/s2 = s1 s2 : s0 s2 : s0 s1, with one division in all.
    w0 = tl.where(first, 0.0, s1 * s2)
    w1 = s0 * s2
    w2 = tl.where(last, 0.0, s0 * s1)
    scale = keep / (w0 + w1 + w2)
    return w0 * scale, w1 * scale, w2 * scale


@triton.jit
def complements(b_a, first, last, rows: tl.constexpr):
    """Compute 1 - sigmoid of three logits (rows, 4): the inner derivative of a weight's logarithm."""
    e0, e1, e2 = exponentials(b_a, first, last, rows)
    return e0 / (1 + e0), e1 / (1 + e1), e2 / (1 + e2)


@triton.jit
def repeated(b_v, rows: tl.constexpr, times: tl.constexpr):
    """Repeat each of a number of rows so many times, one after the other."""
    return tl.reshape(tl.broadcast_to(b_v[:, None], (rows, times)), (rows * times,))


@triton.jit
def _beside(before: tl.constexpr, WC: tl.constexpr, CL: tl.constexpr):
    """Tell for each lane the one that has the positions before or after, clamped at the ends."""
    lane = tl.arange(0, WC * 32)
    if before:
        return tl.maximum(lane - CL, lane % CL)
    else:
        return tl.minimum(lane + CL, WC * 32 - CL + lane % CL)


@triton.jit
def _through_memory(b_v, other, lanes: tl.constexpr, BC: tl.constexpr):
    """Take what some lanes hold, (lanes, BC), once for each of `other`, by a way through shared memory: (BC, others).

    Of one dimension, for else Triton changes the layout of the states, so that a gather stays within a warp.
    """
    flat = tl.reshape(tl.permute(b_v, (1, 0)), (BC * lanes,))
    o = tl.arange(0, BC)[:, None] * lanes + other[None, :]
    return tl.reshape(tl.gather(flat, tl.reshape(o, (BC * other.shape[0],)), 0), (BC, other.shape[0]))


@triton.jit
def neighbour(b_v, before: tl.constexpr, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr):
    """Take what the lanes hold that have the positions before or after, clamped at the ends."""
    other = _beside(before, WC, CL)
    if WC == 1:
        return tl.gather(b_v, tl.broadcast_to(other[:, None], (WC * 32, BC)), 0)
    else:
        return tl.permute(_through_memory(b_v, other, WC * 32, BC), (1, 0))


@triton.jit
def neighbours(b_h, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """Take the last position of the lanes before, and the first of those after, clamped at the ends."""
    if WC > 1 and P == 1:
        # Both are of one tensor: they share its way through shared memory, and the barriers.
        other = tl.permute(tl.join(_beside(True, WC, CL), _beside(False, WC, CL)), (1, 0))
        found = _through_memory(b_h[0], tl.reshape(other, (2 * WC * 32,)), WC * 32, BC)
        return tl.split(tl.permute(tl.reshape(found, (BC, 2, WC * 32)), (2, 0, 1)))
    else:
        return neighbour(b_h[P - 1], True, WC, CL, BC), neighbour(b_h[0], False, WC, CL, BC)


@triton.jit
def place(
    M, origin, C: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Tell the first position and the first channel of each lane; beyond C, positions lie outside the line."""
    lane = tl.arange(0, WC * 32)
    o_c = (tl.program_id(0) // GRID * CL + lane % CL) * BC
    return tl.where(o_c < C, origin + lane // CL * P, M), o_c


@triton.jit
def within(o_q, low, high, GRID: tl.constexpr):
    """Mask the rows whose position lies in a range; the range of a line in one piece starts at 0."""
    if GRID == 1:
        return (o_q < high)[:, None]
    else:
        return ((o_q >= low) & (o_q < high))[:, None]


@triton.jit
def needed(o_q, low, high, M, left, GRID: tl.constexpr):
    """Mask the rows whose positions a segment, which owns low to high, needs with so many lines left in a launch.

    What lies d positions beyond its own reaches them d lines later. With less than no lines left it needs nothing.
    """
    if GRID == 1:
        return (o_q < tl.where(left < 0, 0, M))[:, None]
    else:
        beyond = tl.maximum(tl.maximum(low - o_q, o_q - high + 1), 0)
        return (tl.where((o_q >= 0) & (o_q < M), beyond, 1 << 30) <= left)[:, None]


@triton.jit
def read_line(
    i, last, keep, steps, w_step, M, low, high, p_x, p_l, p_u, p_w, o_q, o_own, SX: tl.constexpr, SL: tl.constexpr,
    SU: tl.constexpr, SA: tl.constexpr, MORE: tl.constexpr, WC: tl.constexpr, GRID: tl.constexpr, CL: tl.constexpr,
    P: tl.constexpr, APART: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Read what line i takes from memory, nothing unless it comes before the `last` of this launch.

    For each of a lane's positions three weights, the product of l and x, or l without an x, and u where there is one.
    `steps` are the pixels from line to line and from position to position. p_w points to logits, which are normalised
    here, or with APART to weights, w_step from line to line; keep = 0 cuts off the line before. With SHARE each lane
    normalises those of one position, o_own, for all lanes that hold it. What is handed on after the last line is MORE
    lines further than that.
    """
    line = ()
    left = last - 1 - i if MORE == 0 else tl.where(i < last, last - 1 - i + MORE, -1)
    if SHARE:
        b_a = tl.load(p_w + i * steps[0] * SA, mask=needed(o_own, low, high, M, left, GRID), other=0.0)
        b_w0, _, b_w2 = weights(b_a, o_own <= 0, o_own >= M - 1, keep, WC * 32)
    for p in tl.static_range(P):
        o = i * steps[0] + p * steps[1]
        m_load = needed(o_q + p, low, high, M, left, GRID)
        if APART:
            w0, w2 = tl.split(tl.load(p_w + (i * w_step + p) * 2, mask=m_load, other=0.0))
            w1 = keep - (w0 + w2)  # the weights of a line that is not cut off add up to 1
        elif SHARE:
            w0, w2 = _from_lane(b_w0, p, WC, CL), _from_lane(b_w2, p, WC, CL)
            w1 = keep - (w0 + w2)
        else:
            b_a = tl.load(p_w + o * SA, mask=m_load, other=0.0)
            w0, w1, w2 = weights(b_a, o_q + p <= 0, o_q + p >= M - 1, keep, WC * 32)
        b_l = tl.load(p_l + o * SL, mask=m_load, other=0.0).to(tl.float32)
        if p_x is not None:
            b_l *= tl.load(p_x + o * SX, mask=m_load, other=0.0).to(tl.float32)
        line = line + (w0[:, None], w1[:, None], w2[:, None], b_l)
        if p_u is not None:
            m_own = needed(o_q + p, low, high, M, tl.minimum(left, 0), GRID)
            line = line + (tl.load(p_u + o * SU, mask=m_own, other=0.0).to(tl.float32),)
    return line


@triton.jit
def own_position(o_q, M, WC: tl.constexpr, CL: tl.constexpr, P: tl.constexpr):
    """Tell which of its P positions, which it shares with CL - 1 other lanes, a lane works on alone; M if none."""
    own = tl.arange(0, WC * 32) % CL
    return tl.where(own < P, o_q + own, M)


@triton.jit
def _from_lane(b_v, p: tl.constexpr, WC: tl.constexpr, CL: tl.constexpr):
    """Take what the p-th lane holds of the CL lanes that share positions: a shuffle."""
    rows: tl.constexpr = WC * 32 // CL
    found = tl.gather(tl.reshape(b_v, (rows, CL)), tl.full((rows, CL), p, tl.int32), 1)
    return tl.reshape(found, (WC * 32,))


@triton.jit
def weights_of(
    p_w, i_b, i_d, sab, H, W, T, M, step, across, start, o_q, o_own, o_c, C: tl.constexpr, GC: tl.constexpr,
    SA: tl.constexpr, SAD: tl.constexpr, SAG: tl.constexpr, APART: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Point to the logits of each lane in the line of pixel `start`, or with APART to its weights; see `line_weights`.

    With SHARE to the logits of the position that it works on alone. Positions are `across` pixels apart. A scan that
    takes lines by negative steps begins with the last of memory.
    """
    group = o_c // GC
    if APART:
        first = tl.where(step < 0, (T - 1) * M, 0)
        o_w = (first + o_q)[:, None] * 2 + tl.arange(0, 2)[None, :]
        return p_w + (i_b * 4 + i_d) * (C // GC) * (H * W * 2) + (group * (H * W * 2))[:, None] + o_w
    else:
        o_pixel = start + (o_own if SHARE else o_q) * across
        return p_w + i_b * sab + i_d * SAD + (o_pixel * SA + group * SAG)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _carried(
    scratch, buffer, M, origin, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Point to the states of a line in memory, and tell the position of each lane.

    Two buffers take turns between launches: no program writes what another may still be reading.
    """
    lane = tl.arange(0, WC * 32)
    o_q = origin + lane // CL * P
    o_c = (lane % CL * BC)[:, None] + tl.arange(0, BC)[None, :]
    return scratch + ((buffer * M + o_q) * (CL * BC))[:, None] + o_c, o_q[:, None]


@triton.jit
def handed_on(scratch, i, H, W, GRID: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr):
    """Point to what the launches of a block of channels hand on, in direction i, counted through the images."""
    block = i * (tl.num_programs(0) // GRID) + tl.program_id(0) // GRID
    return scratch + block * (2 * tl.maximum(H, W) * CL * BC)


@triton.jit
def put(
    b_h, scratch, buffer, M, origin, low, high, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Write the states that a segment owns, for the next launch."""
    p_h, o_q = _carried(scratch, buffer, M, origin, WC, CL, BC, P)
    for p in tl.static_range(P):
        tl.store(p_h + p * (CL * BC), b_h[p], mask=(o_q + p >= low) & (o_q + p < high))


@triton.jit
def get(scratch, buffer, M, origin, WC: tl.constexpr, CL: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """Read the states of all positions that a segment holds, as the launch before left them."""
    p_h, o_q = _carried(scratch, buffer, M, origin, WC, CL, BC, P)
    b_h = ()
    for p in tl.static_range(P):
        there = (o_q + p >= 0) & (o_q + p < M)
        b_h = b_h + (tl.load(p_h + p * (CL * BC), mask=there, other=0.0),)
    return b_h


@triton.jit
def zeros(WC: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """Make the states before the first line."""
    b_h = ()
    for _ in tl.static_range(P):
        b_h = b_h + (tl.zeros((WC * 32, BC), tl.float32),)
    return b_h

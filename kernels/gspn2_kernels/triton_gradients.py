"""The gradients of the line scan's inputs from those of its states: one pass over memory, without a scan.

The derivation is in `kernels/README.md`. With g_i, of `triton_backward`, the gradient of the state h_i of line i,

    du = h dy      dlam = x g      dx = sum over directions of lam g
    L = sum over a group of g_i[j] (h_(i-1)[j-1] - h_(i-1)[j])      R = the same with h_(i-1)[j+1]

and L and R make the gradients of the logits.
"""

import triton
import triton.language as tl

from gspn2_kernels.triton_tiles import complements, repeated, weights


@triton.jit(do_not_specialize=("H", "W", "segment", "sab"))
def gradients_kernel(
    x, lam, logits, dy, states, g, dx, dlam, dlogits, du, H, W, segment, state_scale, sxb, slb, sab, syb,
    C: tl.constexpr, G: tl.constexpr, SX: tl.constexpr, SL: tl.constexpr, SLD: tl.constexpr, SA: tl.constexpr,
    SAD: tl.constexpr, SAG: tl.constexpr, SY: tl.constexpr, SYD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BG: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradients of TH x TW pixels of an image: program (block of pixels, image).

    States and g lie line by line (B, 4, T, M, C), and a line is a row or a column: a block of both reads either in
    runs. Inputs have batch strides s?b and strides of a pixel S?, of a direction S?D, of a group SAG; gradients are
    contiguous. BG and BC are the groups and the channels of a group, to powers of two.
    """
    i_b, o, tiles = tl.program_id(1).to(tl.int64), tl.arange(0, TH * TW), tl.cdiv(W, TW)
    row, column = tl.program_id(0) // tiles * TH + o // TW, tl.program_id(0) % tiles * TW + o % TW
    there, pixel = (row < H) & (column < W), row * W + column
    o_c, m_c = _channels(there, C // G, G, BG, BC)
    # 32 bits hold the offsets inside an image.
    o_b = i_b * (H * W * C)
    p_y, o_y = dy + i_b * syb + (pixel * SY)[:, None] + o_c, (pixel * (4 * C))[:, None] + o_c
    p_l, p_du, p_dl = lam + i_b * slb + (pixel * SL)[:, None] + o_c, du + 4 * o_b + o_y, dlam + 4 * o_b + o_y
    o_g, o_k = tl.arange(0, BG)[None, :, None], tl.arange(0, 4)[None, None, :]
    p_a = logits + i_b * sab + (pixel * SA)[:, None, None] + o_g * SAG + o_k
    p_da = dlogits + i_b * (H * W * (12 * G)) + (pixel * (12 * G))[:, None, None] + o_g * 3 + o_k
    b_x = tl.load(x + i_b * sxb + (pixel * SX)[:, None] + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dx = tl.zeros((TH * TW, BG * BC), tl.float32)
    for i_d in tl.static_range(4):
        line = row if i_d == 0 else H - 1 - row if i_d == 1 else column if i_d == 2 else W - 1 - column
        q, M = (column, W) if i_d < 2 else (row, H)
        inner, o_s = line % segment != 0, ((i_d * (H * W) + line * M + q) * C)[:, None] + o_c
        p_h = states + 4 * o_b + o_s
        b_g = tl.load(g + 4 * o_b + o_s, mask=m_c, other=0.0).to(tl.float32)
        b_dy = tl.load(p_y + i_d * SYD, mask=m_c, other=0.0).to(tl.float32)
        b_h = tl.load(p_h, mask=m_c, other=0.0).to(tl.float32) * state_scale
        tl.store(p_du + i_d * C, (b_h * b_dy).to(du.dtype.element_ty), mask=m_c)
        tl.store(p_dl + i_d * C, (b_x * b_g).to(dlam.dtype.element_ty), mask=m_c)
        b_dx += tl.load(p_l + i_d * SLD, mask=m_c, other=0.0).to(tl.float32) * b_g
        b_l, b_r = _differences(p_h - M * C, m_c & inner[:, None], q, M, C)
        s_l, s_r = tl.reshape(b_g * b_l, (TH * TW, BG, BC)), tl.reshape(b_g * b_r, (TH * TW, BG, BC))
        m_a = there[:, None, None] & (o_g < G) & (o_k < 3)
        b_a = tl.load(p_a + i_d * SAD, mask=m_a, other=0.0)
        b_da = _logit_gradients(
            tl.sum(s_l, 2) * state_scale, tl.sum(s_r, 2) * state_scale, b_a, q, M, inner, TH * TW, BG
        )
        tl.store(p_da + i_d * (3 * G), b_da.to(dlogits.dtype.element_ty), mask=m_a)
    tl.store(dx + o_b + (pixel * C)[:, None] + o_c, b_dx.to(dx.dtype.element_ty), mask=m_c)


@triton.jit
def _channels(there, GC: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr):
    """Tell the channel of each of BG BC columns, BC for a group of GC, and which there are of the rows that are."""
    o = tl.arange(0, BG * BC)[None, :]
    if BG == 1:
        return o, there[:, None] & (o < GC)
    else:
        return o // BC * GC + o % BC, there[:, None] & (o // BC < G) & (o % BC < GC)


@triton.jit
def _differences(p_h, there, q, M, C: tl.constexpr):
    """Read the states of the line before: how much those to the left and to the right are above those in the middle."""
    b_m = tl.load(p_h, mask=there, other=0.0).to(tl.float32)
    b_l = tl.load(p_h - C, mask=there & (q > 0)[:, None], other=0.0).to(tl.float32)
    b_r = tl.load(p_h + C, mask=there & (q < M - 1)[:, None], other=0.0).to(tl.float32)
    return b_l - b_m, b_r - b_m


@triton.jit
def _logit_gradients(b_l, b_r, b_a, q, M, inner, rows: tl.constexpr, BG: tl.constexpr):
    """Compute dlogits_k = (1 - s_k) w_k (dw_k - sum_m w_m dw_m) of (rows, BG, 4) logits, the last of them padding.

    The weights sum to 1, so dw_k counts only against dw_1: L for k = 0, R for k = 2.
    """
    b_a, b_l, b_r = tl.reshape(b_a, (rows * BG, 4)), tl.reshape(b_l, (rows * BG,)), tl.reshape(b_r, (rows * BG,))
    first, last = repeated(q == 0, rows, BG), repeated(q == M - 1, rows, BG)
    keep = repeated(tl.where(inner, 1.0, 0.0), rows, BG)
    w0, w1, w2 = weights(b_a, first, last, keep, rows * BG)
    s0, s1, s2 = complements(b_a, first, last, rows * BG)
    b_t = w0 * b_l + w2 * b_r
    d0, d1, d2 = w0 * (b_l - b_t) * s0, -w1 * b_t * s1, w2 * (b_r - b_t) * s2
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, tl.zeros_like(d1))), (rows, BG, 4))

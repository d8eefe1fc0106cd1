"""Triton kernels for training: the two scan directions and the two convolutions of a block, forward and backward.

They take the place of ``mtr_lab.ops.selective_scan`` and ``causal_conv1d`` and compute the same functions. Everything
stays channels-last, so nothing is flipped or copied; the scan keeps each token's incoming state in bfloat16 for the
backward pass instead of computing it again.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32  # channels a program: one warp holds their states


@triton.jit
def _softplus(x):
    z = tl.exp(-tl.abs(x))
    w = 1 + z
    return tl.maximum(x, 0) + tl.where(w == 1, z, tl.log(w) * (z / tl.where(w == 1, 1, w - 1)))


@triton.jit
def _scan_forward(u, delta, b, c, a, d, bias, y, states, length, channels, step_g, step_b, step_t, reverse,
                  SAVE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    g = tl.program_id(2)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    ge = g * channels + e
    a2 = tl.load(a + ge[:, None] * N + n[None, :]) * 1.4426950408889634
    d_e, bias_e = tl.load(d + ge), tl.load(bias + ge)
    back = (reverse >> g) & 1
    stride = 1 - 2 * back
    first = (g * tl.num_programs(1) + tl.program_id(1)) * length
    t = back * (length - 1)
    bc = g * step_g + tl.program_id(1) * step_b + n
    at = (first + t) * channels + e
    u_t, delta_t = tl.load(u + at).to(tl.float32), tl.load(delta + at).to(tl.float32)
    b_t, c_t = tl.load(b + bc + t * step_t).to(tl.float32), tl.load(c + bc + t * step_t).to(tl.float32)
    h = tl.zeros((BLOCK, N), tl.float32)
    for _ in range(length):
        # What the next token needs is on its way while this one is computed.
        after = tl.minimum(tl.maximum(t + stride, 0), length - 1)
        at_after = (first + after) * channels + e
        u_n, delta_n = tl.load(u + at_after), tl.load(delta + at_after)
        b_n, c_n = tl.load(b + bc + after * step_t), tl.load(c + bc + after * step_t)
        if SAVE:
            tl.store(states + ((first + t) * channels + e)[:, None] * N + n[None, :], h.to(states.dtype.element_ty))
        dt = _softplus(delta_t + bias_e)
        h = tl.exp2(dt[:, None] * a2) * h + (dt * u_t)[:, None] * b_t[None, :]
        y_t = tl.sum(h * c_t[None, :], 1) + d_e * u_t
        tl.store(y + (first + t) * channels + e, y_t.to(y.dtype.element_ty))
        u_t, delta_t = u_n.to(tl.float32), delta_n.to(tl.float32)
        b_t, c_t = b_n.to(tl.float32), c_n.to(tl.float32)
        t = after


@triton.jit
def _scan_backward(u, delta, b, c, a, d, bias, states, dy, du, ddelta, db, dc, da, dd, dbias, length, channels,
                   step_g, step_b, step_t, reverse, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    g, image, images = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    ge = g * channels + e
    a2 = tl.load(a + ge[:, None] * N + n[None, :]) * 1.4426950408889634
    d_e, bias_e = tl.load(d + ge), tl.load(bias + ge)
    back = (reverse >> g) & 1
    stride = 2 * back - 1
    first = (g * images + image) * length
    t = (1 - back) * (length - 1)
    bc = g * step_g + image * step_b + n
    partial = (tl.program_id(0) * tl.num_programs(2) * images * length + first) * N + n
    at = (first + t) * channels + e
    u_t, delta_t = tl.load(u + at).to(tl.float32), tl.load(delta + at).to(tl.float32)
    dy_t = tl.load(dy + (image * length + t) * channels + e).to(tl.float32)
    b_t, c_t = tl.load(b + bc + t * step_t).to(tl.float32), tl.load(c + bc + t * step_t).to(tl.float32)
    h_t = tl.load(states + at[:, None] * N + n[None, :]).to(tl.float32)
    dh = tl.zeros((BLOCK, N), tl.float32)
    da_e = tl.zeros((BLOCK, N), tl.float32)
    dd_e = tl.zeros((BLOCK,), tl.float32)
    dbias_e = tl.zeros((BLOCK,), tl.float32)
    for _ in range(length):
        after = tl.minimum(tl.maximum(t + stride, 0), length - 1)
        at_after = (first + after) * channels + e
        u_n, delta_n = tl.load(u + at_after), tl.load(delta + at_after)
        dy_n = tl.load(dy + (image * length + after) * channels + e)
        b_n, c_n = tl.load(b + bc + after * step_t), tl.load(c + bc + after * step_t)
        h_n = tl.load(states + at_after[:, None] * N + n[None, :])

        x = delta_t + bias_e
        dt = _softplus(x)
        decay = tl.exp2(dt[:, None] * a2)
        write = dt * u_t
        dh += dy_t[:, None] * c_t[None, :]
        tl.store(dc + partial + t * N, tl.sum(dy_t[:, None] * (decay * h_t + write[:, None] * b_t[None, :]), 0))
        tl.store(db + partial + t * N, tl.sum(dh * write[:, None], 0))
        s = tl.sum(dh * b_t[None, :], 1)
        dh *= decay
        q = dh * h_t
        da_e += q * dt[:, None]
        dx = (tl.sum(q * a2, 1) * 0.6931471805599453 + u_t * s) * tl.sigmoid(x)
        dd_e += dy_t * u_t
        dbias_e += dx
        at = (first + t) * channels + e
        tl.store(du + at, (dt * s + d_e * dy_t).to(du.dtype.element_ty))
        tl.store(ddelta + at, dx.to(ddelta.dtype.element_ty))

        u_t, delta_t, dy_t = u_n.to(tl.float32), delta_n.to(tl.float32), dy_n.to(tl.float32)
        b_t, c_t, h_t = b_n.to(tl.float32), c_n.to(tl.float32), h_n.to(tl.float32)
        t = after
    each = (g * images + image) * channels + e
    tl.store(da + each[:, None] * N + n[None, :], da_e)
    tl.store(dd + each, dd_e)
    tl.store(dbias + each, dbias_e)


@triton.jit
def _gate_forward(y, z, out, elements, channels, step_z, G: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = i < elements
    total = tl.zeros((SIZE,), tl.float32)
    for g in tl.static_range(G):
        total += tl.load(y + g * elements + i, inside, 0).to(tl.float32)
    z_i = tl.load(z + (i // channels) * step_z + i % channels, inside, 0).to(tl.float32)
    tl.store(out + i, (total * z_i * tl.sigmoid(z_i)).to(out.dtype.element_ty), inside)


@triton.jit
def _gate_backward(y, z, dout, dy, dz, elements, channels, step_z, G: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = i < elements
    total = tl.zeros((SIZE,), tl.float32)
    for g in tl.static_range(G):
        total += tl.load(y + g * elements + i, inside, 0).to(tl.float32)
    z_i = tl.load(z + (i // channels) * step_z + i % channels, inside, 0).to(tl.float32)
    grad = tl.load(dout + i, inside, 0).to(tl.float32)
    s = tl.sigmoid(z_i)
    tl.store(dy + i, (grad * z_i * s).to(dy.dtype.element_ty), inside)
    tl.store(dz + i, (grad * total * s * (1 + z_i * (1 - s))).to(dz.dtype.element_ty), inside)


@triton.jit
def _before_silu(x, weight, bias, image, t, e, g, back, length, channels, step_x, W: tl.constexpr):
    ge = g * channels + e
    sign = 1 - 2 * back
    total = tl.load(bias + ge)[None, :] + tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    for k in tl.static_range(W):
        source = t - sign * (W - 1 - k)
        inside = (source >= 0) & (source < length) & (t < length)
        x_k = tl.load(x + (image * length + source)[:, None] * step_x + e[None, :], inside[:, None], 0).to(tl.float32)
        total += x_k * tl.load(weight + ge * W + k)[None, :]
    return total


@triton.jit
def _conv_forward(x, weight, bias, y, length, channels, step_x, reverse,
                  G: tl.constexpr, W: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    image = tl.program_id(2)
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    for g in tl.static_range(G):
        back = (reverse >> g) & 1
        p = _before_silu(x, weight, bias, image, t, e, g, back, length, channels, step_x, W)
        row = (g * tl.num_programs(2) + image) * length + t
        tl.store(y + row[:, None] * channels + e[None, :], (p * tl.sigmoid(p)).to(y.dtype.element_ty),
                 (t < length)[:, None])  # fmt: skip


@triton.jit
def _conv_backward_weight(x, weight, bias, dy, dp, dw, length, channels, step_x, reverse,
                          W: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    g, image = tl.program_id(2), tl.program_id(1)
    e = tl.program_id(0) * E + tl.arange(0, E)
    back = (reverse >> g) & 1
    sign = 1 - 2 * back
    first = (g * tl.num_programs(1) + image) * length
    out = ((g * tl.num_programs(1) + image) * channels + e) * (W + 1)
    db = tl.zeros((T, E), tl.float32)
    w0 = tl.zeros((T, E), tl.float32)
    w1 = tl.zeros((T, E), tl.float32)
    w2 = tl.zeros((T, E), tl.float32)
    w3 = tl.zeros((T, E), tl.float32)
    for start in range(0, length, T):
        t = start + tl.arange(0, T)
        p = _before_silu(x, weight, bias, image, t, e, g, back, length, channels, step_x, W)
        s = tl.sigmoid(p)
        at = (first + t)[:, None] * channels + e[None, :]
        dp_t = tl.load(dy + at, (t < length)[:, None], 0).to(tl.float32) * s * (1 + p * (1 - s))
        tl.store(dp + at, dp_t.to(dp.dtype.element_ty), (t < length)[:, None])
        db += dp_t
        for k in tl.static_range(W):
            source = t - sign * (W - 1 - k)
            inside = (source >= 0) & (source < length) & (t < length)
            x_k = tl.load(x + (image * length + source)[:, None] * step_x + e[None, :], inside[:, None], 0)
            term = dp_t * x_k.to(tl.float32)
            if k == 0:
                w0 += term
            if k == 1:
                w1 += term
            if k == 2:
                w2 += term
            if k == 3:
                w3 += term
    tl.store(dw + out, tl.sum(w0, 0))
    tl.store(dw + out + 1, tl.sum(w1, 0))
    tl.store(dw + out + 2, tl.sum(w2, 0))
    tl.store(dw + out + 3, tl.sum(w3, 0))
    tl.store(dw + out + 4, tl.sum(db, 0))


@triton.jit
def _conv_backward_input(dp, weight, dx, length, channels, reverse,
                         G: tl.constexpr, W: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    image = tl.program_id(2)
    t = tl.program_id(1) * T + tl.arange(0, T)
    e = tl.program_id(0) * E + tl.arange(0, E)
    total = tl.zeros((T, E), tl.float32)
    for g in tl.static_range(G):
        sign = 1 - 2 * ((reverse >> g) & 1)
        first = (g * tl.num_programs(2) + image) * length
        for k in tl.static_range(W):
            target = t + sign * (W - 1 - k)
            inside = (target >= 0) & (target < length) & (t < length)
            dp_k = tl.load(dp + (first + target)[:, None] * channels + e[None, :], inside[:, None], 0).to(tl.float32)
            total += dp_k * tl.load(weight + (g * channels + e) * W + k)[None, :]
    tl.store(dx + (image * length + t)[:, None] * channels + e[None, :], total.to(dx.dtype.element_ty),
             (t < length)[:, None])  # fmt: skip


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, reverse):
        directions, images, length, channels = u.shape
        u, delta, A, D, delta_bias = (t.contiguous() for t in (u, delta, A, D, delta_bias))
        assert B.stride() == C.stride()
        assert B.stride(3) == z.stride(2) == 1
        assert z.stride(0) == length * z.stride(1)
        assert channels % BLOCK == 0
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        save = any(ctx.needs_input_grad)
        y = torch.empty_like(u)
        kind = torch.float32 if u.dtype == torch.float32 else torch.bfloat16
        states = u.new_empty((*u.shape, A.shape[2]) if save else 1, dtype=kind)
        mask = sum(1 << g for g, back in enumerate(reverse) if back)
        _scan_forward[channels // BLOCK, images, directions](
            u, delta, B, C, A, D, delta_bias, y, states, length, channels, *B.stride()[:3], mask,
            SAVE=save, N=A.shape[2], BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
        out = torch.empty_like(y[0])
        _gate_forward[triton.cdiv(out.numel(), 1024),](
            y, z, out, out.numel(), channels, z.stride(1), G=directions, SIZE=1024, num_warps=4
        )
        ctx.mask = mask
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, y, states)
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, z, delta_bias, y, states = ctx.saved_tensors
        directions, images, length, channels = u.shape
        blocks, n = channels // BLOCK, A.shape[2]
        dout = dout.contiguous()
        dy, dz = torch.empty_like(dout), torch.empty_like(dout)
        _gate_backward[triton.cdiv(dout.numel(), 1024),](
            y, z, dout, dy, dz, dout.numel(), channels, z.stride(1), G=directions, SIZE=1024, num_warps=4
        )
        du, ddelta = torch.empty_like(u), torch.empty_like(u)
        db, dc = (A.new_empty(blocks, directions, images, length, n) for _ in range(2))
        da = A.new_empty(directions, images, channels, n)
        dd, dbias = (A.new_empty(directions, images, channels) for _ in range(2))
        _scan_backward[blocks, images, directions](
            u, delta, B, C, A, D, delta_bias, states, dy, du, ddelta, db, dc, da, dd, dbias,
            length, channels, *B.stride()[:3], ctx.mask, N=n, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
        return (
            du, ddelta.to(delta.dtype), da.sum(1), db.sum(0).to(B.dtype), dc.sum(0).to(C.dtype), dd.sum(1),
            dz.to(z.dtype), dbias.sum(1), None,
        )  # fmt: skip


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, reverse):
        images, length, channels = x.shape
        weight, bias = weight.contiguous(), bias.contiguous()
        assert x.stride(2) == 1
        assert x.stride(0) == length * x.stride(1)
        assert weight.shape[2] == 4
        assert channels % 64 == 0
        y = x.new_empty(len(reverse), images, length, channels)
        ctx.mask = sum(1 << g for g, back in enumerate(reverse) if back)
        _conv_forward[channels // 64, triton.cdiv(length, 16), images](
            x, weight, bias, y, length, channels, x.stride(1), ctx.mask, G=len(reverse), W=4, T=16, E=64, num_warps=4
        )
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        dy = dy.contiguous()
        directions, images, length, channels = dy.shape
        dp, dx = torch.empty_like(dy), torch.empty_like(dy[0])
        dw = weight.new_empty(directions, images, channels, 5)
        _conv_backward_weight[channels // 64, images, directions](
            x, weight, bias, dy, dp, dw, length, channels, x.stride(1), ctx.mask, W=4, T=16, E=64, num_warps=4
        )
        _conv_backward_input[channels // 64, triton.cdiv(length, 16), images](
            dp, weight, dx, length, channels, ctx.mask, G=directions, W=4, T=16, E=64, num_warps=4
        )
        dw = dw.sum(1)
        return dx, dw[..., :4], dw[..., 4], None


def selective_scan(u, delta, A, B, C, D, *, z=None, delta_bias=None, reverse=(False,), gap=None, stats=()):
    """``mtr_lab.ops.selective_scan`` with a gate and a bias, without gaps and statistics."""
    assert z is not None
    assert delta_bias is not None
    assert gap is None
    assert not stats
    with torch.autocast("cuda", enabled=False):
        y = _Scan.apply(u, delta.to(u.dtype), A, B, C, D, z, delta_bias, tuple(reverse))
    return y, y.new_empty(*u.shape[:3], 0, dtype=torch.float32)


def causal_conv1d(x, weight, bias, *, reverse=(False,)):
    """``mtr_lab.ops.causal_conv1d`` for four taps."""
    with torch.autocast("cuda", enabled=False):
        return _Conv.apply(x, weight, bias, tuple(reverse))

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(-LOG2E * x))
    return root * root


@triton.jit
def _softplus(x):
    e = tl.exp2(-LOG2E * tl.abs(x))
    p = -0.008574675768613815
    p = p * e + 0.044214192777872086
    p = p * e - 0.10785368084907532
    p = p * e + 0.17757023870944977
    p = p * e - 0.2449961155653
    p = p * e + 0.3327617645263672
    p = p * e - 0.49997448921203613
    p = p * e + 0.9999998211860657
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def _rows(pointer, start, stop, stride, offsets, inside, K: tl.constexpr):
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (tl.load(pointer + (start + k).to(tl.int64) * stride + offsets, mask=inside & (start + k < stop), other=0.0),)
    return rows


@triton.jit
def fwd(u, dt, A, B, C, D, z, bias, marks, start_state, final_state, chunk_states, y,
        u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t,
        length, width, n_state, tiles, segments, span, chunk, unit,
        SOFTPLUS: tl.constexpr, SAVE: tl.constexpr, I: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRE: tl.constexpr):
    program = tl.program_id(0)
    tile = program % tiles
    segment = program // tiles % segments
    batch = (program // tiles // segments).to(tl.int64)
    channel = tile * I + tl.arange(0, I)
    inside = channel < width
    n = tl.arange(0, N)
    inside_n = n < n_state
    both = inside[:, None] & inside_n[None, :]
    natural = channel[:, None] * n_state + n[None, :] * unit
    a2 = tl.load(A + natural, mask=both, other=0.0) * LOG2E
    h = tl.load(start_state + batch * width * n_state + natural, mask=both, other=0.0)
    if bias is not None:
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if D is not None:
        d = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    u += batch * u_b
    dt += batch * dt_b
    B += batch * B_b
    C += batch * C_b
    y += batch * length * width
    if z is not None:
        z += batch * z_b
    first = segment * span
    stop = tl.minimum(first + span, length)
    if PRE:
        us = _rows(u, first, stop, u_t, channel, inside, K)
        steps = _rows(dt, first, stop, dt_t, channel, inside, K)
        Bs = _rows(B, first, stop, B_t, n, inside_n, K)
        Cs = _rows(C, first, stop, C_t, n, inside_n, K)
        zs = _rows(z, first, stop, z_t, channel, inside, K)
    for t in range(first, stop, K):
        if PRE:
            us1 = _rows(u, t+K, stop, u_t, channel, inside, K)
            steps1 = _rows(dt, t+K, stop, dt_t, channel, inside, K)
            Bs1 = _rows(B, t+K, stop, B_t, n, inside_n, K)
            Cs1 = _rows(C, t+K, stop, C_t, n, inside_n, K)
            zs1 = _rows(z, t+K, stop, z_t, channel, inside, K)
        else:
            us = _rows(u, t, stop, u_t, channel, inside, K)
            steps = _rows(dt, t, stop, dt_t, channel, inside, K)
            Bs = _rows(B, t, stop, B_t, n, inside_n, K)
            Cs = _rows(C, t, stop, C_t, n, inside_n, K)
            zs = _rows(z, t, stop, z_t, channel, inside, K)
        for k in tl.static_range(K):
            x = us[k].to(tl.float32)
            step = _softplus(steps[k].to(tl.float32) + b)
            step = tl.where(t + k < stop, step, 0.0)
            h = tl.exp2(step[:, None] * a2) * h + (step * x)[:, None] * Bs[k].to(tl.float32)[None, :]
            out = tl.sum(h * Cs[k].to(tl.float32)[None, :], axis=1) + d * x
            g = zs[k].to(tl.float32)
            out = out * g * _sigmoid(g)
            tl.store(y + (t + k).to(tl.int64) * width + channel, out.to(y.dtype.element_ty), mask=inside & (t + k < stop))
        if PRE:
            us = us1
            steps = steps1
            Bs = Bs1
            Cs = Cs1
            zs = zs1
    tl.store(final_state + batch * width * n_state + natural, h, mask=both)

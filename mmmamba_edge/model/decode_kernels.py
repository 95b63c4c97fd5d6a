"""Triton kernels of a decoding step at batch 1: five launches a layer read its weights once.

A Mamba-2 layer is `mixer_in` (RMSNorm, all five projections, conv, SiLU, softplus), `ssd_step`,
`mixer_out` (norm per head, gate, output, residual), `ffn_in` (RMSNorm, gate, up, SiLU) and
`project` (down, residual); attention is in `decode_attention.py`. `begin` reads the token's vector,
`head` makes the logits. Sums are float32, the residual stream too.

At batch 1 a token costs the reading of the weights, so a kernel asks for its whole tile of them at
once, and does so before the kernel in front of it has ended (programmatic dependent launch, PDL):
only what a kernel before it wrote has to wait. Each kernel waits before it lets the next one start,
so no more than two overlap; weights and the layer's own state were complete long before.

Needs triton, and CUDA or Triton's interpreter; nothing imports this module but `fused_step.py`.
"""
# pyright: reportMissingImports=false, reportUnreachable=false
# Triton compiles this text itself: its types are not Python's.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait for what the kernel before wrote; then let the next one ask for its weights."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def weight_tile(matrix, rows, count, cols, width: tl.constexpr):
    """(ROWS, COLS) of a (count, width) matrix, zeros outside; read once, so kept in no cache."""
    inside = (rows < count)[:, None] & (cols < width)[None, :]
    place = rows.to(tl.int64)[:, None] * width + cols[None, :]
    return tl.load(matrix + place, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def vector(pointer, places, count):
    """float32 values, zeros outside."""
    return tl.load(pointer + places, mask=places < count, other=0.0).to(tl.float32)


@triton.jit
def product(tile, x):
    """(ROWS, COLS) times (COLS,): (ROWS,) in float32."""
    return tl.sum(tile.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def inverse_rms(x, width: tl.constexpr, eps: tl.constexpr):
    """1 / rms(x)."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact for small exp(x) too: steps are about 0.001."""
    small = tl.exp(tl.minimum(x, 20.0))
    whole = 1.0 + small
    rounded = tl.where(whole == 1.0, 1.0, whole - 1.0)
    return tl.where(x > 20.0, x, tl.where(whole == 1.0, small, small * tl.log(whole) / rounded))


@triton.jit
def begin(
    token, table, length, frequencies, scales, x, rope,
    hidden: tl.constexpr, half: tl.constexpr, ROPE: tl.constexpr,
    COLS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x = table[token]; and for both halves of the decoder, cosines and sines at this position.

    It is launched without PDL: whatever was on the stream before it, is complete.

    Args:
        token: (1,) int64.
        table: (vocab, hidden).
        length: (1,) int64: tokens read so far, this one's position.
        frequencies: (2, half) float32.
        scales: (2,) float32 that positions are divided by.
        x: (hidden,) float32.
        rope: (2, 2, half) float32: half of the decoder; cosines, sines.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(x + cols, vector(table + tl.load(token) * hidden, cols, hidden), mask=cols < hidden)
    if ROPE:
        if tl.program_id(0) < 2:
            which = tl.program_id(0)
            i = tl.arange(0, HALF)
            position = tl.load(length).to(tl.float32) / tl.load(scales + which)
            angle = position * vector(frequencies + which * half, i, half)
            tl.store(rope + which * 2 * half + i, tl.cos(angle), mask=i < half)
            tl.store(rope + which * 2 * half + half + i, tl.sin(angle), mask=i < half)


@triton.jit
def mixer_in(
    x, norm, value_w, key_w, query_w, gate_w, dt_w, conv_w, conv_b, column, dt_bias,
    mixed, gate, dt,
    hidden: tl.constexpr, key_value: tl.constexpr, heads: tl.constexpr, eps: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm, the projections to v, k, q, gate and dt, the conv step with its column, SiLU.

    A program has ROWS rows of one of the five matrices.

    Args:
        x, norm: (hidden,).
        value_w, key_w, query_w, gate_w, dt_w: (rows, hidden), the Linear modules' own weights.
        conv_w: (channels, 1, 2); conv_b (channels,); column (channels, 1), updated in place.
        dt_bias: (heads,).
        mixed: (channels,) float32: v, k, q after the conv.
        gate: (hidden,) float32; dt (heads,) float32, after softplus.
    """
    pid = tl.program_id(0)
    KV: tl.constexpr = (key_value + ROWS - 1) // ROWS  # programs of v, and of k
    Q: tl.constexpr = (hidden + ROWS - 1) // ROWS  # of q, and of the gate
    if pid < KV:
        matrix = value_w
    elif pid < 2 * KV:
        matrix = key_w
    elif pid < 2 * KV + Q:
        matrix = query_w
    elif pid < 2 * KV + 2 * Q:
        matrix = gate_w
    else:
        matrix = dt_w
    count = tl.where(pid < 2 * KV, key_value, tl.where(pid < 2 * KV + 2 * Q, hidden, heads))
    gates = tl.where(pid < 2 * KV + 2 * Q, 2 * KV + Q, 2 * KV + 2 * Q)
    queries = tl.where(pid < 2 * KV + Q, 2 * KV, gates)
    first = tl.where(pid < KV, 0, tl.where(pid < 2 * KV, KV, queries))
    rows = (pid - first) * ROWS + tl.arange(0, ROWS)
    real = rows < count
    cols = tl.arange(0, COLS)
    tile = weight_tile(matrix, rows, count, cols, hidden)
    scale = vector(norm, cols, hidden)
    channel = rows + tl.where(pid < KV, 0, tl.where(pid < 2 * KV, key_value, 2 * key_value))
    mixes, steps = real & (pid < 2 * KV + Q), real & (pid >= 2 * KV + 2 * Q)
    before = tl.load(column + channel, mask=mixes, other=0.0).to(tl.float32)
    first_tap = tl.load(conv_w + 2 * channel, mask=mixes, other=0.0).to(tl.float32)
    last_tap = tl.load(conv_w + 2 * channel + 1, mask=mixes, other=0.0).to(tl.float32)
    bias = tl.load(conv_b + channel, mask=mixes, other=0.0).to(tl.float32)
    step_bias = tl.load(dt_bias + rows, mask=steps, other=0.0).to(tl.float32)
    after_previous(PDL)
    u = vector(x, cols, hidden)
    z = product(tile, u * scale) * inverse_rms(u, hidden, eps)
    tl.store(column + channel, z.to(column.dtype.element_ty), mask=mixes)
    tl.store(mixed + channel, silu(first_tap * before + last_tap * z + bias), mask=mixes)
    tl.store(gate + rows, z, mask=real & (pid >= 2 * KV + Q) & (pid < 2 * KV + 2 * Q))
    tl.store(dt + rows, softplus(z + step_bias), mask=steps)


@triton.jit
def ssd_step(
    mixed, dt, a_log, state, y,
    key_value: tl.constexpr, groups: tl.constexpr, head_dim: tl.constexpr,
    DIM: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """S = exp(dt a) S + dt k v^T in place, y = S^T q (ssd.py); a program has COLS columns of S.

    Args:
        mixed, dt: `mixer_in`'s.
        a_log: (heads,).
        state: (heads, key_dim, value_dim) float32.
        y: (heads * head_dim,) float32.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    n, p = tl.arange(0, DIM), part * COLS + tl.arange(0, COLS)
    inside = (n < head_dim)[:, None] & (p < head_dim)[None, :]
    place = state + head * head_dim * head_dim + n[:, None] * head_dim + p[None, :]
    s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    a = -tl.exp(tl.load(a_log + head).to(tl.float32))
    after_previous(PDL)
    step = tl.load(dt + head)
    group = (head // groups) * head_dim
    v = vector(mixed + group, p, head_dim)
    k = vector(mixed + key_value + group, n, head_dim)
    q = vector(mixed + 2 * key_value + head * head_dim, n, head_dim)
    s = tl.exp(step * a) * s + k[:, None] * (step * v)[None, :]
    tl.store(place, s, mask=inside)
    tl.store(y + head * head_dim + p, tl.sum(q[:, None] * s, axis=0), mask=p < head_dim)


@triton.jit
def mixer_out(
    y, gate, g_norm, weight, x,
    heads: tl.constexpr, head_dim: tl.constexpr, eps: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += W (RMSNorm per head of y, times SiLU(gate)).

    Args:
        y, gate: (heads * head_dim,) float32.
        g_norm: (head_dim,), of all heads.
        weight: (hidden, hidden).
        x: (hidden,) float32, in place.
    """
    hidden: tl.constexpr = heads * head_dim
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, d = tl.arange(0, HEADS), tl.arange(0, DIM)
    inside = (h < heads)[:, None] & (d < head_dim)[None, :]
    place = h[:, None] * head_dim + d[None, :]
    tile = tl.load(
        weight + rows.to(tl.int64)[:, None, None] * hidden + place[None, :, :],
        mask=(rows < hidden)[:, None, None] & inside[None, :, :], other=0.0,
        eviction_policy="evict_first",
    )  # fmt: skip
    scale = vector(g_norm, d, head_dim)
    after_previous(PDL)
    u = tl.load(y + place, mask=inside, other=0.0)
    g = tl.load(gate + place, mask=inside, other=0.0)
    u = u * tl.rsqrt(tl.sum(u * u, axis=1) / head_dim + eps)[:, None] * scale[None, :] * silu(g)
    out = tl.sum(tl.sum(tile.to(tl.float32) * u[None, :, :], axis=2), axis=1)
    tl.store(x + rows, vector(x, rows, hidden) + out, mask=rows < hidden)


@triton.jit
def ffn_in(
    x, norm, gate_w, up_w, inner,
    hidden: tl.constexpr, intermediate: tl.constexpr, eps: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner = SiLU(w1 u) * w3 u with u = RMSNorm(x).

    Args:
        x, norm: (hidden,).
        gate_w, up_w: (intermediate, hidden): w1, w3.
        inner: (intermediate,) in the model's dtype.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    gate_tile = weight_tile(gate_w, rows, intermediate, cols, hidden)
    up_tile = weight_tile(up_w, rows, intermediate, cols, hidden)
    scale = vector(norm, cols, hidden)
    after_previous(PDL)
    u = vector(x, cols, hidden)
    inverse = inverse_rms(u, hidden, eps)
    u = u * scale
    out = silu(product(gate_tile, u) * inverse) * (product(up_tile, u) * inverse)
    tl.store(inner + rows, out.to(inner.dtype.element_ty), mask=rows < intermediate)


@triton.jit
def project(
    inner, weight, x,
    width: tl.constexpr, hidden: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += W inner: weight (hidden, width), inner (width,), x (hidden,) float32 in place."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    tile = weight_tile(weight, rows, hidden, cols, width)
    after_previous(PDL)
    out = product(tile, vector(inner, cols, width))
    tl.store(x + rows, vector(x, rows, hidden) + out, mask=rows < hidden)


@triton.jit
def normalize(x, hidden: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):
    """x / |x| in place, for `normalize_encoder_output`; one program."""
    after_previous(PDL)
    cols = tl.arange(0, COLS)
    u = vector(x, cols, hidden)
    tl.store(x + cols, u / tl.sqrt(tl.sum(u * u, axis=0)), mask=cols < hidden)


@triton.jit
def head(
    x, norm, weight, logits, length, vocab,
    hidden: tl.constexpr, eps: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits = W RMSNorm(x), (vocab,) float32; and one more token is read: length += 1."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    tile = weight_tile(weight, rows, vocab, cols, hidden)
    scale = vector(norm, cols, hidden)
    after_previous(PDL)
    u = vector(x, cols, hidden)
    out = product(tile, u * scale) * inverse_rms(u, hidden, eps)
    tl.store(logits + rows, out, mask=rows < vocab)
    if tl.program_id(0) == 0:
        tl.store(length, tl.load(length) + 1)

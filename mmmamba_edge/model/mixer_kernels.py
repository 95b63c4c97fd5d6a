"""Triton kernels of a mixer in training, but for its SSD: conv with SiLU; norm, gate and error.

These are bound by memory, so each reads its inputs once and keeps nothing but its result: a
backward pass computes again what is cheap. Arithmetic and sums are float32. What a weight is given
is summed over a program's tokens there, and over programs by the caller.

Needs triton, and CUDA or Triton's interpreter; nothing imports this module but `training_ops.py`.
"""
# pyright: reportMissingImports=false, reportUnreachable=false
# Triton compiles this text itself: its types are not Python's.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def values(pointer, places, mask):
    """float32, zeros outside."""
    return tl.load(pointer + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def silu_slope(x):
    """The derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def conv_silu(
    z, weight, bias, v, k, q, seq,
    key_value: tl.constexpr, hidden: tl.constexpr, TIME: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """SiLU(first tap times the token before, last tap times the token, bias), split in three.

    Grid: channels / COLS, blocks of TIME tokens, batch. COLS divides key_value and hidden.

    Args:
        z: (batch, seq, channels): v, k, q side by side.
        weight: (channels, 1, 2); bias (channels,).
        v, k: (batch, seq, key_value); q (batch, seq, hidden).
    """
    channels: tl.constexpr = 2 * key_value + hidden
    first_col, row = tl.program_id(0) * COLS, tl.program_id(2).to(tl.int64) * seq
    c = first_col + tl.arange(0, COLS)
    t = tl.program_id(1) * TIME + tl.arange(0, TIME)
    real = (t < seq)[:, None]
    place = (row + t)[:, None] * channels + c[None, :]
    now = values(z, place, real)
    before = values(z, place - channels, real & (t > 0)[:, None])
    first_tap = tl.load(weight + 2 * c).to(tl.float32)[None, :]
    last_tap = tl.load(weight + 2 * c + 1).to(tl.float32)[None, :]
    x = first_tap * before + last_tap * now + tl.load(bias + c).to(tl.float32)[None, :]
    x = x * sigmoid(x)
    if first_col < key_value:
        tl.store(v + (row + t)[:, None] * key_value + c[None, :], x, mask=real)
    elif first_col < 2 * key_value:
        tl.store(k + (row + t)[:, None] * key_value + c[None, :] - key_value, x, mask=real)
    else:
        tl.store(q + (row + t)[:, None] * hidden + c[None, :] - 2 * key_value, x, mask=real)


@triton.jit
def conv_silu_backward(
    z, weight, bias, dv, dk, dq, dz, sums, seq,
    key_value: tl.constexpr, hidden: tl.constexpr, FOR_Z: tl.constexpr,
    TIME: tl.constexpr, TIMES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of `conv_silu`. Grid: channels / COLS, spans of TIME * TIMES tokens, batch.

    Args:
        z, weight, bias: as above; dv, dk, dq: the gradients of its outputs.
        dz: (batch, seq, channels), only written if FOR_Z.
        sums: (batch, spans, 3, channels) float32: each span's part of the gradients of the first
            tap, the last tap and the bias.
    """
    channels: tl.constexpr = 2 * key_value + hidden
    first_col, row = tl.program_id(0) * COLS, tl.program_id(2).to(tl.int64) * seq
    c = first_col + tl.arange(0, COLS)
    if first_col < key_value:
        gradient, width, shift = dv, key_value, 0
    elif first_col < 2 * key_value:
        gradient, width, shift = dk, key_value, key_value
    else:
        gradient, width, shift = dq, hidden, 2 * key_value
    first_tap = tl.load(weight + 2 * c).to(tl.float32)[None, :]
    last_tap = tl.load(weight + 2 * c + 1).to(tl.float32)[None, :]
    b = tl.load(bias + c).to(tl.float32)[None, :]
    of_first = tl.zeros((TIME, COLS), tl.float32)
    of_last = tl.zeros((TIME, COLS), tl.float32)
    of_bias = tl.zeros((TIME, COLS), tl.float32)
    for i in range(TIMES):
        t = (tl.program_id(1) * TIMES + i) * TIME + tl.arange(0, TIME)
        real = (t < seq)[:, None]
        place = (row + t)[:, None] * channels + c[None, :]
        given = (row + t)[:, None] * width + c[None, :] - shift
        now = values(z, place, real)
        before = values(z, place - channels, real & (t > 0)[:, None])
        g = values(gradient, given, real)
        g *= silu_slope(first_tap * before + last_tap * now + b)
        of_first += g * before
        of_last += g * now
        of_bias += g
        if FOR_Z:  # a token speaks now, and once more to the next
            follows = (t + 1 < seq)[:, None]
            after = values(z, place + channels, follows)
            later = values(gradient, given + width, follows)
            later *= silu_slope(first_tap * now + last_tap * after + b)
            tl.store(dz + place, last_tap * g + first_tap * later, mask=real)
    spans = tl.num_programs(1)
    out = sums + (tl.program_id(2) * spans + tl.program_id(1)) * 3 * channels + c
    tl.store(out, tl.sum(of_first, 0))
    tl.store(out + channels, tl.sum(of_last, 0))
    tl.store(out + 2 * channels, tl.sum(of_bias, 0))


@triton.jit
def gated_norm(
    y, gate, weight, target, out, error, power,
    heads: tl.constexpr, head_dim: tl.constexpr, eps: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, ERROR: tl.constexpr,
):  # fmt: skip
    """RMSNorm per head of y, times SiLU(gate); a program has one token.

    Args:
        y, gate: (tokens, heads * head_dim).
        weight: (head_dim,), of all heads.
        out: like y, not with ERROR.
        target, error, power: with ERROR, in place of `out`: (tokens, heads * head_dim), and each
            token's mean square of result minus target, and of the target, (tokens,) float32.
    """
    width: tl.constexpr = heads * head_dim
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, DIM)
    inside = (h < heads)[:, None] & (d < head_dim)[None, :]
    place = token * width + h[:, None] * head_dim + d[None, :]
    u = values(y, place, inside)
    g = values(gate, place, inside)
    scale = values(weight, d, d < head_dim)
    u *= tl.rsqrt(tl.sum(u * u, 1) / head_dim + eps)[:, None] * scale[None, :]
    u *= g * sigmoid(g)
    if ERROR:
        want = values(target, place, inside)
        tl.store(error + token, tl.sum(tl.sum((u - want) * (u - want), 1), 0) / width)
        tl.store(power + token, tl.sum(tl.sum(want * want, 1), 0) / width)
    else:
        tl.store(out + place, u, mask=inside)


@triton.jit
def gated_norm_backward(
    y, gate, weight, target, gradient, dy, dgate, sums, tokens,
    heads: tl.constexpr, head_dim: tl.constexpr, eps: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, ERROR: tl.constexpr,
):  # fmt: skip
    """Gradients of `gated_norm`; a program has TOKENS tokens.

    Args:
        y, gate, weight, target: as above.
        gradient: of `out`, (tokens, heads * head_dim); with ERROR of `error`, (tokens,).
        dy, dgate: (tokens, heads * head_dim).
        sums: (programs, head_dim) float32: each program's part of the weight's gradient.
    """
    width: tl.constexpr = heads * head_dim
    h, d = tl.arange(0, HEADS), tl.arange(0, DIM)
    head = (h < heads)[:, None] & (d < head_dim)[None, :]
    scale = values(weight, d, d < head_dim)[None, :]
    of_weight = tl.zeros((HEADS, DIM), tl.float32)
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        inside = head & (token < tokens)
        place = token * width + h[:, None] * head_dim + d[None, :]
        u = values(y, place, inside)
        g = values(gate, place, inside)
        inverse = tl.rsqrt(tl.sum(u * u, 1) / head_dim + eps)[:, None]
        u *= inverse
        s = sigmoid(g)
        opened = g * s
        if ERROR:
            # A program's last tokens may not exist: the mask is a scalar's.
            of_error = tl.load(gradient + token, mask=token < tokens, other=0.0).to(tl.float32)
            o = (u * scale * opened - values(target, place, inside)) * (2.0 * of_error / width)
        else:
            o = values(gradient, place, inside)
        tl.store(dgate + place, o * u * scale * s * (1.0 + g * (1.0 - s)), mask=inside)
        o *= opened
        of_weight += o * u
        o *= scale
        o = inverse * (o - u * (tl.sum(o * u, 1) / head_dim)[:, None])
        tl.store(dy + place, o, mask=inside)
    total = tl.sum(of_weight, 0)
    tl.store(sums + tl.program_id(0) * head_dim + d, total, mask=d < head_dim)

"""Triton kernels of an attention layer's decoding step at batch 1, in `decode_kernels.py`'s manner.

`attention_in` (RMSNorm, wqkv, RoPE, the cache's new row), `attend` over shares of the context,
`combine` of the shares; the output projection is `decode_kernels.project`. How much of the cache
is filled is read on the device, so one recorded graph serves a growing context.
"""
# pyright: reportMissingImports=false, reportUnreachable=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from mmmamba_edge.model.decode_kernels import (
    after_previous,
    inverse_rms,
    product,
    vector,
    weight_tile,
)


@triton.jit(do_not_specialize=["capacity"])
def attention_in(
    x, norm, wqkv, rope, length, q, key, value, capacity,
    hidden: tl.constexpr, groups: tl.constexpr, head_dim: tl.constexpr, eps: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm, queries, keys and values, RoPE, and the new row of the cache.

    A program has ROWS rows of a head's first half and the rows that RoPE pairs them with.

    Args:
        x, norm: (hidden,).
        wqkv: (kv_heads * (groups + 2) * head_dim, hidden), packed per kv head (spec 2.3).
        rope: (2, head_dim / 2) float32: cosines, sines.
        length: (1,) int64: the row of the cache to write.
        q: (heads * head_dim,) in the model's dtype.
        key, value: (kv_heads, capacity, head_dim).
    """
    half: tl.constexpr = head_dim // 2
    PARTS: tl.constexpr = (half + ROWS - 1) // ROWS
    packed, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    kv_head, kind = packed // (groups + 2), packed % (groups + 2)
    i = part * ROWS + tl.arange(0, ROWS)
    real = i < half
    rows, cols = packed * head_dim + i, tl.arange(0, COLS)
    end = packed * head_dim + half
    low_tile = weight_tile(wqkv, rows, end, cols, hidden)
    high_tile = weight_tile(wqkv, rows + half, end + half, cols, hidden)
    scale = vector(norm, cols, hidden)
    after_previous(PDL)
    u = vector(x, cols, hidden)
    inverse = inverse_rms(u, hidden, eps)
    u = u * scale
    low, high = product(low_tile, u) * inverse, product(high_tile, u) * inverse
    turns = kind <= groups  # queries and keys, not values
    cos = tl.where(turns, vector(rope, i, half), 1.0)
    sin = tl.where(turns, vector(rope + half, i, half), 0.0)
    first, second = low * cos - high * sin, high * cos + low * sin
    row = (kv_head.to(tl.int64) * capacity + tl.load(length)) * head_dim
    dtype = q.dtype.element_ty
    if kind < groups:
        place = q + (kv_head * groups + kind) * head_dim
    elif kind == groups:
        place = key + row
    else:
        place = value + row
    tl.store(place + i, first.to(dtype), mask=real)
    tl.store(place + half + i, second.to(dtype), mask=real)


@triton.jit(do_not_specialize=["capacity"])
def attend(
    q, key, value, length, shares, tops, totals, capacity,
    groups: tl.constexpr, head_dim: tl.constexpr, scale: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one kv head's queries over one share of the context.

    Args:
        q: (heads * head_dim,).
        key, value: (kv_heads, capacity, head_dim), length + 1 rows filled.
        shares: (heads, splits, head_dim) float32, not yet divided by the totals.
        tops, totals: (heads, splits) float32: the largest score (base 2) and the sum below it.
        scale: of the scores, log2(e) included.
    """
    kv_head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    after_previous(PDL)
    filled = (tl.load(length) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(filled, splits), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, filled)
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    heads, inside = kv_head * groups + g, (g < groups)[:, None] & (d < head_dim)[None, :]
    queries = tl.load(q + heads[:, None] * head_dim + d[None, :], mask=inside, other=0.0)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, DIM], tl.float32)
    start = kv_head.to(tl.int64) * capacity * head_dim
    for at in range(begin, end, BLOCK):
        t = at + tl.arange(0, BLOCK)
        real = t < end
        place = start + t[:, None] * head_dim + d[None, :]
        there = real[:, None] & (d < head_dim)[None, :]
        k = tl.load(key + place, mask=there, other=0.0)  # (BLOCK, DIM)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(real[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - new)
        weight = tl.exp2(scores - new[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        v = tl.load(value + place, mask=there, other=0.0)
        out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new
    slot = heads * splits + split
    tl.store(shares + slot[:, None] * head_dim + d[None, :], out, mask=inside)
    tl.store(tops + slot, top, mask=g < groups)
    tl.store(totals + slot, total, mask=g < groups)


@triton.jit
def combine(
    shares, tops, totals, y, layer_length,
    splits: tl.constexpr, head_dim: tl.constexpr,
    SPLITS: tl.constexpr, DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head's shares into y (heads * head_dim,) float32; the layer has read one token more.

    Args:
        shares, tops, totals: `attend`'s.
        layer_length: (1,) int64.
    """
    after_previous(PDL)
    head = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    top = tl.load(tops + head * splits + s, mask=s < splits, other=float("-inf"))
    fade = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(vector(totals + head * splits, s, splits) * fade, axis=0)
    inside = (s < splits)[:, None] & (d < head_dim)[None, :]
    place = shares + (head * splits + s)[:, None] * head_dim + d[None, :]
    out = tl.sum(tl.load(place, mask=inside, other=0.0) * fade[:, None], axis=0) / total
    tl.store(y + head * head_dim + d, out, mask=d < head_dim)
    if head == 0:
        tl.store(layer_length, tl.load(layer_length) + 1)

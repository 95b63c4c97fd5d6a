"""Triton kernels of the SSD in training: `ssd.chunked` from a zero state, forward and backward.

With L the logarithm of the decay since a chunk began, H the state before a chunk, and W[l, s] =
exp(L_l - L_s) for s <= l in the same chunk, else 0:

    y_l = sum_s W[l, s] dt_s (q_l k_s) v_s + exp(L_l) H^T q_l                     `look_back`
    added = sum_s exp(L_end - L_s) dt_s k_s v_s^T                                 `chunk_states`
    H of the next chunk = exp(L_end) H + added                                    `carry`

and backward, with G the gradient of the state after a chunk:

    added = sum_l exp(L_l) q_l dy_l^T                                             `chunk_states`
    G of the chunk before = exp(L_end) G + added                                  `carry`
    dq_l = sum_s W[l, s] dt_s (dy_l v_s) k_s + exp(L_l) H dy_l                    `look_back`
    dv_s = dt_s (sum_l W[l, s] (k_s q_l) dy_l + exp(L_end - L_s) G^T k_s)         `look_ahead`
    dk_s = dt_s (sum_l W[l, s] (v_s dy_l) q_l + exp(L_end - L_s) G v_s)           `look_ahead`

dt and the decays need no products of their own: all that has dt_s sums to k_s dk_s (of one head),
all that has exp(-L_s) to the same, all that has exp(L_l) to q_l dq_l, and all that has exp(L_end)
to G times the state after the chunk. In L's gradient k_s dk_s is taken from q_s dq_s, and a token's
influence on itself must cancel: both are sums over the very same rounded W[l, s] dt_s (dy_l v_s).

A tile of scores never leaves the chip. Products take and give the inputs' dtype with float32 sums;
states pass through memory in the inputs' dtype. Rows are (batch, seq, heads, dim); dt and L are
(batch, heads, chunks * CHUNK) float32, dt 0 past `seq`.

Needs triton, and CUDA or Triton's interpreter; nothing imports this module but `training_ops.py`.
"""
# pyright: reportMissingImports=false, reportUnreachable=false
# Triton compiles this text itself: its types are not Python's.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def product(a, b):
    """a b in float32; float32 factors are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rows(pointer, batch, t, seq, head, heads: tl.constexpr, DIM: tl.constexpr):
    """(BLOCK, DIM) of (batch, seq, heads, DIM), zeros past the end."""
    place = ((batch.to(tl.int64) * seq + t) * heads + head)[:, None] * DIM
    return tl.load(pointer + place + tl.arange(0, DIM)[None, :], mask=(t < seq)[:, None], other=0.0)


@triton.jit
def store_rows(pointer, x, batch, t, seq, head, heads: tl.constexpr, DIM: tl.constexpr):
    """The inverse of `rows`."""
    place = ((batch.to(tl.int64) * seq + t) * heads + head)[:, None] * DIM
    x = x.to(pointer.dtype.element_ty)
    tl.store(pointer + place + tl.arange(0, DIM)[None, :], x, mask=(t < seq)[:, None])


@triton.jit
def state_of(pointer, chunk, head, heads: tl.constexpr, DIM: tl.constexpr):
    """(DIM, DIM) of (batch * chunks, heads, DIM, DIM)."""
    n, p = tl.arange(0, DIM), tl.arange(0, DIM)
    start = pointer + (chunk.to(tl.int64) * heads + head) * DIM * DIM
    return tl.load(start + n[:, None] * DIM + p[None, :])


@triton.jit
def fading(late, late_decay, early, early_decay):
    """exp of the difference of decays where `late` is not before `early`, else 0."""
    # Masked before exp: what lies in the future is positive and may overflow.
    return tl.exp(tl.where(late >= early, late_decay - early_decay, float("-inf")))


@triton.jit
def chunk_states(
    x, w, dt, decay, out, seq, chunks,
    heads: tl.constexpr, share: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """sum_t x_t w_t^T over a chunk, faded. Grid: batch * chunks, heads, DIM / COLS.

    Args:
        x, w: k and v; with BACK q and dy. `share` heads have the same.
        dt, decay: (batch, heads, chunks * CHUNK).
        out: (batch * chunks, heads, DIM, DIM).
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    batch, n = chunk // chunks, tl.arange(0, DIM)
    p = tl.program_id(2) * COLS + tl.arange(0, COLS)
    start = (chunk % chunks) * CHUNK
    steps = (batch * heads + head) * chunks * CHUNK
    end = tl.load(decay + steps + start + CHUNK - 1)
    total = tl.zeros((DIM, COLS), tl.float32)
    for i in range(CHUNK // BLOCK):
        t = start + i * BLOCK + tl.arange(0, BLOCK)
        faded = tl.load(decay + steps + t)
        scale = tl.exp(faded) if BACK else tl.exp(end - faded) * tl.load(dt + steps + t)
        left = rows(x, batch, t, seq, head // share, heads // share, DIM)
        place = ((batch.to(tl.int64) * seq + t) * (heads // share) + head // share) * DIM
        right = tl.load(w + place[:, None] + p[None, :], mask=(t < seq)[:, None], other=0.0)
        right = (right * scale[:, None]).to(left.dtype)
        total += product(tl.trans(left), right)
    place = (chunk.to(tl.int64) * heads + head) * DIM * DIM
    total = total.to(out.dtype.element_ty)
    tl.store(out + place + n[:, None] * DIM + p[None, :], total)


@triton.jit
def place_of(row, step, cols, chunks, heads: tl.constexpr, SIZE: tl.constexpr, BACK: tl.constexpr):
    """Where (batch, chunks, heads, SIZE) has a head's `step`-th chunk, from the end with BACK."""
    chunk = chunks - 1 - step if BACK else step
    return ((row // heads * chunks + chunk).to(tl.int64) * heads + row % heads) * SIZE + cols


@triton.jit
def fade_of(row, step, decay, chunks, CHUNK: tl.constexpr, BACK: tl.constexpr):
    """exp(L_end) of `place_of`'s chunk."""
    chunk = chunks - 1 - step if BACK else step
    place = (row * chunks + chunk + 1) * CHUNK - 1
    return tl.exp(tl.load(decay + place, mask=step < chunks, other=0.0))


@triton.jit
def advance(s, added, other, fade, states, alike, place, row, step, chunks, BACK: tl.constexpr):
    """One step of `carry`: s is written at `place`; returns the next s."""
    real = step < chunks
    tl.store(states + place, s.to(states.dtype.element_ty), mask=real)
    if BACK:
        out = (row * chunks + chunks - 1 - step) * tl.num_programs(1) + tl.program_id(1)
        tl.store(alike + out, fade * tl.sum(s * other, 0), mask=real)
    return fade * s + added


@triton.jit
def carry(
    states, decay, others, alike, chunks,
    heads: tl.constexpr, SIZE: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """In place: what each chunk adds becomes the state before it; with BACK, the gradient after it.

    Grid: batch * heads, SIZE / COLS.

    Args:
        states: (batch, chunks, heads, SIZE).
        decay: (batch, heads, chunks * CHUNK).
        others: with BACK, the states before each chunk.
        alike: (batch, heads, chunks, programs) float32: with BACK, each program's part of state
            times gradient times the chunk's decay.
    """
    row, cols = tl.program_id(0), tl.program_id(1) * COLS + tl.arange(0, COLS)
    s = tl.zeros((COLS,), tl.float32)
    for i in range(0, chunks, 4):
        # Four chunks are asked for at once, ahead of what is written: one at a time, the loop would
        # wait for memory.
        p0 = place_of(row, i, cols, chunks, heads, SIZE, BACK)
        p1 = place_of(row, i + 1, cols, chunks, heads, SIZE, BACK)
        p2 = place_of(row, i + 2, cols, chunks, heads, SIZE, BACK)
        p3 = place_of(row, i + 3, cols, chunks, heads, SIZE, BACK)
        a0 = tl.load(states + p0).to(tl.float32)
        a1 = tl.load(states + p1, mask=i + 1 < chunks, other=0.0).to(tl.float32)
        a2 = tl.load(states + p2, mask=i + 2 < chunks, other=0.0).to(tl.float32)
        a3 = tl.load(states + p3, mask=i + 3 < chunks, other=0.0).to(tl.float32)
        f0 = fade_of(row, i, decay, chunks, CHUNK, BACK)
        f1 = fade_of(row, i + 1, decay, chunks, CHUNK, BACK)
        f2 = fade_of(row, i + 2, decay, chunks, CHUNK, BACK)
        f3 = fade_of(row, i + 3, decay, chunks, CHUNK, BACK)
        o0, o1, o2, o3 = s, s, s, s
        if BACK:
            o0 = tl.load(others + p0).to(tl.float32)
            o1 = tl.load(others + p1, mask=i + 1 < chunks, other=0.0).to(tl.float32)
            o2 = tl.load(others + p2, mask=i + 2 < chunks, other=0.0).to(tl.float32)
            o3 = tl.load(others + p3, mask=i + 3 < chunks, other=0.0).to(tl.float32)
        s = advance(s, a0, o0, f0, states, alike, p0, row, i, chunks, BACK)
        s = advance(s, a1, o1, f1, states, alike, p1, row, i + 1, chunks, BACK)
        s = advance(s, a2, o2, f2, states, alike, p2, row, i + 2, chunks, BACK)
        s = advance(s, a3, o3, f3, states, alike, p3, row, i + 3, chunks, BACK)


@triton.jit
def look_back(
    a, b, c, dt, decay, states, out, own, sums, seq, chunks,
    heads: tl.constexpr, share: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """sum_s W[l, s] dt_s (a_l b_s) c_s + exp(L_l) H a_l for BLOCK positions l: y, or dq.

    Grid: batch * chunks * CHUNK / BLOCK, heads; `share` of them have one b and c.

    Args:
        a, b, c, out: q, k, v and y; with GRADIENT dy, v, k and dq.
        states: (batch * chunks, heads, DIM, DIM), before each chunk: H, transposed for y.
        own, sums: with GRADIENT, q, and q_l dq_l (batch, heads, chunks * CHUNK) float32.
    """
    blocks: tl.constexpr = CHUNK // BLOCK
    block, head = tl.program_id(0) % blocks, tl.program_id(1)
    chunk = tl.program_id(0) // blocks
    batch, start = chunk // chunks, (chunk % chunks) * CHUNK
    steps = (batch * heads + head) * chunks * CHUNK
    t = start + block * BLOCK + tl.arange(0, BLOCK)
    t_decay = tl.load(decay + steps + t)
    a_t = rows(a, batch, t, seq, head, heads, DIM)
    state = state_of(states, chunk, head, heads, DIM)
    if GRADIENT:
        state = tl.trans(state)
    total = product(a_t, state) * tl.exp(t_decay)[:, None]
    for i in range(block + 1):
        s = start + i * BLOCK + tl.arange(0, BLOCK)
        fade = fading(t[:, None], t_decay[:, None], s[None, :], tl.load(decay + steps + s)[None, :])
        b_s = rows(b, batch, s, seq, head // share, heads // share, DIM)
        c_s = rows(c, batch, s, seq, head // share, heads // share, DIM)
        scores = product(a_t, tl.trans(b_s)) * (fade * tl.load(dt + steps + s)[None, :])
        total += product(scores.to(c_s.dtype), c_s)
    store_rows(out, total, batch, t, seq, head, heads, DIM)
    if GRADIENT:
        mine = rows(own, batch, t, seq, head, heads, DIM).to(tl.float32)
        tl.store(sums + steps + t, tl.sum(mine * total, 1))


@triton.jit
def look_ahead(
    a, b, c, dt, decay, after, out, own, sums, ends, seq, chunks,
    heads: tl.constexpr, share: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dt_s (sum_l W[l, s] (a_s b_l) c_l + exp(L_end - L_s) G a_s) for BLOCK positions s: dv, or dk.

    Summed over the `share` heads that have one a. Grid: batch * chunks * CHUNK / BLOCK,
    heads / share.

    Args:
        a, b, c, out: k, q, dy and dv; with KEYS v, dy, q and dk.
        after: (batch * chunks, heads, DIM, DIM), the gradient after each chunk: G, transposed for
            dv.
        own, sums, ends: with KEYS, k, and (batch, heads, chunks * CHUNK) float32: k_s dk_s of each
            head, and the part of it that comes from G.
    """
    blocks: tl.constexpr = CHUNK // BLOCK
    block, group = tl.program_id(0) % blocks, tl.program_id(1)
    chunk = tl.program_id(0) // blocks
    batch, start = chunk // chunks, (chunk % chunks) * CHUNK
    s = start + block * BLOCK + tl.arange(0, BLOCK)
    a_s = rows(a, batch, s, seq, group, heads // share, DIM)
    total = tl.zeros((BLOCK, DIM), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for i in range(share):
        head = group * share + i
        steps = (batch * heads + head) * chunks * CHUNK
        s_decay, s_dt = tl.load(decay + steps + s), tl.load(dt + steps + s)
        to_end = tl.exp(tl.load(decay + steps + start + CHUNK - 1) - s_decay)
        state = state_of(after, chunk, head, heads, DIM)
        if KEYS:
            state = tl.trans(state)
        total += product(a_s, state) * (to_end * s_dt)[:, None]
        if KEYS:
            mine = rows(own, batch, s, seq, group, heads // share, DIM).to(tl.float32)
            tl.store(ends + steps + s, tl.sum(mine * total, 1) - summed)
        for j in range(block, blocks):
            t = start + j * BLOCK + tl.arange(0, BLOCK)
            t_decay = tl.load(decay + steps + t)
            fade = fading(t[None, :], t_decay[None, :], s[:, None], s_decay[:, None])
            b_t = rows(b, batch, t, seq, head, heads, DIM)
            c_t = rows(c, batch, t, seq, head, heads, DIM)
            scores = product(a_s, tl.trans(b_t)) * (fade * s_dt[:, None])
            total += product(scores.to(c_t.dtype), c_t)
        if KEYS:  # of this head alone
            mine = rows(own, batch, s, seq, group, heads // share, DIM).to(tl.float32)
            so_far = tl.sum(mine * total, 1)
            tl.store(sums + steps + s, so_far - summed)
            summed = so_far
    store_rows(out, total, batch, s, seq, group, heads // share, DIM)

"""State-space duality (SSD): one recurrence in three forms, as pure functions.

    S_t = exp(dt_t a) S_{t-1} + dt_t k_t v_t^T        y_t = S_t^T q_t        (per head)

This is Mamba-2 (arXiv 2405.21060) in the words of attention, as mmMamba seeds it from a teacher
(arXiv 2502.13145 eq. 2; its text leaves out the dt on the input, its code has it):

    here        paper   shape                                 meaning
    query q     C       (batch, seq, heads, key_dim)          reads the state
    key k       B       (batch, seq, kv_heads, key_dim)       where the state is written
    value v     x       (batch, seq, kv_heads, value_dim)     what is written
    dt          Delta   (batch, seq, heads)                   step size after softplus; 0 at padding
    a           A       (heads,)                              negative; exp(dt a) is the decay
    state S     h       (batch, heads, key_dim, value_dim)    all that is remembered

`scan` is the oracle, `chunked` serves training and prefill, `step` serves decoding. Each takes a
state (None: zeros) and returns the new one. As in grouped-query attention each key and value head
serves heads / kv_heads query heads, in order. A position with dt = 0 neither decays the state nor
writes to it: that is how padding stays out.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # positions


def scan(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after the other, in the dtype it is given (float64: the oracle).

    Returns:
        y (batch, seq, heads, value_dim) and the state after the last position.
    """
    s = _zeros(q, v, q.dtype) if state is None else state
    outputs = []
    for t in range(q.shape[1]):
        y, s = step(q[:, t], k[:, t], v[:, t], dt[:, t], a, s)
        outputs.append(y)
    return torch.stack(outputs, dim=1), s


def step(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position: the arguments of `scan` without their seq axis.

    Returns:
        y (batch, heads, value_dim) and the new state, in the state's dtype.
    """
    k, v = _per_head(k, q), _per_head(v, q)
    dt = dt.to(state.dtype)
    decay = torch.exp(dt * a.to(state.dtype))  # (batch, heads)
    write = k.to(state.dtype)[..., :, None] * (dt[..., None] * v)[..., None, :]
    new = decay[..., None, None] * state + write  # (batch, heads, key_dim, value_dim)
    y = torch.einsum("bhn,bhnp->bhp", q.to(state.dtype), new)
    return y.to(q.dtype), new


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same map as matrix products (spec 3.3): attention inside chunks, a state between.

    Decays and the carried state are at least float32. On CUDA in half precision (or autocast to it)
    mamba-ssm's kernel takes over where it is installed; its float32 is tf32, so float32 stays here.

    Args:
        q, k, v, dt, a, state: as above.
        chunk: positions a chunk; None: what suits the way this is run.

    Returns:
        y (batch, seq, heads, value_dim) in q's dtype and the float32 (or float64) state.
    """
    if (half := _half_precision(q)) and (kernel := mamba_kernel()):
        return _chunked_by(kernel, q.to(half), k.to(half), v.to(half), dt, a, state, chunk or CHUNK)
    return chunked_products(q, k, v, dt, a, state, chunk=chunk)


def chunked_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`chunked` in PyTorch's own operations, wherever it runs."""
    if chunk is None:
        # Compiled, a chunk's scores cost little, and states pass through memory several times.
        chunk = 2 * CHUNK if q.is_cuda and torch.compiler.is_dynamo_compiling() else CHUNK
    batch, seq, heads, _ = q.shape
    pad = -seq % chunk
    groups = (k.shape[2], heads // k.shape[2])  # kv heads, and the query heads that each serves
    # Padding dt with 0 after softplus leaves the final state alone.
    # Axes: batch, chunk c, position l or s, kv head g, query head r of g, key_dim n, value_dim p.
    q_, k_, v_ = (_split(x, pad, chunk) for x in (q, k, v))
    q_ = q_.unflatten(3, groups)
    wide = torch.promote_types(dt.dtype, torch.float32)
    dt_ = _split(dt.to(wide), pad, chunk).unflatten(3, groups)  # bcsgr
    log_decay = torch.cumsum(dt_ * a.to(wide).unflatten(0, groups), dim=2)

    # 1. Within a chunk: attention whose scores fade with distance, and step with dt.
    fade = log_decay.permute(0, 1, 3, 4, 2)  # bcgrl
    distance = fade[..., :, None] - fade[..., None, :]  # bcgrls
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: distances above the diagonal are positive and may overflow.
    weight = torch.exp(distance.masked_fill(~causal, float("-inf")))
    weight = weight * dt_.permute(0, 1, 3, 4, 2)[..., None, :]
    scores = torch.einsum("bclgrn,bcsgn->bcgrls", q_, k_) * weight.to(q.dtype)
    y = torch.einsum("bcgrls,bcsgp->bclgrp", scores, v_)

    # 2. What each chunk adds to the state by its end.
    to_end = torch.exp(log_decay[:, :, -1:] - log_decay) * dt_  # bcsgr
    faded = v_[..., None, :] * to_end[..., None].to(v.dtype)  # bcsgrp
    added = torch.einsum("bcsgn,bcsgrp->bcgrnp", k_, faded)
    added = added.flatten(2, 3).to(wide)

    # 3. Carry the state from chunk to chunk.
    whole = log_decay[:, :, -1].flatten(2)  # (batch, chunks, heads)
    if state is None and torch.compiler.is_dynamo_compiling():
        carried, s = _carried_at_once(whole, added)
    else:
        start = _zeros(q, v, wide) if state is None else state.to(wide)
        carried, s = _carried(whole, added, start)

    # 4. What the carried state contributes.
    carried = carried.to(q.dtype).unflatten(2, groups)  # bcgrnp
    y = y + torch.einsum("bclgrn,bcgrnp->bclgrp", q_, carried) * torch.exp(log_decay)[..., None]
    return y.reshape(batch, seq + pad, heads, -1)[:, :seq].to(q.dtype), s


def _carried(whole: Tensor, added: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk, and after the last.

    Args:
        whole: (batch, chunks, heads), the logarithm of each chunk's decay.
        added: (batch, chunks, heads, key_dim, value_dim), what each adds.
        s: (batch, heads, key_dim, value_dim), the state before the first.
    """
    decay = torch.exp(whole)[..., None, None]
    before = []
    for c in range(added.shape[1]):
        before.append(s)
        s = decay[:, c] * s + added[:, c]
    return torch.stack(before, dim=1), s


def _carried_at_once(whole: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """`_carried` from zeros as one product: torch.compile would unroll the loop."""
    total = whole.cumsum(1).transpose(1, 2)  # (batch, heads, chunks)
    # before_c = sum over j < c of exp(total_{c-1} - total_j) added_j, and after the last likewise.
    distance = total[..., :, None] - total[..., None, :]  # (batch, heads, end, chunk)
    chunks = total.shape[-1]
    causal = torch.ones(chunks, chunks, dtype=torch.bool, device=total.device).tril()
    weight = torch.exp(distance.masked_fill(~causal, float("-inf")))
    with torch.autocast(added.device.type, enabled=False):  # the state is never rounded to half
        after = torch.einsum("bhcj,bjhnp->bchnp", weight, added)
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)
    return before, after[:, -1]


def _half_precision(q: Tensor) -> torch.dtype | None:
    """The half-precision dtype that `q` is to be worked on in, on CUDA; None elsewhere."""
    if not q.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


_FOUND: dict[str, Any] = {}


def mamba_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """mamba-ssm's chunked scan, or None where it is not installed or does not load."""
    # In a table of its own, not behind functools.cache, which torch.compile does not see.
    if "mamba_kernel" not in _FOUND:
        _FOUND["mamba_kernel"] = _load_mamba_kernel()
    return _FOUND["mamba_kernel"]


def _load_mamba_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:  # a wheel of another torch or CUDA fails in many ways
        logging.getLogger(__name__).warning("mamba-ssm does not load (%s): using PyTorch", error)
        return None
    return module.mamba_chunk_scan_combined


@torch.compiler.disable()  # its kernels' tuning hooks are more than torch.compile takes in
def _chunked_by(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, state: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, v = _per_head(k, q), _per_head(v, q)
    # The kernel keeps its state as (batch, heads, value_dim, key_dim).
    initial = None if state is None else state.transpose(2, 3).contiguous()
    y, final = kernel(
        v, dt, a, k, q, chunk_size=chunk, initial_states=initial, return_final_states=True
    )
    return y, final.transpose(2, 3).float().contiguous()


def _zeros(q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (..., kv_heads, dim), each repeated for the query heads that it serves."""
    return x.repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2)


def _split(x: Tensor, pad: int, chunk: int) -> Tensor:
    """(batch, seq, ...) -> (batch, chunks, chunk, ...), zero-padded at the end."""
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, chunk))

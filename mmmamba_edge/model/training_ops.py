"""What a mixer does between its projections, for training on CUDA: torch operators over Triton.

`mixer.py` and `ssd.py` have the same maps in plain PyTorch, which serve everywhere else. Operators
of their own pass through torch.compile whole; small sums that follow them are left to it. Gradients
are once differentiable.
"""

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_edge.config import CONV_KERNEL

CHUNK = 128  # positions; half as many would pass twice as many states through memory
# By kernel: warps of a program, stages of its loop, and rows or columns of its tile.
LAUNCH = {
    "conv_silu": (4, 1, 32), "conv_silu_backward": (4, 1, 16),
    "gated_norm": (4, 1, 1), "gated_norm_backward": (8, 1, 8),
    "chunk_states": (4, 1, 128), "carry": (1, 1, 256), "carry_back": (4, 1, 1024),
    "look_back": (4, 1, 64), "look_ahead": (4, 1, 64),
}  # fmt: skip
CONV_TIMES = 16  # tiles of `conv_silu_backward` that are summed before memory sees them
HEAD_DIMS = (16, 32, 64, 128)  # of the SSD's kernels

_FOUND: dict[str, bool] = {}


def has_triton() -> bool:
    """Whether Triton is installed, and the card new enough for its kernels."""
    # In a table of its own, not behind functools.cache, which torch.compile does not see.
    if "triton" not in _FOUND:
        _FOUND["triton"] = (
            importlib.util.find_spec("triton") is not None
            and torch.cuda.is_available()
            and not torch.version.hip
            and torch.cuda.get_device_capability() >= (8, 0)
        )
    return _FOUND["triton"]


def part_compile_caches() -> None:
    """Compiled graphs that are kept on disk serve only the text of this file they were made with.

    torch.compile's key has an operator's name, not its gradient's formula or shapes.
    """
    config = torch.compiler.config
    text = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    if text not in config.cache_key_tag:
        config.cache_key_tag += text


def serves(x: Tensor) -> bool:
    """Whether these operators take `x`: half precision on CUDA, with gradients asked for."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and torch.is_grad_enabled() and has_triton()


def _kernel(module: str, name: str) -> Any:
    # Imported here: triton is optional, and the module compiles on import.
    return getattr(importlib.import_module(f"mmmamba_edge.model.{module}"), name)


# --- conv and SiLU ------------------------------------------------------------------------------


@torch.library.custom_op("mmmamba_edge::conv_silu", mutates_args=())
def conv_silu(
    z: Tensor, weight: Tensor, bias: Tensor, key_value: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixer.causal_conv` from zeros, split.

    Args:
        z: (batch, seq, channels): v, k, q side by side.
        weight: (channels, 1, 2).
        bias: (channels,).
        key_value: width of v, and of k.

    Returns:
        v, k (batch, seq, key_value) and q (batch, seq, channels - 2 key_value), in z's dtype.
    """
    z = z.contiguous()
    batch, seq, channels = z.shape
    assert weight.shape == (channels, 1, CONV_KERNEL)
    hidden = channels - 2 * key_value
    v, k, q = (z.new_empty(batch, seq, width) for width in (key_value, key_value, hidden))
    warps, _, time = LAUNCH["conv_silu"]
    cols = _columns(key_value, hidden)
    grid = (channels // cols, -(-seq // time), batch)
    _kernel("mixer_kernels", "conv_silu")[grid](
        z, weight.contiguous(), bias, v, k, q, seq, key_value, hidden, time, cols, num_warps=warps
    )
    return v, k, q


@conv_silu.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor, key_value: int) -> tuple[Tensor, Tensor, Tensor]:
    widths = (key_value, key_value, z.shape[2] - 2 * key_value)
    v, k, q = (z.new_empty(z.shape[0], z.shape[1], width) for width in widths)
    return v, k, q


@torch.library.custom_op("mmmamba_edge::conv_silu_backward", mutates_args=())
def conv_silu_backward(
    z: Tensor, weight: Tensor, bias: Tensor, dv: Tensor, dk: Tensor, dq: Tensor, for_z: bool
) -> tuple[Tensor, Tensor]:
    """Gradients: of z (empty unless `for_z`); of both taps and the bias in parts.

    The parts are (batch, spans, 3, channels) float32.
    """
    z, dv, dk, dq = (x.contiguous() for x in (z, dv, dk, dq))
    batch, seq, channels = z.shape
    key_value, hidden = dv.shape[2], dq.shape[2]
    warps, _, time = LAUNCH["conv_silu_backward"]
    cols, spans = _columns(key_value, hidden), _spans(seq)
    dz = torch.empty_like(z) if for_z else z.new_empty(0)
    sums = z.new_empty(batch, spans, 3, channels, dtype=torch.float32)
    _kernel("mixer_kernels", "conv_silu_backward")[(channels // cols, spans, batch)](
        z, weight.contiguous(), bias, dv, dk, dq, dz, sums, seq, key_value, hidden, for_z,
        time, CONV_TIMES, cols, num_warps=warps,
    )  # fmt: skip
    return dz, sums


@conv_silu_backward.register_fake
def _(
    z: Tensor, weight: Tensor, bias: Tensor, dv: Tensor, dk: Tensor, dq: Tensor, for_z: bool
) -> tuple[Tensor, Tensor]:
    batch, seq, channels = z.shape
    dz = z.new_empty(z.shape) if for_z else z.new_empty(0)
    return dz, z.new_empty(batch, _spans(seq), 3, channels, dtype=torch.float32)


def _keep_conv(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3])


def _conv_gradients(ctx: Any, dv: Tensor, dk: Tensor, dq: Tensor) -> tuple:
    for_z = ctx.needs_input_grad[0]
    z, weight, bias = ctx.saved_tensors
    dz, sums = conv_silu_backward(z, weight, bias, dv, dk, dq, for_z)
    first, last, of_bias = sums.sum((0, 1))
    dweight = torch.stack([first, last], dim=-1)[:, None].to(weight.dtype)
    return dz if for_z else None, dweight, of_bias.to(bias.dtype), None


conv_silu.register_autograd(_conv_gradients, setup_context=_keep_conv)


def _spans(seq: int) -> int:
    """Programs of `conv_silu_backward` along a row."""
    return -(-seq // (LAUNCH["conv_silu_backward"][2] * CONV_TIMES))


def _columns(*widths: int) -> int:
    """The largest power of two up to 128 that divides the widths."""
    return next(cols for cols in (128, 64, 32, 16, 8, 4, 2, 1) if not any(w % cols for w in widths))


# --- SSD ----------------------------------------------------------------------------------------


def ssd_chunked(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor) -> Tensor:
    """`ssd.chunked` from zeros: y alone.

    Args:
        q: (batch, seq, heads, head_dim), head_dim one of `HEAD_DIMS`.
        k, v: (batch, seq, kv_heads, head_dim).
        dt: (batch, seq, heads) float32.
        a: (heads,) float32.
    """
    seq = dt.shape[1]
    dt = torch.nn.functional.pad(dt.transpose(1, 2), (0, -seq % CHUNK))  # (batch, heads, padded)
    decay = (dt * a[:, None]).unflatten(-1, (-1, CHUNK)).cumsum(-1).flatten(-2)
    return ssd(q, k, v, dt.contiguous(), decay)[0]


@torch.library.custom_op("mmmamba_edge::ssd", mutates_args=())
def ssd(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the state before each chunk, which has no gradient.

    Args:
        q, k, v: as in `ssd_chunked`.
        dt: (batch, heads, chunks * CHUNK) float32, 0 past `seq`.
        decay: the same shape: the sum of dt a since the chunk began.

    Returns:
        (batch, seq, heads, head_dim) and (batch * chunks, heads, head_dim, head_dim).
    """
    q, k, v, dt, decay = (x.contiguous() for x in (q, k, v, dt, decay))
    states = _chunk_states(k, v, dt, decay, q.shape[2] // k.shape[2], back=False)
    _carry(states, decay)
    y = torch.empty_like(q)
    _look("back", q, k, v, dt, decay, states, y)
    return y, states


@ssd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    states = q.new_empty(batch * (dt.shape[2] // CHUNK), heads, dim, dim)
    return q.new_empty(q.shape), states


@torch.library.custom_op("mmmamba_edge::ssd_backward", mutates_args=())
def ssd_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, decay: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; and what those of dt and decay are made of (ssd_kernels.py).

    That is, by head and position, q dq, k dk, and the part of k dk that comes from the state after
    the chunk; by head and chunk, in parts, the state times its gradient times the chunk's decay.
    """
    dy, q, k, v, dt, decay = (x.contiguous() for x in (dy, q, k, v, dt, decay))
    after = _chunk_states(q, dy, dt, decay, 1, back=True)
    alike = _carry(after, decay, states)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    read, written, to_end = (torch.empty_like(dt) for _ in range(3))
    _look("back", dy, v, k, dt, decay, states, dq, q, read)
    _look("ahead", k, q, dy, dt, decay, after, dv)
    _look("ahead", v, dy, q, dt, decay, after, dk, k, written, to_end)
    return dq, dk, dv, read, written, to_end, alike


@ssd_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, decay: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, read, written, end = (x.new_empty(x.shape) for x in (q, k, v, dt, dt, dt))
    batch, heads, padded = dt.shape
    alike = dt.new_empty(batch, heads, padded // CHUNK, _carriers(q.shape[3]))
    return dq, dk, dv, read, written, end, alike


def _keep_ssd(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _ssd_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple:
    q, k, v, dt, decay, states = ctx.saved_tensors
    dq, dk, dv, read, written, to_end, alike = ssd_backward(dy, q, k, v, dt, decay, states)
    at_end = to_end.unflatten(-1, (-1, CHUNK)).sum(-1) + alike.sum(-1)  # (batch, heads, chunks)
    ddecay = (read - written).unflatten(-1, (-1, CHUNK))
    ddecay = ddecay + torch.nn.functional.pad(at_end[..., None], (CHUNK - 1, 0))
    # A step of exactly 0 is padding's, which learns nothing.
    return dq, dk, dv, torch.where(dt > 0, written / dt, 0.0), ddecay.flatten(-2)


ssd.register_autograd(_ssd_gradients, setup_context=_keep_ssd)


def _chunk_states(
    x: Tensor, w: Tensor, dt: Tensor, decay: Tensor, share: int, *, back: bool
) -> Tensor:
    """(batch * chunks, heads, dim, dim): what each chunk adds to a state, or to its gradient."""
    (batch, heads, padded), (_, seq, _, dim) = dt.shape, x.shape
    chunks = padded // CHUNK
    out = x.new_empty(batch * chunks, heads, dim, dim)
    warps, stages, cols = LAUNCH["chunk_states"]
    cols = min(cols, dim)
    _kernel("ssd_kernels", "chunk_states")[(batch * chunks, heads, dim // cols)](
        x, w, dt, decay, out, seq, chunks, heads, share, dim, CHUNK, CHUNK // 2, cols, back,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _carry(added: Tensor, decay: Tensor, states: Tensor | None = None) -> Tensor:
    """In place, from what each chunk adds to states before each; or gradients after each.

    With the `states`, it is gradients; returns then each chunk's sum over state times gradient,
    times its decay, in parts: (batch, heads, chunks, parts).
    """
    (batch, heads, padded), size = decay.shape, added.shape[2] * added.shape[3]
    chunks, back = padded // CHUNK, states is not None
    warps, stages, cols = LAUNCH["carry_back" if back else "carry"]
    cols = min(cols, size)
    parts = size // cols
    alike = decay.new_empty(batch, heads, chunks, parts)
    _kernel("ssd_kernels", "carry")[(batch * heads, parts)](
        added, decay, added if states is None else states, alike, chunks, heads, size, CHUNK, cols,
        back, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return alike


def _carriers(dim: int) -> int:
    """Programs of `carry` for the gradient of one head's state."""
    return dim * dim // min(LAUNCH["carry_back"][2], dim * dim)


def _look(
    where: str, a: Tensor, b: Tensor, c: Tensor, dt: Tensor, decay: Tensor, states: Tensor,
    out: Tensor, own: Tensor | None = None, *sums: Tensor,
) -> None:  # fmt: skip
    """`look_back` or `look_ahead`; with `own`, as the gradient that has `sums`."""
    (batch, heads, padded), (_, seq, out_heads, dim) = dt.shape, out.shape
    warps, stages, block = LAUNCH[f"look_{where}"]
    share = heads // (out_heads if where == "ahead" else b.shape[2])
    if own is None:
        sums = (dt,) if where == "back" else (dt, dt)  # not written
    _kernel("ssd_kernels", f"look_{where}")[(batch * (padded // block), out_heads)](
        a, b, c, dt, decay, states, out, a if own is None else own, *sums, seq, padded // CHUNK,
        heads, share, dim, CHUNK, block, own is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip


# --- norm, gate and error -----------------------------------------------------------------------


@torch.library.custom_op("mmmamba_edge::gated_norm", mutates_args=())
def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm per head of y, times SiLU(gate).

    Args:
        y: (batch, seq, heads, head_dim).
        gate: (batch, seq, heads * head_dim).
        weight: (head_dim,).
        eps: of the norm.
    """
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    _gate(y, gate, weight, eps, None, out, None, None)
    return out


@gated_norm.register_fake
def _(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("mmmamba_edge::gated_norm_error", mutates_args=())
def gated_norm_error(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, target: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_norm` against a target, without keeping it.

    Args:
        y, gate, weight, eps: as above.
        target: (batch, seq, heads * head_dim); gets no gradient.

    Returns:
        (batch, seq) float32 each: the mean square of result minus target; of the target, which has
        no gradient.
    """
    error, power = (y.new_empty(y.shape[:2], dtype=torch.float32) for _ in range(2))
    _gate(y, gate, weight, eps, target, None, error, power)
    return error, power


@gated_norm_error.register_fake
def _(y: Tensor, gate: Tensor, weight: Tensor, eps: float, target: Tensor) -> tuple[Tensor, Tensor]:
    error, power = (y.new_empty(y.shape[:2], dtype=torch.float32) for _ in range(2))
    return error, power


@torch.library.custom_op("mmmamba_edge::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, gradient: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and gate; of the weight in parts, (parts, head_dim) float32.

    Args:
        y, gate, weight, eps: as above.
        gradient: of `gated_norm`; with a target, of `gated_norm_error`'s error.
        target: as above, or None.
    """
    y, gate, gradient = (x.contiguous() for x in (y, gate, gradient))
    target = None if target is None else target.contiguous()
    batch, seq, heads, dim = y.shape
    warps, _, tokens = LAUNCH["gated_norm_backward"]
    programs = _gaters(batch * seq)
    dy, dgate = torch.empty_like(y), torch.empty_like(gate)
    sums = y.new_empty(programs, dim, dtype=torch.float32)
    _kernel("mixer_kernels", "gated_norm_backward")[(programs,)](
        y, gate, weight, y if target is None else target, gradient, dy, dgate, sums, batch * seq,
        heads, dim, eps, _power_of_two(heads), _power_of_two(dim), tokens, target is not None,
        num_warps=warps,
    )  # fmt: skip
    return dy, dgate, sums


@gated_norm_backward.register_fake
def _(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, gradient: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dgate = y.new_empty(y.shape), gate.new_empty(gate.shape)
    parts = _gaters(y.shape[0] * y.shape[1])
    return dy, dgate, y.new_empty(parts, y.shape[3], dtype=torch.float32)


def _keep_gate(ctx: Any, inputs: tuple, output: Any) -> None:
    y, gate, weight, ctx.eps, *target = inputs
    ctx.save_for_backward(y, gate, weight, *target)


def _gate_gradients(ctx: Any, gradient: Tensor) -> tuple:
    y, gate, weight = ctx.saved_tensors
    dy, dgate, sums = gated_norm_backward(y, gate, weight, ctx.eps, gradient, None)
    return dy, dgate, sums.sum(0).to(weight.dtype), None


def _error_gradients(ctx: Any, gradient: Tensor, _: Any) -> tuple:
    y, gate, weight, target = ctx.saved_tensors
    dy, dgate, sums = gated_norm_backward(y, gate, weight, ctx.eps, gradient, target)
    return dy, dgate, sums.sum(0).to(weight.dtype), None, None


gated_norm.register_autograd(_gate_gradients, setup_context=_keep_gate)
gated_norm_error.register_autograd(_error_gradients, setup_context=_keep_gate)


def _gate(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, target: Tensor | None,
    out: Tensor | None, error: Tensor | None, power: Tensor | None,
) -> None:  # fmt: skip
    y, gate = y.contiguous(), gate.contiguous()
    batch, seq, heads, dim = y.shape
    unused = y  # a pointer that this variant of the kernel does not follow
    target = None if target is None else target.contiguous()
    others = [unused if x is None else x for x in (target, out, error, power)]
    _kernel("mixer_kernels", "gated_norm")[(batch * seq,)](
        y, gate, weight, *others, heads, dim, eps, _power_of_two(heads), _power_of_two(dim),
        target is not None, num_warps=LAUNCH["gated_norm"][0],
    )  # fmt: skip


def _gaters(tokens: int) -> int:
    """Programs of `gated_norm_backward`."""
    return -(-tokens // LAUNCH["gated_norm_backward"][2])


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()

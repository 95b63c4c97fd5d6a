"""The decoder's parts that teacher and student share: norm, MLP, RoPE, attention with its cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from mmmamba_edge.config import RopeScaling, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.recompute import Frugal


class RMSNorm(Frugal):
    """x / rms(x) * weight, the statistics in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.again(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class FeedForward(Frugal):
    """SwiGLU: w2(SiLU(w1 x) * w3 x), without biases."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)."""
        return self.w2(self.again(_gated, self.w1(x), self.w3(x)))


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@dataclass
class AttentionState:
    """A preallocated key/value cache. Rows past `length` hold nothing of meaning."""

    key: Tensor  # (batch, kv_heads, capacity, head_dim), after RoPE
    value: Tensor  # (batch, kv_heads, capacity, head_dim)
    length: Tensor  # (batch,) int64: tokens read
    reach: int | None = None  # rows to read; None: the longest, for which the device is asked

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their neutral names (runtimes/base.py)."""
        return {"key": self.key, "value": self.value}

    def copy(self) -> "AttentionState":
        """An independent copy."""
        return AttentionState(self.key.clone(), self.value.clone(), self.length.clone(), self.reach)


class Rotary(nn.Module):
    """Packed projections to queries, keys and values, the first two rotated by position.

    A module of its own, without parameters, so that torch.compile can take it alone.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config

    def forward(self, packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, heads or kv_heads, seq, head_dim) of each.

        Args:
            packed: (batch, seq, width of `wqkv`).
            cos, sin: of `tables`. Made outside: compiled, they would be made for every head.
        """
        c = self.config
        groups = c.num_attention_heads // c.num_key_value_heads
        packed = packed.unflatten(-1, (c.num_key_value_heads, groups + 2, c.head_dim))
        q = packed[..., :groups, :].flatten(2, 3).transpose(1, 2)
        k = packed[..., -2, :].transpose(1, 2)
        v = packed[..., -1, :].transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def tables(
        self, positions: Tensor, whole: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`rope_tables` of this stack."""
        return rope_tables(positions, self.config, whole, dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE; `wqkv` is packed per kv head (spec 2.3)."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(
            config.hidden_size, config.hidden_size + 2 * config.key_value_dim, bias=False
        )
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary = Rotary(config)

    def new_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        """An empty cache for `capacity` tokens."""
        c = self.config
        shape = (batch, c.num_key_value_heads, capacity, c.head_dim)
        return AttentionState(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, state: AttentionState | None = None
    ) -> Tensor:
        """Attend over `x`, and over the cache where one is given (it is extended in place).

        Args:
            x: (batch, seq, hidden), right-padded.
            lengths: (batch,) real tokens of each row; None: all of them.
            state: the cache to read and extend; None: a whole sequence by itself.

        Returns:
            (batch, seq, hidden).
        """
        batch, seq, _ = x.shape
        if state is None:
            positions = torch.arange(seq, device=x.device)[None]  # (1, seq)
            whole = lengths if lengths is not None else positions.new_full((1,), seq)
            q, k, v = self.project(x, positions, whole)
            # Padding is on the right: causal order alone keeps it from every real query.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            end = int(state.length.max()) + seq if state.reach is None else state.reach
            if end > state.key.shape[2]:
                raise UserError(
                    f"context of {end} tokens: the attention cache was made for "
                    f"{state.key.shape[2]}; start with a larger max_context"
                )
            positions = state.length[:, None] + torch.arange(seq, device=x.device)  # (batch, seq)
            # The cache keeps rotated keys, so decoding uses the plain base, as the released student
            # does; dynamic NTK, which depends on the whole length, serves whole sequences only.
            q, k, v = self.project(x, positions, None)
            rows = torch.arange(batch, device=x.device)[:, None]
            state.key[rows, :, positions] = k.transpose(1, 2)
            state.value[rows, :, positions] = v.transpose(1, 2)
            used = slice(0, end)
            if x.is_cuda and batch == 1 and state.reach is None:
                # In words that flash attention understands: a mask of its own keeps it out.
                visible = causal_lower_right(seq, end) if seq > 1 else None
            else:
                visible = torch.arange(end, device=x.device) <= positions[..., None]
                visible = visible[:, None]
            heads = q.shape[1]
            if seq == 1:
                # A kv head's queries as its rows: with a mask, enable_gqa would copy the cache.
                q = q.reshape(batch, state.key.shape[1], -1, q.shape[3])
            y = F.scaled_dot_product_attention(
                q, state.key[:, :, used], state.value[:, :, used],
                attn_mask=visible, enable_gqa=seq > 1,
            ).reshape(batch, heads, seq, -1)  # fmt: skip
            state.length += seq if lengths is None else lengths
        return self.wo(y.transpose(1, 2).flatten(2))

    def project(
        self, x: Tensor, positions: Tensor, whole: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values: (batch, heads or kv_heads, seq, head_dim), rotated.

        Args:
            x: (batch, seq, hidden).
            positions, whole: as in `rope_tables`.
        """
        packed = self.wqkv(x)
        return self.rotary(packed, *self.rotary.tables(positions, whole, packed.dtype))


def split_wqkv(weight: Tensor, config: StackConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `wqkv`, packed per kv head (spec 2.3) -> q_proj, k_proj, v_proj weights."""
    c = config
    groups = c.num_attention_heads // c.num_key_value_heads
    packed = weight.unflatten(0, (c.num_key_value_heads, groups + 2, c.head_dim))
    q, k, v = packed[:, :groups], packed[:, groups], packed[:, groups + 1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def rope_tables(
    positions: Tensor, config: StackConfig, whole: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (batch or 1, 1, seq, head_dim), built in float32.

    Args:
        positions: (batch or 1, seq).
        config: base, scaling and head size.
        whole: (batch or 1,) length of each whole sequence, for dynamic NTK; None: plain base.
        dtype: of the result.
    """
    dim, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim  # (head_dim / 2,)
    base = torch.full((1,), config.rope_theta, device=positions.device)
    if scaling and scaling.type == "dynamic" and whole is not None:
        base = dynamic_ntk_base(
            whole, config.rope_theta, scaling, config.max_position_embeddings, dim
        )
    scale = scaling.factor if scaling and scaling.type == "linear" else 1.0
    frequencies = 1.0 / base[:, None] ** exponents  # (batch or 1, head_dim / 2)
    angles = (positions.float() / scale)[..., None] * frequencies[:, None]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (batch or 1, 1, seq, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def dynamic_ntk_base(
    whole: Tensor, theta: float, scaling: RopeScaling, max_positions: int, dim: int
) -> Tensor:
    """RoPE base for sequences of length `whole`: grown beyond max_positions (spec 1.2)."""
    ratio = scaling.factor * whole.float() / max_positions - (scaling.factor - 1)
    grown = theta * ratio.clamp(min=1.0) ** (dim / (dim - 2))
    return torch.where(whole > max_positions, grown, torch.full_like(grown, theta))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation ("neox"): [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin

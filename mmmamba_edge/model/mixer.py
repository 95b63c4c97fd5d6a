"""The Mamba-2 mixer in attention's place (spec 3): projections, conv, SSD, gated norm, output."""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_edge.config import CONV_KERNEL, StackConfig
from mmmamba_edge.model import ssd, training_ops
from mmmamba_edge.model.layers import RMSNorm
from mmmamba_edge.model.recompute import Frugal

G_NORM_EPS = 1e-5  # fixed in the original, whatever rms_norm_eps says


@dataclass
class MixerState:
    """All that a Mamba-2 layer remembers; its size does not depend on what was read."""

    conv: Tensor  # (batch, channels, kernel - 1): the last pre-conv columns, channels v, k, q
    ssm: Tensor  # (batch, heads, key_dim, value_dim) float32

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their neutral names (runtimes/base.py)."""
        return {"conv": self.conv, "ssm": self.ssm}

    def copy(self) -> "MixerState":
        """An independent copy."""
        return MixerState(self.conv.clone(), self.ssm.clone())


class Mamba2Mixer(Frugal):
    """q, k, v through a causal conv and SiLU, then SSD, then RMSNorm per head times SiLU(gate).

    No positions, no softmax scale, no D skip. `in_proj` is the projection to dt, despite its name:
    the released checkpoints call it so.

    Attributes:
        fused: whether `training_ops` may serve, where it does.
    """

    fused = True

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        hidden, key_value = config.hidden_size, config.key_value_dim
        heads = config.num_attention_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, key_value, bias=False)
        self.v_proj = nn.Linear(hidden, key_value, bias=False)
        self.g_proj = nn.Linear(hidden, hidden, bias=False)
        self.in_proj = nn.Linear(hidden, heads, bias=False)
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, CONV_KERNEL, groups=config.conv_dim
        )
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log_bias = nn.Parameter(torch.ones(heads))
        self.g_norm = RMSNorm(config.head_dim, G_NORM_EPS)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state before the first token: zeros."""
        c = self.config
        return MixerState(
            torch.zeros(batch, c.conv_dim, CONV_KERNEL - 1, device=device, dtype=dtype),
            torch.zeros(
                batch, c.num_attention_heads, c.head_dim, c.head_dim, device=device,
                dtype=torch.promote_types(dtype, torch.float32),
            ),
        )  # fmt: skip

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, state: MixerState | None = None,
        *, heads_only: bool = False, ending: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:  # fmt: skip
        """Mix along the sequence; a given state is read and then updated.

        Args:
            x: (batch, seq, hidden), right-padded.
            lengths: (batch,) real tokens of each row; None: all of them. Padding never touches
                the state.
            state: where to go on from; None: from zeros, and nothing is kept.
            heads_only: leave the output projection out.
            ending: what to do in place of norm, gate and output projection with `ungated`'s
                results, while a sharded mixer's weights are whole; only without a state.

        Returns:
            (batch, seq, hidden), or what `ending` does.
        """
        if ending is not None:
            assert state is None
            return ending(*self.ungated(x, lengths))
        y = self.heads(x, lengths, state).flatten(2)
        return y if heads_only else self.o_proj(y)

    def heads(
        self, x: Tensor, lengths: Tensor | None = None, state: MixerState | None = None
    ) -> Tensor:
        """`forward` up to the output projection: (batch, seq, heads, head_dim), normed, gated.

        This is what distillation stages 1 and 2 compare with the teacher's attention (spec 6.2).
        """
        return self.again(
            self._mixed, self._projected(x), self.in_proj(x), self.g_proj(x), lengths, state
        )

    def ungated(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`heads` before norm and gate, (batch, seq, heads, head_dim), and the gate's projection.

        `gated` makes the heads of them.
        """
        y = self._read(self._projected(x), self.in_proj(x), lengths, None)
        return y, self.g_proj(x)

    def fuses(self, x: Tensor) -> bool:
        """Whether `training_ops` serves for an intermediate result like `x`, here and now."""
        return self.fused and training_ops.serves(x)

    def _projected(self, x: Tensor) -> Tensor:
        """v, k and q before the conv: (batch, seq, channels)."""
        parts = (self.v_proj, self.k_proj, self.q_proj)
        if torch.compiler.is_dynamo_compiling() and all(type(part) is nn.Linear for part in parts):
            # One product and no copy of its result; eager, the weights would be copied instead.
            return F.linear(x, torch.cat([part.weight for part in parts]))
        return torch.cat([part(x) for part in parts], dim=-1)

    def _mixed(
        self, z: Tensor, dt: Tensor, gate: Tensor, lengths: Tensor | None, state: MixerState | None
    ) -> Tensor:
        """All that follows the projections: conv, SSD, norm, gate."""
        return self.gated(self._read(z, dt, lengths, state), gate)

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm per head of y (batch, seq, heads, head_dim), times SiLU(gate), in y's shape."""
        if self.fuses(y):
            return training_ops.gated_norm(y, gate, self.g_norm.weight, self.g_norm.eps)
        return self.g_norm(y) * F.silu(gate.unflatten(-1, (-1, self.config.head_dim)))

    def _read(
        self, z: Tensor, dt: Tensor, lengths: Tensor | None, state: MixerState | None
    ) -> Tensor:
        """Conv and SSD: (batch, seq, heads, head_dim)."""
        q, k, v, dt = self._ssd_inputs(z, dt, lengths, state)
        a = -torch.exp(self.A_log_bias.float())
        if state is None and self.fuses(z) and q.shape[-1] in training_ops.HEAD_DIMS:
            y = training_ops.ssd_chunked(q, k, v, dt, a)
        elif state is None:
            y, _ = ssd.chunked(q, k, v, dt, a)
        elif z.shape[1] == 1:
            y, state.ssm = ssd.step(q[:, 0], k[:, 0], v[:, 0], dt[:, 0], a, state.ssm)
            y = y[:, None]
        else:
            y, state.ssm = ssd.chunked(q, k, v, dt, a, state.ssm)
        return y

    def _ssd_inputs(
        self, z: Tensor, dt: Tensor, lengths: Tensor | None, state: MixerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """After conv and SiLU: q (batch, seq, heads, head_dim), k and v (batch, seq, kv_heads,
        head_dim), and dt (batch, seq, heads)."""
        c = self.config
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if lengths is not None:
            real = torch.arange(z.shape[1], device=z.device) < lengths[:, None]
            dt = dt * real[..., None]
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if state is None and self.fuses(z):
            assert bias is not None
            v, k, q = training_ops.conv_silu(z, weight, bias, c.key_value_dim)
        else:
            z, column = causal_conv(z, weight, bias, None if state is None else state.conv, lengths)
            if state is not None:
                state.conv = column
            v, k, q = z.split([c.key_value_dim, c.key_value_dim, c.hidden_size], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in (q, k, v))
        return q, k, v, dt


def causal_conv(
    z: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal conv over time, then SiLU.

    Args:
        z: (batch, seq, channels).
        weight: (channels, 1, kernel).
        bias: (channels,).
        state: (batch, channels, kernel - 1) columns before the first; None: zeros.
        lengths: (batch,) real tokens of each row; None: all.

    Returns:
        (batch, seq, channels), and the last kernel - 1 real columns (batch, channels, kernel - 1).
    """
    batch, seq, channels = z.shape
    kernel = weight.shape[-1]
    if state is None:
        padded = F.pad(z, (0, 0, kernel - 1, 0))
    else:
        padded = torch.cat([state.transpose(1, 2).to(z), z], dim=1)
    # padded: (batch, kernel - 1 + seq, channels)
    if z.is_cuda and z.dtype != torch.float64 and (fused := conv_kernel()):
        columns = padded.transpose(1, 2)  # (batch, channels, kernel - 1 + seq)
        y = fused(columns, weight[:, 0], bias, activation="silu").transpose(1, 2)[:, kernel - 1 :]
    else:
        taps = (weight[:, 0, j] * padded[:, j : j + seq] for j in range(kernel))
        total = sum(taps, start=torch.zeros((), device=z.device, dtype=z.dtype))
        y = F.silu(total if bias is None else total + bias)
    if lengths is None:
        last = padded[:, seq:]
    else:
        index = lengths[:, None] + torch.arange(kernel - 1, device=z.device)  # (batch, kernel - 1)
        last = padded.gather(1, index[..., None].expand(-1, -1, channels))
    # A copy, even of one column, which counts as contiguous: a view would keep all of `padded`.
    return y, last.transpose(1, 2).clone(memory_format=torch.contiguous_format)


_FOUND: dict[str, Any] = {}


def conv_kernel() -> Callable[..., Tensor] | None:
    """causal-conv1d's kernel, or None where it is not installed or does not load."""
    # In a table of its own, not behind functools.cache, which torch.compile does not see.
    if "conv_kernel" not in _FOUND:
        _FOUND["conv_kernel"] = _load_conv_kernel()
    return _FOUND["conv_kernel"]


def _load_conv_kernel() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("causal_conv1d") is None:
        return None
    try:
        return importlib.import_module("causal_conv1d").causal_conv1d_fn
    except Exception as error:  # a wheel of another torch or CUDA fails in many ways
        logging.getLogger(__name__).warning(
            "causal-conv1d does not load (%s): using PyTorch", error
        )
        return None


def look_up_kernels() -> None:
    """Find the CUDA kernels that are installed, before torch.compile traces code that asks."""
    ssd.mamba_kernel()
    conv_kernel()
    if training_ops.has_triton():
        training_ops.part_compile_caches()

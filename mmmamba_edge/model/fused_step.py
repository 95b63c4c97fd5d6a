"""Decoding one token at batch 1 with Triton kernels: about five launches a layer.

`MMMamba.step` is the same map in plain PyTorch, for every other device, dtype and batch.
`recorded_step.py` makes a CUDA graph of it.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_edge.config import StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.decoder import DecoderLayer, DecoderState, MMMamba
from mmmamba_edge.model.layers import Attention, AttentionState
from mmmamba_edge.model.mixer import G_NORM_EPS, Mamba2Mixer, MixerState

LOG2_E = 1.4426950408889634
# Weights that a program asks for at once. Compiled for sm_90 with 8 warps these take 40 to 74
# registers: at least three programs of 16 or 32 KiB stay on an SM and ask for more beside it.
TILES = {
    "mixer_in": 8192, "mixer_out": 8192, "ffn_in": 16_384, "down": 8192,
    "attention_in": 16_384, "wo": 8192, "head": 8192,
}  # fmt: skip
WARPS = 8
BLOCK = 64  # rows of an attention cache read at a time
SPLITS_PER_SM = 2  # programs of `attend`


@dataclass(frozen=True)
class Launch:
    """How the kernels are started; none of it changes what is computed but for rounding.

    Attributes:
        tile: by product, the weights a program takes at once, a power of two.
        warps: by product, warps of a program.
        pdl: let a kernel ask for its weights before the one in front of it has ended.
    """

    tile: dict[str, int] = field(default_factory=lambda: dict(TILES))
    warps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TILES, WARPS))
    pdl: bool = True


def why_not_fused(model: MMMamba) -> str | None:
    """Why `FusedStep` cannot decode with this model here, in words for the user; None: it can."""
    weight = model.language_model.output.weight
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (weight.is_cuda or interpreted):
        return f"the model is on {weight.device.type}, the kernels are for CUDA"
    if weight.is_cuda and torch.version.hip:
        return "the kernels were never tried on ROCm"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the kernels need compute capability 8.0 or newer"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels have no {weight.dtype}"
    kinds = {type(m) for layer in model.layers for m in layer.modules()}
    if any(issubclass(kind, nn.Linear) and kind is not nn.Linear for kind in kinds):
        return "layers are quantised"
    if model.config.embedding.head_dim != model.config.llm.head_dim:
        return "the heads of the two halves differ in size"
    dtypes = {p.dtype for p in model.parameters()}
    return None if dtypes == {weight.dtype} else f"weights of several types: {dtypes}"


class FusedStep:
    """One decoding step of `model` at batch 1 in about five launches a layer.

    Raises:
        UserError: it cannot run here, with the reason (`why_not_fused`).
    """

    def __init__(self, model: MMMamba, how: Launch | None = None):
        if reason := why_not_fused(model):
            raise UserError(f"kernels 'fused': {reason}; use 'plain'")
        self.model = model
        weight = model.language_model.output.weight
        self.device, self.dtype = weight.device, weight.dtype
        pdl = weight.is_cuda and torch.cuda.get_device_capability(self.device) >= (9, 0)
        how = how or Launch()
        self.how = replace(how, pdl=how.pdl and pdl)
        self.compiled_for: Launch | None = None
        # Imported here: triton is optional, and the module compiles on import.
        self._kernels = importlib.import_module("mmmamba_edge.model.decode_kernels")
        self._attention = importlib.import_module("mmmamba_edge.model.decode_attention")
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.logits = self._buffer(model.config.vocab_size)
        self._make_buffers()

    # --- buffers --------------------------------------------------------------------------------

    def _buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _make_buffers(self) -> None:
        halves = (self.model.config.embedding, self.model.config.llm)
        hidden = self.model.config.hidden_size
        heads = max(c.num_attention_heads for c in halves)
        self._x, self._y, self._gate = (self._buffer(hidden) for _ in range(3))
        self._mixed = self._buffer(max(c.conv_dim for c in halves))
        self._dt = self._buffer(heads)
        self._inner = self._buffer(max(c.intermediate_size for c in halves), dtype=self.dtype)
        self._q = self._buffer(hidden, dtype=self.dtype)
        programs = SPLITS_PER_SM * _processors(self.device)
        self._splits = {c: max(1, programs // c.num_key_value_heads) for c in halves}
        slots = max(splits * c.num_attention_heads for c, splits in self._splits.items())
        head_dim = halves[0].head_dim  # of both halves
        self._shares = self._buffer(slots * head_dim)
        self._tops, self._totals = self._buffer(slots), self._buffer(slots)
        self._half = head_dim // 2
        self._frequencies = self._buffer(2, self._half)
        self._scales = self._buffer(2) + 1
        for i, c in enumerate(halves):
            exponents = torch.arange(0, c.head_dim, 2, device=self.device).float() / c.head_dim
            base = torch.full((1,), c.rope_theta, device=self.device)
            self._frequencies[i, : c.head_dim // 2] = 1.0 / base**exponents
            if c.rope_scaling and c.rope_scaling.type == "linear":
                self._scales[i] = c.rope_scaling.factor
        self._rope = self._buffer(2, 2, self._half)

    # --- the step -------------------------------------------------------------------------------

    def launch(self, state: DecoderState) -> Tensor:
        """Read the token in `self.token`: logits (vocab_size,) float32, overwritten by the next.

        All of `state`'s tensors are changed in place. On CUDA the kernels are only enqueued.
        """
        model, config, hidden = self.model, self.model.config, self.model.config.hidden_size
        self._run(
            self._kernels.begin, (max(2, _ceil(hidden, 1024)),),
            self.token, model.embedding_model.llm_text_embeddings.weight, state.length,
            self._frequencies, self._scales, self._x, self._rope,
            hidden=hidden, half=self._half, ROPE="attention" in config.layer_types,
            COLS=1024, HALF=_power(self._half),
        )  # fmt: skip
        first = len(model.embedding_model.encoder)
        for i, (layer, memory) in enumerate(zip(model.layers, state.layers, strict=True)):
            if i == first and config.normalize_encoder_output:
                self._run_pdl(
                    self._kernels.normalize, (1,), self._x, hidden=hidden, COLS=_power(hidden)
                )
            c = config.stack_of(i)
            if isinstance(memory, AttentionState):
                self._attend(layer, c, memory, state.length, self._rope[int(i >= first)])
            else:
                self._mix(layer, c, memory)
            self._feed_forward(layer, c)
        norm, output = model.language_model.model.norm, model.language_model.output
        self._product(
            "head", self._kernels.head, hidden, config.vocab_size,
            self._x, norm.weight, output.weight, self.logits, state.length, config.vocab_size,
            hidden=hidden, eps=norm.eps,
        )  # fmt: skip
        return self.logits

    def _mix(self, layer: DecoderLayer, c: StackConfig, memory: MixerState) -> None:
        mix, norm = layer.attention, layer.attention_norm
        assert isinstance(mix, Mamba2Mixer) and mix.conv1d.bias is not None
        assert memory.ssm.is_contiguous() and memory.conv.is_contiguous()
        rows = self._rows("mixer_in", c.hidden_size)
        parts = (c.key_value_dim, c.key_value_dim, c.hidden_size, c.hidden_size)
        programs = sum(_ceil(part, rows) for part in (*parts, c.num_attention_heads))
        self._product(
            "mixer_in", self._kernels.mixer_in, c.hidden_size, programs * rows,
            self._x, norm.weight, mix.v_proj.weight, mix.k_proj.weight, mix.q_proj.weight,
            mix.g_proj.weight, mix.in_proj.weight, mix.conv1d.weight, mix.conv1d.bias,
            memory.conv, mix.dt_bias, self._mixed, self._gate, self._dt,
            hidden=c.hidden_size, key_value=c.key_value_dim, heads=c.num_attention_heads,
            eps=norm.eps,
        )  # fmt: skip
        groups = c.num_attention_heads // c.num_key_value_heads
        dim = _power(c.head_dim)
        cols = min(dim, 16)
        self._run_pdl(
            self._kernels.ssd_step, (c.num_attention_heads, dim // cols),
            self._mixed, self._dt, mix.A_log_bias, memory.ssm, self._y,
            key_value=c.key_value_dim, groups=groups, head_dim=c.head_dim, DIM=dim, COLS=cols,
        )  # fmt: skip
        rows = self._rows("mixer_out", c.hidden_size)
        self._run_pdl(
            self._kernels.mixer_out, (_ceil(c.hidden_size, rows),),
            self._y, self._gate, mix.g_norm.weight, mix.o_proj.weight, self._x,
            heads=c.num_attention_heads, head_dim=c.head_dim, eps=G_NORM_EPS,
            HEADS=_power(c.num_attention_heads), DIM=dim, ROWS=rows,
            num_warps=self.how.warps["mixer_out"],
        )  # fmt: skip

    def _attend(
        self, layer: DecoderLayer, c: StackConfig, memory: AttentionState, length: Tensor,
        rope: Tensor,
    ) -> None:  # fmt: skip
        attention, norm = layer.attention, layer.attention_norm
        assert isinstance(attention, Attention)
        capacity, heads = memory.key.shape[2], c.num_attention_heads
        groups, half = heads // c.num_key_value_heads, c.head_dim // 2
        rows = min(_power(half), max(1, self._rows("attention_in", c.hidden_size) // 2))
        programs = c.num_key_value_heads * (groups + 2) * _ceil(half, rows)
        self._run_pdl(
            self._attention.attention_in, (programs,),
            self._x, norm.weight, attention.wqkv.weight, rope, length, self._q, memory.key,
            memory.value, capacity,
            hidden=c.hidden_size, groups=groups, head_dim=c.head_dim, eps=norm.eps,
            COLS=_power(c.hidden_size), ROWS=rows, num_warps=self.how.warps["attention_in"],
        )  # fmt: skip
        splits, dim = self._splits[c], max(16, _power(c.head_dim))
        self._run_pdl(
            self._attention.attend, (c.num_key_value_heads, splits),
            self._q, memory.key, memory.value, length, self._shares, self._tops, self._totals,
            capacity,
            groups=groups, head_dim=c.head_dim, scale=c.head_dim**-0.5 * LOG2_E,
            GROUP=max(16, _power(groups)), DIM=dim, BLOCK=BLOCK, num_warps=4, num_stages=3,
        )  # fmt: skip
        self._run_pdl(
            self._attention.combine, (heads,),
            self._shares, self._tops, self._totals, self._y, memory.length,
            splits=splits, head_dim=c.head_dim, SPLITS=_power(splits), DIM=dim,
        )  # fmt: skip
        self._product(
            "wo", self._kernels.project, c.hidden_size, c.hidden_size,
            self._y, attention.wo.weight, self._x, width=c.hidden_size, hidden=c.hidden_size,
        )  # fmt: skip

    def _feed_forward(self, layer: DecoderLayer, c: StackConfig) -> None:
        ffn, norm = layer.feed_forward, layer.ffn_norm
        rows = max(1, self._rows("ffn_in", c.hidden_size) // 2)  # two matrices
        self._run_pdl(
            self._kernels.ffn_in, (_ceil(c.intermediate_size, rows),),
            self._x, norm.weight, ffn.w1.weight, ffn.w3.weight, self._inner,
            hidden=c.hidden_size, intermediate=c.intermediate_size, eps=norm.eps,
            COLS=_power(c.hidden_size), ROWS=rows, num_warps=self.how.warps["ffn_in"],
        )  # fmt: skip
        self._product(
            "down", self._kernels.project, c.intermediate_size, c.hidden_size,
            self._inner, ffn.w2.weight, self._x, width=c.intermediate_size, hidden=c.hidden_size,
        )  # fmt: skip

    # --- launching ------------------------------------------------------------------------------

    def _rows(self, name: str, width: int) -> int:
        return max(1, self.how.tile[name] // _power(width))

    def _product(
        self, name: str, kernel: Any, columns: int, rows: int, *args: Any, **sizes: Any
    ) -> None:
        """A matrix (rows, columns) times a vector, `_rows` rows a program."""
        each = self._rows(name, columns)
        self._run_pdl(
            kernel, (_ceil(rows, each),), *args, **sizes, COLS=_power(columns), ROWS=each,
            num_warps=self.how.warps[name],
        )  # fmt: skip

    def _run_pdl(self, kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
        early = {"launch_pdl": True} if self.how.pdl else {}
        self._run(kernel, grid, *args, **sizes, PDL=self.how.pdl, **early)

    def _run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
        kernel[grid](*args, **sizes)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ceil(count: int, each: int) -> int:
    return -(-count // each)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()

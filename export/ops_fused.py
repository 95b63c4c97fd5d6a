"""The default dialect: ONNX Runtime's com.microsoft operators, where they are the faster ones.

The state may be written over the one that is read: LinearAttention and GroupQueryAttention have CPU
kernels in ONNX Runtime 1.32 that allow it (exact, for one token and for many), and the conv's last
column is taken from a copy. So a decoding step copies and allocates no SSD state and no cache.
CausalConvWithState and GatedRMSNorm are not used: plain operators are 3 times as fast for a token
and 10 to 20 times for a prompt (docs/performance.md).
"""

from typing import Any

import numpy as np

from mmmamba_edge.config import StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.graph_writer import INT32, GraphWriter
from mmmamba_edge.export.ops import Cache, Floats, Matrix, float_product, float_rows
from mmmamba_edge.quant.codes import Codes, pack_blocks

DOMAIN = "com.microsoft"

# Of MatMulNBits: activations become int8 in blocks as wide as the weights'.
ACCURACY_LEVEL = 4
BLOCK = 64


class FusedOps:
    """See `export.ops.Ops`."""

    name = "com.microsoft"
    opset = {"": 23, DOMAIN: 1}
    settings: dict[str, Any] = {"accuracy_level": ACCURACY_LEVEL, "block": BLOCK}

    def __init__(self, graph: GraphWriter):
        self.graph = graph
        self._lengths: dict[str, tuple[str, str]] = {}

    def linear(self, x: str, name: str, weight: Matrix, bias: Floats | None = None) -> str:
        g = self.graph
        if isinstance(weight, Codes):
            rows, columns = weight.shape
            block = weight.group if weight.bits == 4 else BLOCK
            data, scales = pack_blocks(weight, block)
            inputs = [x, g.weight(f"{name}.codes", data), g.weight(f"{name}.scales", scales)]
            if bias is not None:
                inputs += ["", "", g.weight(f"{name}.bias", bias)]
            return g.one(
                "MatMulNBits", *inputs, domain=DOMAIN, label=name, bits=weight.bits,
                block_size=block, N=rows, K=columns, accuracy_level=ACCURACY_LEVEL,
            )  # fmt: skip
        y = float_product(g, x, name, weight)
        return y if bias is None else g.one("Add", y, g.weight(f"{name}.bias", bias))

    def embedding(self, ids: str, output: str, name: str, table: Matrix) -> None:
        g = self.graph
        if not isinstance(table, Codes):
            float_rows(g, ids, output, name, table)
            return
        rows, columns = table.shape
        block = max(16, 1 << (columns - 1).bit_length())  # one block a row: one scale a row
        data, scales = pack_blocks(table, block)
        g.node(
            "GatherBlockQuantized",
            [
                g.weight(f"{name}.codes", data.reshape(rows, block)[:, :columns]),
                ids,
                g.weight(f"{name}.scales", scales),
            ],
            [output], domain=DOMAIN, label=name, bits=8, block_size=block, gather_axis=0,
            quantize_axis=1,
        )  # fmt: skip

    def rms_norm(self, x: str, name: str, weight: Floats, eps: float) -> str:
        g = self.graph
        return g.one(
            "RMSNormalization", x, g.weight(f"{name}.weight", weight), label=name, axis=-1,
            epsilon=eps,
        )  # fmt: skip

    def add_rms_norm(
        self, x: str, y: str, name: str, weight: Floats, eps: float
    ) -> tuple[str, str]:
        g = self.graph
        total = f"{name}:sum"
        normed = g.node(
            "SkipSimplifiedLayerNormalization",
            [x, y, g.weight(f"{name}.weight", weight)], [f"{name}:out", "", "", total],
            domain=DOMAIN, label=name, epsilon=eps,
        )  # fmt: skip
        return total, normed[0]

    def swiglu(self, gate_up: str, width: int) -> str:
        g = self.graph
        gate, up = g.node("Split", [gate_up, g.ints(width, width)], 2, axis=-1)
        return g.one("Mul", self._silu(gate), up)

    def causal_conv(self, z: str, name: str, weight: Floats, bias: Floats, cache: Cache) -> str:
        g = self.graph
        channels, _, kernel = weight.shape
        assert kernel == 2  # the last column as (1, channels, 1) or (1, 1, channels): equal bytes
        past = g.one("Reshape", cache.past, g.ints(1, 1, channels))
        columns = g.one("Concat", past, z, axis=1, label=name)
        before = g.one("Slice", columns, g.ints(0), g.ints(-1), g.ints(1))
        # Of `columns`, not of z: past and present may be one memory, and `columns` has read it.
        last = g.one("Slice", columns, g.ints(-1), g.ints(np.iinfo(np.int64).max), g.ints(1))
        g.node("Reshape", [last, g.ints(1, channels, 1)], [cache.present])
        taps = [g.weight(f"{name}.tap{i}", weight[:, 0, i]) for i in range(kernel)]
        y = g.one("Add", g.one("Mul", before, taps[0]), g.one("Mul", z, taps[1]))
        return self._silu(g.one("Add", y, g.weight(f"{name}.bias", bias)))

    def time_step(self, dt_raw: str, name: str, dt_bias: Floats, a: Floats) -> tuple[str, str]:
        g = self.graph
        # Not LinearAttentionGate: its softplus is log(1 + exp(x)), wrong by 6e-5 for dt = 0.001.
        x = g.one("Add", dt_raw, g.weight(f"{name}.dt_bias", dt_bias))
        dt = g.one("Softplus", x, label=f"{name}.dt")
        return dt, g.one("Mul", dt, g.weight(f"{name}.a", a), label=f"{name}.decay")

    def ssd(self, q: str, k: str, v: str, decay: str, heads: int, cache: Cache) -> str:
        y, _ = self.graph.node(
            "LinearAttention", [q, k, v, cache.past, decay],
            [f"{cache.present}:y", cache.present], domain=DOMAIN, label="ssd",
            q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
        )  # fmt: skip
        return y

    def gated_norm(self, y: str, gate: str, name: str, weight: Floats, eps: float) -> str:
        g = self.graph
        by_head = g.one("Reshape", y, g.ints(0, 0, -1, weight.shape[-1]))
        shared = weight if weight.ndim == 1 else np.ones_like(weight[0])
        normed = self.rms_norm(by_head, name, shared, eps)
        if weight.ndim == 2:
            normed = g.one("Mul", normed, g.weight(f"{name}.by_head", weight))
        return g.one("Mul", g.one("Reshape", normed, g.ints(0, 0, -1)), self._silu(gate))

    def attention(
        self, qkv: str, stack: StackConfig, past_length: str, rope: tuple[str, str],
        key: Cache, value: Cache,
    ) -> str:  # fmt: skip
        if stack.head_dim % 16:
            raise UserError(
                f"attention heads of {stack.head_dim}: GroupQueryAttention takes multiples of 16; "
                "export with --ops standard"
            )
        last, total = self._lengths.get(past_length) or self._add_lengths(qkv, past_length)
        y, _, _ = self.graph.node(
            "GroupQueryAttention", [qkv, "", "", key.past, value.past, last, total, *rope],
            [f"{key.present}:y", key.present, value.present], domain=DOMAIN, label="attention",
            num_heads=stack.num_attention_heads, kv_num_heads=stack.num_key_value_heads,
            do_rotary=1,
        )  # fmt: skip
        return y

    def _silu(self, x: str) -> str:
        return self.graph.one("QuickGelu", x, domain=DOMAIN, alpha=1.0)

    def _add_lengths(self, x: str, past_length: str) -> tuple[str, str]:
        """As the kernel wants them: the last position (1,) and the total (), both int32."""
        g = self.graph
        tokens = g.one("Shape", x, start=1, end=2)
        total = g.one("Add", past_length, tokens)
        last = g.one("Sub", total, g.ints(1))
        scalar = g.one("Squeeze", total, g.ints(0))
        made = g.one("Cast", last, to=INT32), g.one("Cast", scalar, to=INT32)
        self._lengths[past_length] = made
        return made

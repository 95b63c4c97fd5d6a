"""Plain ONNX of opset 27, for engines other than ONNX Runtime.

ONNX Runtime runs it too, so that every such bundle is verified, but slowly: it expands
LinearAttention and CausalConvWithState to what the ONNX standard defines them by.
"""

from typing import Any

import numpy as np

from mmmamba_edge.config import StackConfig
from mmmamba_edge.export.graph_writer import FLOAT, GraphWriter
from mmmamba_edge.export.ops import Cache, Floats, Matrix, float_product, float_rows
from mmmamba_edge.quant.codes import Codes


class StandardOps:
    """See `export.ops.Ops`."""

    name = "standard"
    opset = {"": 27}
    settings: dict[str, Any] = {}

    def __init__(self, graph: GraphWriter):
        self.graph = graph
        self._positions: dict[str, tuple[str, str]] = {}

    def linear(self, x: str, name: str, weight: Matrix, bias: Floats | None = None) -> str:
        g = self.graph
        if isinstance(weight, Codes):
            y = g.one("MatMul", x, self._dequantized(name, weight), label=name)
        else:
            y = float_product(g, x, name, weight)
        return y if bias is None else g.one("Add", y, g.weight(f"{name}.bias", bias))

    def _dequantized(self, name: str, weight: Codes) -> str:
        """(columns, rows), as a MatMul wants it."""
        g = self.graph
        if weight.bits == 8:
            codes = g.weight(f"{name}.codes", weight.codes.T)
            scale = g.weight(f"{name}.scales", weight.scale[:, 0])
            return g.one("DequantizeLinear", codes, scale, axis=1)
        pairs = weight.codes.view(np.uint8) & np.uint8(15)  # two's complement, as INT4 has it
        packed = pairs[:, 0::2] | (pairs[:, 1::2] << np.uint8(4))
        codes = g.weight(f"{name}.codes", packed, int4=True)
        scale = g.weight(f"{name}.scales", weight.scale)
        rows = g.one("DequantizeLinear", codes, scale, axis=1, block_size=weight.group)
        return g.one("Transpose", rows, perm=[1, 0])

    def embedding(self, ids: str, output: str, name: str, table: Matrix) -> None:
        g = self.graph
        if not isinstance(table, Codes):
            float_rows(g, ids, output, name, table)
            return
        codes = g.one("Gather", g.weight(f"{name}.codes", table.codes), ids, label=name)
        scale = g.one("Gather", g.weight(f"{name}.scales", table.scale), ids)
        g.node("Mul", [g.one("Cast", codes, to=FLOAT), scale], [output])

    def rms_norm(self, x: str, name: str, weight: Floats, eps: float) -> str:
        g = self.graph
        scale = g.weight(f"{name}.weight", weight)
        return g.one("RMSNormalization", x, scale, label=name, axis=-1, epsilon=eps)

    def add_rms_norm(
        self, x: str, y: str, name: str, weight: Floats, eps: float
    ) -> tuple[str, str]:
        total = self.graph.one("Add", x, y)
        return total, self.rms_norm(total, name, weight, eps)

    def swiglu(self, gate_up: str, width: int) -> str:
        g = self.graph
        gate, up = g.node("Split", [gate_up, g.ints(width, width)], 2, axis=-1)
        return g.one("Mul", self._silu(gate), up)

    def causal_conv(self, z: str, name: str, weight: Floats, bias: Floats, cache: Cache) -> str:
        g = self.graph
        y, _ = g.node(
            "CausalConvWithState",
            [
                g.one("Transpose", z, perm=[0, 2, 1]),
                g.weight(f"{name}.weight", weight),
                g.weight(f"{name}.bias", bias),
                cache.past,
            ],
            [f"{cache.present}:y", cache.present], label=name, activation="silu",
        )  # fmt: skip
        return g.one("Transpose", y, perm=[0, 2, 1])

    def time_step(self, dt_raw: str, name: str, dt_bias: Floats, a: Floats) -> tuple[str, str]:
        g = self.graph
        x = g.one("Add", dt_raw, g.weight(f"{name}.dt_bias", dt_bias))
        dt = g.one("Softplus", x, label=f"{name}.dt")
        return dt, g.one("Mul", dt, g.weight(f"{name}.a", a), label=f"{name}.decay")

    def ssd(self, q: str, k: str, v: str, decay: str, heads: int, cache: Cache) -> str:
        y, _ = self.graph.node(
            "LinearAttention", [q, k, v, cache.past, decay],
            [f"{cache.present}:y", cache.present], label="ssd",
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
        g = self.graph
        heads, kv_heads, dim = stack.num_attention_heads, stack.num_key_value_heads, stack.head_dim
        positions, before = self._positions.get(past_length) or self._add_positions(
            qkv, past_length
        )
        sizes = g.ints(heads * dim, kv_heads * dim, kv_heads * dim)
        q, k, v = (
            g.one("Transpose", g.one("Reshape", part, g.ints(0, 0, -1, dim)), perm=[0, 2, 1, 3])
            for part in g.node("Split", [qkv, sizes], 3, axis=-1)
        )
        q, k = (g.one("RotaryEmbedding", part, *rope, positions) for part in (q, k))
        for new, cache in ((k, key), (v, value)):
            if cache.kind != FLOAT:
                new = g.one("Cast", new, to=cache.kind)
            g.node("TensorScatter", [cache.past, new, past_length], [cache.present], axis=2)
        # Over the whole cache: what is not written yet is masked, as is what comes later.
        columns = g.one("Shape", key.past, start=2, end=3)
        columns = g.one("Range", *self._scalars(g.ints(0), columns, g.ints(1)))
        mask = g.one("LessOrEqual", columns, before)
        present = [
            cache.present if cache.kind == FLOAT else g.one("Cast", cache.present, to=FLOAT)
            for cache in (key, value)
        ]
        y = g.one("Attention", q, *present, mask, label="attention")
        return g.one("Reshape", g.one("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, 0, -1))

    def _add_positions(self, x: str, past_length: str) -> tuple[str, str]:
        """Positions of the new tokens, as (1, tokens) and as a column (tokens, 1)."""
        g = self.graph
        end = g.one("Add", past_length, g.one("Shape", x, start=1, end=2))
        positions = g.one("Range", *self._scalars(past_length, end, g.ints(1)))
        made = g.one("Unsqueeze", positions, g.ints(0)), g.one("Unsqueeze", positions, g.ints(1))
        self._positions[past_length] = made
        return made

    def _scalars(self, *values: str) -> list[str]:
        return [self.graph.one("Squeeze", value, self.graph.ints(0)) for value in values]

    def _silu(self, x: str) -> str:
        return self.graph.one("Mul", x, self.graph.one("Sigmoid", x))

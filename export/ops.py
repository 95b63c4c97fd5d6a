"""What the graphs are made of: one protocol, written in two dialects.

`ops_fused.py` speaks ONNX Runtime's com.microsoft operators, `ops_standard.py` plain ONNX of opset
27. Values are names in a `GraphWriter`; shapes are given as (batch = 1, tokens, width).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import StackConfig
from mmmamba_edge.export.graph_writer import FLOAT, FLOAT16, GraphWriter
from mmmamba_edge.quant.codes import Codes

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Matrix = Floats | Halves | Codes


@dataclass(frozen=True)
class Cache:
    """The names under which one state tensor enters and leaves the graph."""

    past: str
    present: str
    kind: int = FLOAT  # element type


class Ops(Protocol):
    """One dialect, bound to the graph it writes into."""

    name: str
    opset: dict[str, int]
    settings: dict[str, Any]  # what the manifest says about choices that change the numbers

    def __init__(self, graph: GraphWriter): ...

    def linear(self, x: str, name: str, weight: Matrix, bias: Floats | None = None) -> str:
        """x (1, tokens, columns) times weight (rows, columns) transposed: (1, tokens, rows).

        A float16 weight is multiplied in float16; x and the result are float32 all the same.
        """
        ...

    def embedding(self, ids: str, output: str, name: str, table: Matrix) -> None:
        """Rows of a table: ids (1, tokens) int64 -> `output` (1, tokens, columns)."""
        ...

    def rms_norm(self, x: str, name: str, weight: Floats, eps: float) -> str:
        """x / rms(x) * weight over the last axis."""
        ...

    def add_rms_norm(
        self, x: str, y: str, name: str, weight: Floats, eps: float
    ) -> tuple[str, str]:
        """x + y, and its norm."""
        ...

    def swiglu(self, gate_up: str, width: int) -> str:
        """(1, tokens, 2 width) -> SiLU(first half) * second half."""
        ...

    def causal_conv(self, z: str, name: str, weight: Floats, bias: Floats, cache: Cache) -> str:
        """Depthwise conv over time, then SiLU: (1, tokens, channels) both ways.

        `weight` (channels, 1, kernel); the cache is (1, channels, kernel - 1).
        """
        ...

    def time_step(self, dt_raw: str, name: str, dt_bias: Floats, a: Floats) -> tuple[str, str]:
        """dt = softplus(dt_raw + dt_bias) and dt * a, both (1, tokens, heads)."""
        ...

    def ssd(self, q: str, k: str, v: str, decay: str, heads: int, cache: Cache) -> str:
        """S = exp(decay) S + k v^T, y = S^T q for each token and head.

        q, k, v (1, tokens, heads * head_dim), v already times dt; decay (1, tokens, heads), in log
        space; the cache is (1, heads, key_dim, value_dim). Gives (1, tokens, heads * head_dim).
        """
        ...

    def gated_norm(self, y: str, gate: str, name: str, weight: Floats, eps: float) -> str:
        """RMS norm over each head, times SiLU(gate): (1, tokens, heads * head_dim).

        `weight` (head_dim,), shared by the heads, or (heads, head_dim) after a fold.
        """
        ...

    def attention(
        self, qkv: str, stack: StackConfig, past_length: str, rope: tuple[str, str],
        key: Cache, value: Cache,
    ) -> str:  # fmt: skip
        """Causal attention with RoPE over a preallocated cache.

        Args:
            qkv: (1, tokens, heads + 2 kv_heads times head_dim), queries first, then keys, values.
            stack: head counts and sizes.
            past_length: (1,) int64, tokens that the cache holds.
            rope: cosines and sines, each (max_context, head_dim / 2).
            key: (1, kv_heads, max_context, head_dim), float32 or float16; tokens are written
                behind `past_length`.
            value: likewise.

        Returns:
            (1, tokens, heads * head_dim).
        """
        ...


# --- what both dialects say alike ---------------------------------------------------------------


def float_product(g: GraphWriter, x: str, name: str, weight: Floats | Halves) -> str:
    """`Ops.linear` of a matrix that is not in codes."""
    matrix = g.weight(f"{name}.weight", weight.T)
    if weight.dtype != np.float16:
        return g.one("MatMul", x, matrix, label=name)
    half = g.one("MatMul", g.one("Cast", x, to=FLOAT16), matrix, label=name)
    return g.one("Cast", half, to=FLOAT)


def float_rows(g: GraphWriter, ids: str, output: str, name: str, table: Floats | Halves) -> None:
    """`Ops.embedding` of a table that is not in codes."""
    rows = g.weight(f"{name}.weight", table)
    if table.dtype != np.float16:
        g.node("Gather", [rows, ids], [output], label=name)
        return
    g.node("Cast", [g.one("Gather", rows, ids, label=name)], [output], to=FLOAT)

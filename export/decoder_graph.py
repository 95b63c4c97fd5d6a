"""The decoder: vectors and state in, logits and state out; one graph for prefill and decode.

    inputs_embeds (1, tokens, hidden), logits_to_keep (1,), past_length (1,) if a layer attends,
    past_state.{i}.conv / .ssm / .key / .value
    -> logits (1, kept, vocab_size), present_state.{i}...

`logits_to_keep` is for how many last positions the head runs; 0: all of them. FORMAT.md has the
names as a contract.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.export.graph_writer import FLOAT, FLOAT16, INT64, GraphWriter
from mmmamba_edge.export.ops import Cache, Ops
from mmmamba_edge.export.weights import HEAD, Weights
from mmmamba_edge.manifest import StateTensor, is_cache
from mmmamba_edge.model.layers import rope_tables
from mmmamba_edge.model.mixer import G_NORM_EPS
from mmmamba_edge.quant.codes import take_rows
from mmmamba_edge.status import Report, silent

KINDS = {"float32": FLOAT, "float16": FLOAT16}  # dtypes of state tensors


def state_layout(
    config: Config, max_context: int | None, cache: str = "float32"
) -> tuple[StateTensor, ...]:
    """The decoder's state tensors, in graph order; `cache`: dtype of keys and values."""
    return tuple(
        StateTensor(f"{layer}.{name}", (1, *shape), cache if is_cache(name) else "float32")
        for layer in range(len(config.layer_types))
        for name, shape in config.state_shapes(layer, max_context or 0).items()
    )


def write_decoder(
    graph: GraphWriter, ops: Ops, weights: Weights, max_context: int | None,
    cache: str = "float32", say: Report = silent,
) -> None:  # fmt: skip
    """Write the decoder into `graph`.

    Args:
        graph: empty.
        ops: the dialect, bound to `graph`.
        weights: of the checkpoint.
        max_context: tokens that the attention caches are made for; None without such layers.
        cache: dtype of those caches.
        say: told how many layers are written.
    """
    config, layout = weights.config, state_layout(weights.config, max_context, cache)
    x = graph.input("inputs_embeds", FLOAT, [1, "tokens", config.hidden_size])
    keep = graph.input("logits_to_keep", INT64, [1])
    attends = "attention" in config.layer_types
    past_length = graph.input("past_length", INT64, [1]) if attends else ""
    caches: dict[str, Cache] = {}
    for tensor in layout:
        past, present = f"past_state.{tensor.name}", f"present_state.{tensor.name}"
        caches[tensor.name] = Cache(past, present, KINDS[tensor.dtype])
        graph.input(past, KINDS[tensor.dtype], list(tensor.shape))

    stream = _Stream(graph, ops, weights, x)
    ropes: dict[StackConfig, tuple[str, str]] = {}
    first_llm, last = len(config.embedding.layer_types), len(config.layer_types) - 1
    for layer, kind in enumerate(config.layer_types):
        say("writing decoder.onnx: layer", layer, last + 1)
        stack, prefix = config.stack_of(layer), weights.prefix(layer)
        if layer == first_llm and config.normalize_encoder_output:
            stream.normalize()
        u = stream.norm(f"{prefix}attention_norm.weight", stack.rms_norm_eps)
        if kind == "mamba2":
            own = caches[f"{layer}.conv"], caches[f"{layer}.ssm"]
            y = _mixer(graph, ops, weights, f"{prefix}attention.", stack, u, *own)
        else:
            if stack not in ropes:
                assert max_context is not None
                ropes[stack] = _rope(graph, stack, max_context, f"rope.{len(ropes)}")
            own = caches[f"{layer}.key"], caches[f"{layer}.value"]
            y = _attention(
                ops, weights, f"{prefix}attention.", stack, u, past_length, ropes[stack], *own
            )
        stream.add(y)
        if layer == last:  # nothing below mixes positions: go on with those that are asked for
            stream.keep_last(keep)
        u = stream.norm(f"{prefix}ffn_norm.weight", stack.rms_norm_eps)
        stream.add(_feed_forward(ops, weights, f"{prefix}feed_forward.", stack, u))
    u = stream.norm("language_model.model.norm.weight", config.llm.rms_norm_eps)
    say("writing decoder.onnx: head")
    logits = ops.linear(u, "head", weights.matrix(HEAD))
    graph.rename(logits, "logits")

    graph.output("logits", FLOAT, [1, "kept", config.vocab_size])
    for tensor in layout:
        graph.output(caches[tensor.name].present, KINDS[tensor.dtype], list(tensor.shape))


class _Stream:
    """The residual stream: what is added last waits, so that add and norm are one operator."""

    def __init__(self, graph: GraphWriter, ops: Ops, weights: Weights, x: str):
        self.graph, self.ops, self.weights = graph, ops, weights
        self.x = x
        self.waiting: str | None = None

    def add(self, y: str) -> None:
        """Add a layer's output."""
        assert self.waiting is None
        self.waiting = y

    def norm(self, name: str, eps: float) -> str:
        """RMS norm of the stream, with the weight `name`."""
        weight, label = self.weights.tensor(name), name.removesuffix(".weight")
        if self.waiting is None:
            return self.ops.rms_norm(self.x, label, weight, eps)
        self.x, normed = self.ops.add_rms_norm(self.x, self.waiting, label, weight, eps)
        self.waiting = None
        return normed

    def normalize(self) -> None:
        """Divide each vector by its L2 norm, between the halves (spec 1.2)."""
        g = self.graph
        if self.waiting is not None:
            self.x = g.one("Add", self.x, self.waiting)
            self.waiting = None
        length = g.one("ReduceL2", self.x, g.ints(-1), label="normalize_encoder_output", keepdims=1)
        self.x = g.one("Div", self.x, length)

    def keep_last(self, count: str) -> None:
        """Drop all positions but the last `count`; 0 keeps all."""
        g = self.graph
        start = g.one("Neg", count)
        end, axis = g.ints(np.iinfo(np.int64).max), g.ints(1)
        assert self.waiting is not None
        self.x = g.one("Slice", self.x, start, end, axis)
        self.waiting = g.one("Slice", self.waiting, start, end, axis)


def _mixer(
    g: GraphWriter, ops: Ops, weights: Weights, prefix: str, stack: StackConfig, u: str,
    conv: Cache, ssm: Cache,
) -> str:  # fmt: skip
    """A Mamba-2 mixer (spec 3.2, in the step form): (1, tokens, hidden) both ways."""
    hidden, heads, head_dim = stack.hidden_size, stack.num_attention_heads, stack.head_dim
    kv_heads, kv = stack.num_key_value_heads, stack.key_value_dim
    groups = heads // kv_heads
    label = prefix.removesuffix(".")

    names = [f"{prefix}{name}_proj.weight" for name in ("v", "k", "q", "g")]
    dt_name = f"{prefix}in_proj.weight"
    sizes = [stack.conv_dim, hidden, heads]
    if weights.quant == "none":  # one product for all; dt stays float32 under every other scheme
        fused = ops.linear(u, f"{label}.vkqgdt", weights.matrix(*names, dt_name))
        z, gate, dt_raw = g.node("Split", [fused, g.ints(*sizes)], 3, axis=-1)
    else:
        fused = ops.linear(u, f"{label}.vkqg", weights.matrix(*names))
        z, gate = g.node("Split", [fused, g.ints(*sizes[:2])], 2, axis=-1)
        dt_raw = ops.linear(u, f"{label}.dt", weights.tensor(dt_name))

    z = ops.causal_conv(
        z, f"{prefix}conv1d", weights.tensor(f"{prefix}conv1d.weight"),
        weights.tensor(f"{prefix}conv1d.bias"), conv,
    )  # fmt: skip
    v, k, q = g.node("Split", [z, g.ints(kv, kv, hidden)], 3, axis=-1)
    a = -np.exp(weights.tensor(f"{prefix}A_log_bias"))
    dt, decay = ops.time_step(dt_raw, label, weights.tensor(f"{prefix}dt_bias"), a)

    # Each kv head serves `groups` heads; for v, the product with dt does the repeating.
    flat = g.ints(1, -1, hidden)
    v = g.one("Reshape", v, g.ints(1, -1, kv_heads, 1, head_dim))
    v = g.one("Mul", v, g.one("Reshape", dt, g.ints(1, -1, kv_heads, groups, 1)))
    v = g.one("Reshape", v, flat)
    if groups > 1:
        k = g.one("Reshape", k, g.ints(1, -1, kv_heads, 1, head_dim))
        k = g.one("Reshape", g.one("Expand", k, g.ints(1, 1, 1, groups, 1)), flat)

    y = ops.ssd(q, k, v, decay, heads, ssm)
    norm = weights.tensor(f"{prefix}g_norm.weight")
    y = ops.gated_norm(y, gate, f"{prefix}g_norm", norm, G_NORM_EPS)
    return ops.linear(y, f"{label}.o_proj", weights.matrix(f"{prefix}o_proj.weight"))


def _attention(
    ops: Ops, weights: Weights, prefix: str, stack: StackConfig, u: str, past_length: str,
    rope: tuple[str, str], key: Cache, value: Cache,
) -> str:  # fmt: skip
    """An attention layer: (1, tokens, hidden) both ways."""
    rows = np.concatenate(unpacked_rows(stack))
    qkv = take_rows(weights.matrix(f"{prefix}wqkv.weight"), rows)
    packed = ops.linear(u, f"{prefix}qkv", qkv)
    y = ops.attention(packed, stack, past_length, rope, key, value)
    return ops.linear(y, f"{prefix}wo", weights.matrix(f"{prefix}wo.weight"))


def _feed_forward(ops: Ops, weights: Weights, prefix: str, stack: StackConfig, u: str) -> str:
    """w2(SiLU(w1 u) * w3 u)."""
    gate_up = weights.matrix(f"{prefix}w1.weight", f"{prefix}w3.weight")
    y = ops.swiglu(ops.linear(u, f"{prefix}w1w3", gate_up), stack.intermediate_size)
    return ops.linear(y, f"{prefix}w2", weights.matrix(f"{prefix}w2.weight"))


def unpacked_rows(stack: StackConfig) -> tuple[NDArray[np.int64], ...]:
    """Row numbers of wqkv, packed per kv head (spec 2.3), of all queries, all keys, all values."""
    groups = stack.num_attention_heads // stack.num_key_value_heads
    rows = np.arange(stack.hidden_size + 2 * stack.key_value_dim)
    packed = rows.reshape(stack.num_key_value_heads, groups + 2, stack.head_dim)
    return packed[:, :groups].ravel(), packed[:, -2].ravel(), packed[:, -1].ravel()


def _rope(g: GraphWriter, stack: StackConfig, max_context: int, name: str) -> tuple[str, str]:
    """Cosines and sines (max_context, head_dim / 2), by the model's own formula and rounding.

    Dynamic NTK needs no more: `max_context` stays where it still has the plain base.
    """
    positions = torch.arange(max_context)[None]
    half = stack.head_dim // 2
    cos, sin = rope_tables(positions, stack, None, torch.float32)
    return (
        g.weight(f"{name}.cos", cos[0, 0, :, :half].numpy()),
        g.weight(f"{name}.sin", sin[0, 0, :, :half].numpy()),
    )

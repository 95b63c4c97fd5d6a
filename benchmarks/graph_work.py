"""Parts of a full-width layer written in several ways: what a token and what a prompt cost.

    python benchmarks/graph_work.py

Each way is a graph of its own on ONNX Runtime's CPU provider; the median of many runs, ways taken
in turns. `export/ops_fused.py` has the ones that won.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from mmmamba_edge.bench import physical_cores

HIDDEN, CHANNELS, HEAD, MLP, VOCAB = 2048, 4096, 128, 8192, 92_553
COPIES = 8  # of a product's weights, taken one after the other: more than the caches hold
DOMAIN = "com.microsoft"

Way = tuple[list[Any], dict[str, list[Any]], dict[str, np.ndarray]]  # nodes, inputs, constants
_rng = np.random.default_rng(0)


def node(op: str, inputs: list[str], outputs: list[str], domain: str = "", **more: Any) -> Any:
    """One node."""
    return helper.make_node(op, inputs, outputs, domain=domain, **more)


def silu(x: str, y: str) -> Any:
    """SiLU as ONNX Runtime has it."""
    return node("QuickGelu", [x], [y], DOMAIN, alpha=1.0)


# --- the ways ------------------------------------------------------------------------------------


def conv_operator() -> Way:
    """CausalConvWithState."""
    inputs = {"z": [1, "t", CHANNELS], "past": [1, 1, CHANNELS]}
    op = node("CausalConvWithState", ["z", "w", "b", "past"], ["y", "last"], DOMAIN,
              activation="silu", channels_last=1)  # fmt: skip
    return [op], inputs, {"w": _random(CHANNELS, 1, 2), "b": _random(CHANNELS)}


def conv_plain() -> Way:
    """Concat, Slice, Mul, Add, QuickGelu."""
    inputs = {"z": [1, "t", CHANNELS], "past": [1, 1, CHANNELS]}
    nodes = [
        node("Concat", ["past", "z"], ["all"], axis=1),
        node("Slice", ["all", "0", "-1", "1"], ["before"]),
        node("Slice", ["all", "-1", "end", "1"], ["last"]),
        node("Mul", ["before", "w0"], ["a"]), node("Mul", ["z", "w1"], ["c"]),
        node("Add", ["a", "c"], ["d"]), node("Add", ["d", "b"], ["e"]), silu("e", "y"),
    ]  # fmt: skip
    constants = {name: _random(CHANNELS) for name in ("w0", "w1", "b")} | _integers()
    return nodes, inputs, constants


def norm_operator() -> Way:
    """GatedRMSNorm."""
    inputs = {"x": [1, "t", HIDDEN], "g": [1, "t", HIDDEN]}
    op = node("GatedRMSNorm", ["x", "w", "g"], ["y"], DOMAIN, activation="silu", epsilon=1e-5)
    return [op], inputs, {"w": _random(HEAD)}


def norm_plain() -> Way:
    """RMSNormalization by heads, QuickGelu, Mul."""
    inputs = {"x": [1, "t", HIDDEN], "g": [1, "t", HIDDEN]}
    nodes = [
        node("Reshape", ["x", "heads"], ["h"]),
        node("RMSNormalization", ["h", "w"], ["n"], axis=-1, epsilon=1e-5),
        node("Reshape", ["n", "flat"], ["f"]), silu("g", "s"), node("Mul", ["f", "s"], ["y"]),
    ]  # fmt: skip
    shapes = {"heads": np.array([0, 0, -1, HEAD]), "flat": np.array([0, 0, -1])}
    return nodes, inputs, {"w": _random(HEAD), **shapes}


def gate_up(together: bool) -> Callable[[], Way]:
    """The MLP's first two products, as one or as two."""

    def way() -> Way:
        nodes, constants = [], {"sizes": np.array([MLP, MLP])}
        for i in range(COPIES):
            parts = [("m", 2 * MLP)] if together else [("g", MLP), ("u", MLP)]
            for name, rows in parts:
                made, weights = product(f"{name}{i}", rows, HIDDEN, 4, 32)
                nodes.append(made)
                constants |= weights
            if together:
                nodes.append(node("Split", [f"m{i}", "sizes"], [f"g{i}", f"u{i}"], axis=-1))
            nodes += [silu(f"g{i}", f"s{i}"), node("Mul", [f"s{i}", f"u{i}"], [f"y{i}"])]
        return nodes, {"x": [1, "t", HIDDEN]}, constants

    return way


def down(bits: int, block: int) -> Callable[[], Way]:
    """A product of (2048, 8192) in some form."""

    def way() -> Way:
        nodes, constants = [], {}
        for i in range(COPIES):
            made, weights = product(f"y{i}", HIDDEN, MLP, bits, block)
            nodes.append(made)
            constants |= weights
        return nodes, {"x": [1, "t", MLP]}, constants

    return way


def product(name: str, rows: int, columns: int, bits: int, block: int) -> tuple[Any, dict]:
    """x times random codes, with int8 activations."""
    shape = (rows, columns // block, block * bits // 8)
    constants = {
        f"{name}.codes": _rng.integers(0, 256, shape, np.uint8),
        f"{name}.scales": np.full((rows, columns // block), 0.01, np.float32),
    }
    made = node("MatMulNBits", ["x", *constants], [name], DOMAIN, bits=bits, block_size=block,
                N=rows, K=columns, accuracy_level=4)  # fmt: skip
    return made, constants


WAYS: dict[str, dict[str, tuple[int, Callable[[], Way]]]] = {  # part -> way -> (copies, maker)
    "conv and SiLU": {
        "CausalConvWithState": (1, conv_operator), "plain operators": (1, conv_plain),
    },
    "gated norm": {"GatedRMSNorm": (1, norm_operator), "plain operators": (1, norm_plain)},
    "gate and up, int4": {
        "one product, Split": (COPIES, gate_up(True)), "two products": (COPIES, gate_up(False)),
    },
    "down projection": {
        "int4, groups of 32": (COPIES, down(4, 32)), "int4, groups of 64": (COPIES, down(4, 64)),
        "int4, groups of 128": (COPIES, down(4, 128)), "int8": (COPIES, down(8, 64)),
    },
}  # fmt: skip


# --- measuring -----------------------------------------------------------------------------------


def session(way: Way, threads: int) -> ort.InferenceSession:
    """A graph of one way; everything that nothing reads is an output."""
    nodes, inputs, constants = way
    read = {name for n in nodes for name in n.input}
    made = [name for n in nodes for name in n.output if name not in read]
    graph = helper.make_graph(
        nodes, "way",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, None) for k in made],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def measure(part: str, tokens: int, runs: int, threads: int) -> dict[str, float]:
    """Milliseconds of each way, for one copy."""
    opened = {name: (n, session(make(), threads)) for name, (n, make) in WAYS[part].items()}
    spent: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(runs + 2):
        for name, (copies, opened_session) in opened.items():
            feeds = {
                i.name: _random(*(tokens if d == "t" else d for d in i.shape))
                for i in opened_session.get_inputs()
            }
            began = time.perf_counter()
            opened_session.run(None, feeds)
            if turn >= 2:
                spent[name].append((time.perf_counter() - began) / copies * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


def _random(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape, dtype=np.float32)


def _integers() -> dict[str, np.ndarray]:
    return {str(i): np.array([i]) for i in (0, -1, 1)} | {"end": np.array([2**62])}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", default="1,256")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    counts = [int(part) for part in args.tokens.split(",")]
    facts = {}
    for part in WAYS:
        columns = {n: measure(part, n, args.runs, args.threads) for n in counts}
        facts[part] = {way: {n: columns[n][way] for n in counts} for way in WAYS[part]}
        if not args.json:
            for way, row in facts[part].items():
                figures = "".join(f"{row[n]:>10.3f} ms" for n in counts)
                print(f"{part:<20}{way:<24}{figures}", flush=True)
    if args.json:
        print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

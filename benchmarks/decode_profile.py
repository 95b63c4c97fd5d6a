"""Where a decoding step goes: which operators, and how much of it is Python.

    python benchmarks/decode_profile.py big/int4

The share of time outside ONNX Runtime is measured first, without a profiler; the operators then
with it, which costs each of them some microseconds.
"""

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mmmamba_edge.bench import physical_cores
from mmmamba_edge.runtimes import onnxruntime_runner
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner


def outside(runner: OnnxRuntimeRunner, steps: int) -> dict[str, float]:
    """Seconds of a step, and the share of it that is not spent in ONNX Runtime's run."""
    inside = [0.0]

    class Timed:
        def __init__(self, session: ort.InferenceSession) -> None:
            self._session = session

        def run_with_iobinding(self, binding: ort.IOBinding) -> None:
            began = time.perf_counter()
            self._session.run_with_iobinding(binding)
            inside[0] += time.perf_counter() - began

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    _, state = runner.prefill(np.arange(1, 9))
    runner.step(1, state)
    sessions = runner._decoder, runner._embed
    runner._decoder, runner._embed = Timed(sessions[0]), Timed(sessions[1])  # pyright: ignore
    whole, shares = [], []
    for token in range(1, steps + 1):
        inside[0], began = 0.0, time.perf_counter()
        runner.step(token, state)
        whole.append(time.perf_counter() - began)
        shares.append(1 - inside[0] / whole[-1])
    runner._decoder, runner._embed = sessions
    return {"step_s": statistics.median(whole), "outside_runtime": statistics.median(shares)}


def operators(bundle: Path, threads: int, steps: int, tokens: int) -> dict[str, float]:
    """Milliseconds of each kind of operator in a run of `tokens` tokens."""
    made = onnxruntime_runner.session_options
    with tempfile.TemporaryDirectory() as folder:

        def profiled(*args: Any) -> ort.SessionOptions:
            options = made(*args)
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/ort"
            return options

        onnxruntime_runner.session_options = profiled
        try:
            runner = OnnxRuntimeRunner(bundle, threads, verify=False)
        finally:
            onnxruntime_runner.session_options = made
        state = runner.new_state()
        onnxruntime_runner.PREFILL_CHUNK = max(tokens, onnxruntime_runner.PREFILL_CHUNK)
        for _ in range(steps + 1):  # the first one maps memory and does not count
            runner.prefill(np.arange(1, tokens + 1), state=state)
        events = json.loads(Path(runner._decoder.end_profiling()).read_text())
    kernels = [e for e in events if e.get("name", "").endswith("_kernel_time")]
    total: collections.Counter[str] = collections.Counter()
    for event in kernels[len(kernels) // (steps + 1) :]:
        total[event["args"]["op_name"]] += event["dur"] / 1e3 / steps
    return dict(total.most_common())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1, help="of a run: 1 is decoding")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    facts: dict[str, Any] = outside(
        OnnxRuntimeRunner(args.bundle, args.threads, verify=False), args.steps
    )
    facts["operators_ms"] = operators(args.bundle, args.threads, args.steps, args.tokens)
    if args.json:
        print(json.dumps(facts))
        return 0
    share = facts["outside_runtime"]
    print(f"a step: {1e3 * facts['step_s']:.2f} ms, {share:.2%} outside ONNX Runtime")
    whole = sum(facts["operators_ms"].values())
    for name, spent in facts["operators_ms"].items():
        print(f"{name:<36}{spent:>9.2f} ms{spent / whole:>8.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

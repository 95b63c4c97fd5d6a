"""Time per token and memory as a conversation grows: `python benchmarks/constant_state.py BUNDLE`.

One run: at each of several context lengths, the median time of the next tokens, the state's bytes
and the process's resident memory. For mmMamba-linear all three stay what they were.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import mmmamba_edge as mm
from mmmamba_edge.bench import resident_bytes


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time per token and memory as talk grows.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--contexts", default="100,1000,5000,20000")
    parser.add_argument("--tokens", type=int, default=200, help="timed at each context")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    runner = mm.open_bundle(args.bundle, threads=args.threads)
    rng = np.random.default_rng(0)
    ids = rng.integers(8, runner.config.vocab_size, 32, dtype=np.int64)
    _, state = runner.prefill(ids)
    rows = []
    for context in (int(n) for n in args.contexts.split(",")):
        while state.tokens < context:
            _, state = runner.step(int(ids[state.tokens % 32]), state)
            if state.tokens % 500 == 0:
                print(f"\r{state.tokens} tokens ", end="", file=sys.stderr, flush=True)
        times = []
        for i in range(args.tokens):
            start = time.perf_counter()
            _, state = runner.step(int(ids[i % 32]), state)
            times.append(time.perf_counter() - start)
        rows.append(
            {
                "context": context,
                "median_ms": 1000 * statistics.median(times),
                "state_bytes": state.nbytes,
                "rss_bytes": resident_bytes(),
            }
        )
    print(file=sys.stderr)
    facts = {
        "bundle": str(args.bundle),
        "quant": runner.quant,
        "threads": args.threads or "runtime's choice",
        "cores": os.cpu_count(),
        "timed_tokens": args.tokens,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    print({key: value for key, value in facts.items() if key != "rows"})
    print("| context | ms a token (median) | to the first | state bytes | RSS MiB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        ratio = row["median_ms"] / rows[0]["median_ms"]
        print(
            f"| {row['context']:,} | {row['median_ms']:.3f} | {ratio:.2f} | "
            f"{row['state_bytes']:,} | {row['rss_bytes'] / 2**20:.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

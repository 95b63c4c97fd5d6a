"""Time per token and memory as a conversation grows: `python benchmarks/constant_state.py BUNDLE`.

Each context is read once and its state put by; then the contexts decode in turns, so that a machine
that slows down slows all of them. For mmMamba-linear time, state and memory stay what they were.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import mmmamba_edge as mm
from mmmamba_edge.bench import physical_cores, resident_bytes
from mmmamba_edge.status import StatusLine

PIECE = 512  # tokens read between two lines of progress


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time per token and memory as talk grows.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--contexts", default="100,1000,5000,20000")
    parser.add_argument("--tokens", type=int, default=40, help="timed in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    runner = mm.open_bundle(args.bundle, threads=args.threads)
    rng = np.random.default_rng(0)
    ids = rng.integers(8, runner.config.vocab_size, PIECE, dtype=np.int64)
    ids[ids == runner.config.img_context_token_id] = 8
    _, warm = runner.prefill(ids)  # memory that the first reading makes is no context's
    for token in ids[:8]:
        _, warm = runner.step(int(token), warm)
    state, kept, rows = runner.new_state(), [], []
    contexts = [int(n) for n in args.contexts.split(",")]
    say, largest = StatusLine(), contexts[-1]
    for context in contexts:
        while state.tokens < context:
            part = ids[: min(PIECE, context - state.tokens)]
            _, state = runner.prefill(part, state=state)
            say("reading", state.tokens, largest)
        kept.append(state.copy())
        for token in ids[:8]:
            _, state = runner.step(int(token), state)
        ours = sum(other.nbytes for other in kept)  # only this comparison keeps them
        rows.append(
            {
                "context": context, "state_bytes": state.nbytes,
                "rss_bytes": resident_bytes() - ours,
                "allocated_bytes": resident_bytes("RssAnon") - ours,
            }
        )  # fmt: skip
    say.close()
    medians: list[list[float]] = [[] for _ in rows]
    for _ in range(args.turns):
        for times, put_by in zip(medians, kept, strict=True):
            own, spent = put_by.copy(), []
            for token in ids[: args.tokens]:
                began = time.perf_counter()
                _, own = runner.step(int(token), own)
                spent.append(time.perf_counter() - began)
            times.append(statistics.median(spent))
    for row, times in zip(rows, medians, strict=True):
        row["median_ms"] = 1e3 * statistics.median(times)
    facts = {
        "bundle": str(args.bundle), "quant": runner.quant, "threads": args.threads,
        "turns": args.turns, "tokens_a_turn": args.tokens, "rows": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts))
        return 0
    print({key: value for key, value in facts.items() if key != "rows"})
    print("| context | ms a token | speed of the first | state bytes | RSS MiB | allocated MiB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        ratio = rows[0]["median_ms"] / row["median_ms"]
        print(
            f"| {row['context']:,} | {row['median_ms']:.3f} | {ratio:.3f} | "
            f"{row['state_bytes']:,} | {row['rss_bytes'] / 2**20:.1f} | "
            f"{row['allocated_bytes'] / 2**20:.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

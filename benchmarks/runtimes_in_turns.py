"""Bundles of one model side by side, each on its own runtime, in turns within one process:

    python benchmarks/runtimes_in_turns.py build/smol-pte build/smol-onnx --prompt-tokens 512

Each turn reads the same random prompt with every bundle and decodes from there. Medians of the
turns; the first one, in which memory is found and weights are packed, is not counted.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.runtimes.base import Runner


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    runners = {
        str(path): open_bundle(path, threads=args.threads, verify=False) for path in args.bundles
    }
    turns = [
        {name: turn(runner, args.prompt_tokens, args.steps) for name, runner in runners.items()}
        for _ in range(args.turns + 1)
    ][1:]
    for name in runners:
        print(json.dumps({"bundle": name, "turns": len(turns), **_medians(turns, name)}))
    return 0


def turn(runner: Runner, prompt: int, steps: int) -> dict[str, float]:
    """Tokens a second of reading `prompt` tokens and of `steps` steps behind them."""
    ids = _ids(runner, prompt + steps + 1)
    began = time.perf_counter()
    _, state = runner.prefill(ids[:prompt])
    read = time.perf_counter() - began
    _, state = runner.step(int(ids[prompt]), state)
    began = time.perf_counter()
    for token in ids[prompt + 1 :]:
        _, state = runner.step(int(token), state)
    return {"prefill": prompt / read, "decode": steps / (time.perf_counter() - began)}


def _ids(runner: Runner, count: int) -> NDArray[np.int64]:
    words = np.setdiff1d(np.arange(runner.config.vocab_size), [runner.config.img_context_token_id])
    return np.random.default_rng(0).choice(words, count).astype(np.int64)


def _medians(turns: list[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for what in ("prefill", "decode"):
        values = [one[name][what] for one in turns]
        out[what] = round(statistics.median(values), 1)
        out[f"{what}_from_to"] = [round(min(values), 1), round(max(values), 1)]
    return out


if __name__ == "__main__":
    sys.exit(main())

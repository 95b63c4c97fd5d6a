"""How long a memory each state format can follow: `python benchmarks/state_formats.py`.

One head's recurrence (key_dim x value_dim), rounded to a format after every token, against float64.
Keys and values have a mean, as they have behind SiLU, so that a slow head's state grows large
beside what one token adds. The error is that of the head's answers y over the last tenth, relative
in the 2-norm. The limits of resting.py are read off this table.
"""

import argparse
import json
import sys

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.quant.check_state import FORMATS
from mmmamba_edge.status import StatusLine

KEY, VALUE = 32, 128
Floats = NDArray[np.float64]


def error(kind: str, memory: float, steps: int, seed: int = 0) -> float:
    """Relative error of y over the last tenth of `steps` tokens."""
    rng, rounded = np.random.default_rng(seed), FORMATS[kind]
    exact = np.zeros((1, KEY, VALUE))
    coarse = exact.astype(np.float32)
    wrong = right = 0.0
    for step in range(steps):
        q, k, v = (_silu(rng.standard_normal(n)) for n in (KEY, KEY, VALUE))
        dt = rng.uniform(0.5, 1.5)
        decay = np.exp(-dt / memory)
        write = dt * np.outer(k, v)
        exact = decay * exact + write
        coarse = rounded(np.float32(decay) * coarse + write.astype(np.float32))
        if step >= steps - steps // 10:
            y = q @ exact[0]
            wrong += float(np.square(q @ coarse[0].astype(np.float64) - y).sum())
            right += float(np.square(y).sum())
    return float(np.sqrt(wrong / right))


def _silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", default="256,1024,2048,4096,16384,65536", help="tokens")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--formats", default="int16,float16,bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    memories, kinds = [float(m) for m in args.memory.split(",")], args.formats.split(",")
    say, rows = StatusLine(), []
    for number, memory in enumerate(memories):
        say("memories", number, len(memories))
        rows.append({"memory": memory} | {k: error(k, memory, args.steps) for k in kinds})
    say.close()
    if args.json:
        print(json.dumps({"steps": args.steps, "rows": rows}))
        return 0
    print("| memory, tokens | " + " | ".join(kinds) + " |\n|" + "---|" * (len(kinds) + 1))
    for row in rows:
        errors = [f"{row[kind]:.1e}" for kind in kinds]
        print("| " + " | ".join([f"{row['memory']:,.0f}", *errors]) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

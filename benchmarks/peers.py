"""mmMamba's int4 bundle beside llama.cpp on this machine, turn by turn.

    python benchmarks/peers.py big/int4 --peer-python peers/bin/python \
        --peer big/transformer.gguf --contexts 512,32768

llama.cpp runs in an environment of its own (llama_peer.py says how to make it, and the GGUF files).
Both decode from the same number of tokens read, in turns, with as many threads; contexts are read
once and the state put back before each turn. With `--fill` the peer's cache is filled instead of
read (llama_peer.py, `fill`): reading 32,768 tokens takes it half an hour of two cores, and what is
timed is decoding. Ratios are of medians over the turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba_edge.bench import peak_bytes, physical_cores
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.runtimes.base import State
from mmmamba_edge.status import StatusLine

HERE = Path(__file__).parent
say = StatusLine()
REST = 0.5  # seconds between turns: the other side's threads stop spinning


class Ours:
    """A bundle, with a state put by."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self.runner = open_bundle(bundle, threads=threads, verify=False)
        self.rng = np.random.default_rng(0)
        self.saved: State = self.runner.new_state()

    def read(self, tokens: int) -> float:
        """Seconds to read that many more tokens; the state is put by."""
        began = time.perf_counter()
        _, self.saved = self.runner.prefill(self._ids(tokens), state=self.saved)
        return time.perf_counter() - began

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each token, from the state put by."""
        state, spent = self.saved.copy(), []
        for token in self._ids(tokens):
            began = time.perf_counter()
            _, state = self.runner.step(int(token), state)
            spent.append(time.perf_counter() - began)
        return spent

    def reset(self) -> None:
        """Nothing read."""
        self.saved = self.runner.new_state()

    def _ids(self, count: int) -> np.ndarray:
        ids = self.rng.integers(0, self.runner.config.vocab_size, count)
        ids[ids == self.runner.config.img_context_token_id] = 0
        return ids


class Peer:
    """llama.cpp in its own process."""

    def __init__(self, python: str, model: Path, context: int, threads: int, flash: str):
        command = (python, str(HERE / "llama_peer.py"), "serve", str(model))
        options = ("--context", str(context), "--threads", str(threads))
        options += ("--flash-attention", flash)
        self.process = subprocess.Popen(
            command + options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """One request, answered when it is done."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def read(self, tokens: int) -> float:
        """As `Ours.read`."""
        seconds = self.ask("prefill", tokens=tokens)["seconds"]
        self.ask("save")
        return seconds

    def decode(self, tokens: int) -> list[float]:
        """As `Ours.decode`."""
        self.ask("restore")
        return self.ask("decode", tokens=tokens)["each"]

    def reset(self) -> None:
        """Nothing read."""
        self.ask("reset")

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer has ended; its message is above")
        return json.loads(line)


def measure(ours: Ours, peer: Peer, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decoding of both, in turns."""
    facts: dict[str, Any] = {"prefill": {}, "decode": []}
    if args.prompt_tokens:
        spent: dict[str, list[float]] = {"ours": [], "peer": []}
        for turn in range(args.turns + 1):
            for name, side in (("ours", ours), ("peer", peer)):
                say(f"prefill of {args.prompt_tokens}: turn {turn} of {args.turns}, {name}")
                side.reset()
                spent[name].append(side.read(args.prompt_tokens))
                time.sleep(REST)
        ours_s, peer_s = (statistics.median(times[1:]) for times in spent.values())  # one to warm
        facts["prefill"] = {
            "tokens": args.prompt_tokens, "ours_tokens_per_s": args.prompt_tokens / ours_s,
            "peer_tokens_per_s": args.prompt_tokens / peer_s, "ratio": peer_s / ours_s,
        }  # fmt: skip
    ours.reset()
    peer.reset()
    read = 0
    for context in args.contexts:
        for name, side in (("ours", ours), ("peer", peer)):
            say(f"reading up to {context} tokens, {name}")
            if name == "peer" and args.fill:
                peer.ask("fill", tokens=context)
                continue
            if name == "peer" and read:
                peer.ask("restore")
            side.read(context - read)
        read = context
        medians: dict[str, list[float]] = {"ours": [], "peer": []}
        for turn in range(args.turns):
            for name, side in (("ours", ours), ("peer", peer)):
                say(f"decoding at {context}: turn {turn + 1} of {args.turns}, {name}")
                medians[name].append(statistics.median(side.decode(args.new_tokens)))
                time.sleep(REST)
        ours_s, peer_s = (statistics.median(times) for times in medians.values())
        facts["decode"].append(
            {
                "context": context, "ours_tokens_per_s": 1 / ours_s,
                "peer_tokens_per_s": 1 / peer_s, "ratio": peer_s / ours_s,
                "ours_turns_ms": [round(1e3 * t, 2) for t in medians["ours"]],
                "peer_turns_ms": [round(1e3 * t, 2) for t in medians["peer"]],
            }
        )  # fmt: skip
    facts["ours_peak_rss_bytes"] = peak_bytes()
    facts["peer_peak_rss_bytes"] = peer.ask("rss")["peak_rss_bytes"]
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """The figures for a terminal."""
    rows = [("", "ours tok/s", "peer tok/s", "ratio")]
    prefill = facts["prefill"]
    lines = [(f"prefill of {prefill['tokens']}", prefill)] if prefill else []
    lines += [(f"decoding at {row['context']:,}", row) for row in facts["decode"]]
    for name, row in lines:
        rows.append(
            (name, f"{row['ours_tokens_per_s']:.1f}", f"{row['peer_tokens_per_s']:.1f}",
             f"{row['ratio']:.2f}")
        )  # fmt: skip
    near, far = (facts[f"{side}_peak_rss_bytes"] / 2**20 for side in ("ours", "peer"))
    rows.append(("peak RSS, MiB", f"{near:,.0f}", f"{far:,.0f}", ""))
    return "\n".join(f"{a:<24}{b:>12}{c:>12}{d:>8}" for a, b, c, d in rows)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="GGUF file")
    parser.add_argument("--peer-python", required=True, help="of the peer's environment")
    parser.add_argument("--contexts", default="512", help="rising, e.g. 512,32768")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="0: no prefill")
    parser.add_argument("--new-tokens", type=int, default=24, help="decoded in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--flash-attention", default="auto", choices=("auto", "off", "on"))
    parser.add_argument("--fill", action="store_true", help="fill the peer's cache, read nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.contexts = [int(part) for part in args.contexts.split(",")]
    room = max(args.contexts[-1], args.prompt_tokens) + args.new_tokens + 512
    peer = Peer(args.peer_python, args.peer, room, args.threads, args.flash_attention)
    facts = measure(Ours(args.bundle, args.threads), peer, args)
    peer.close()
    say.close(keep=False)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`mmmamba-edge bench`: what a model costs on this machine: time, memory, bytes moved.

Contexts are reached by really reading that many tokens. Beside the decoding speed stands what the
memory allows: a token reads all weights of the decoder and the keys and values of the tokens
before it, reads and writes the rest of the state, and a probe measures how fast this machine reads,
with the same number of threads.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba_edge.bundle import DEFAULT_BUNDLE, read_manifest
from mmmamba_edge.errors import UserError
from mmmamba_edge.manifest import is_cache
from mmmamba_edge.runtimes import RUNTIME_NAMES, open_bundle
from mmmamba_edge.runtimes.base import Runner, State
from mmmamba_edge.status import Report, StatusLine, silent

WARM_STEPS = 5  # before decoding is timed
PROBE_BYTES = 256 << 20  # a thread; far above any cache


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("model", nargs="?", metavar="BUNDLE", type=Path,
        help="bundle folder (with --runtime torch: a checkpoint); default: the embedded model")
    add("--prompt-tokens", type=int, default=128, metavar="N",
        help="of the text whose reading is timed (default: %(default)s)")
    add("--new-tokens", type=int, default=64, metavar="N",
        help="timed at each context (default: %(default)s)")
    add("--context", default="0,1024", metavar="N,N,...",
        help="tokens read before decoding is timed, rising (default: %(default)s)")
    add("--tiles", default="1", metavar="N,N,...",
        help="tiles of the pictures whose first token is timed; empty: none (default: %(default)s)")
    add("--repeat", type=int, default=3, metavar="N",
        help="times that a reading is timed; the median counts (default: %(default)s)")
    add("--runtime", default="auto", choices=RUNTIME_NAMES)
    add("--provider", default="cpu", metavar="NAME", help="where it runs: cpu (default), cuda, ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)")
    add("--plot", type=Path, metavar="FILE", help="a PNG: decoding over context (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object")
    parser.epilog = "example: mmmamba-edge bench build/linear-int4 --context 0,1024,8192"
# fmt: on


def run(args: argparse.Namespace) -> int:
    """The verb."""
    contexts = _numbers(args.context, "--context", least=0)
    tiles = _numbers(args.tiles, "--tiles", least=1) if args.tiles else []
    for name in ("prompt_tokens", "new_tokens", "repeat"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a whole number above 0")
    status = StatusLine()
    facts = measure(
        args.model or DEFAULT_BUNDLE, runtime=args.runtime, threads=args.threads,
        provider=args.provider, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens,
        contexts=contexts, tiles=tiles, repeat=args.repeat, say=status,
    )  # fmt: skip
    status.close(keep=False)
    if args.plot:
        plot(facts, args.plot)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


def measure(
    model: Path, *, runtime: str = "auto", threads: int | None = None, provider: str = "cpu",
    prompt_tokens: int = 128, new_tokens: int = 64, contexts: list[int], tiles: list[int],
    repeat: int = 3, say: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """All figures as JSON: seconds, tokens a second, bytes.

    Args:
        model: a bundle, or a checkpoint for runtime "torch".
        runtime, threads, provider: as in `open_bundle`.
        prompt_tokens, new_tokens: read, and decoded, for each figure.
        contexts: rising, where decoding is timed.
        tiles: sizes of the pictures whose first token is timed.
        repeat: readings of which the median counts.
        say: told what is being measured.
    """
    say("reading memory")
    # In a process of its own: its memory would count as the model's peak.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        bandwidth = apart.submit(read_bandwidth, threads or physical_cores()).result()
    say("opening")
    with _timed() as opening:
        runner = open_bundle(model, runtime, threads, provider)
    facts: dict[str, Any] = {
        "model": str(model), "quant": runner.quant, "variant": runner.config.variant,
        "provider": provider, "threads": threads or physical_cores(),
        "machine": f"{platform.machine()} {_processor()}", "cores": os.cpu_count(),
        "open_s": opening[0], "read_bandwidth_gb_s": bandwidth / 1e9,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    text = _text_ids(runner, rng, prompt_tokens)
    say("reading text")
    reads = [_first_token(runner, text, None) for _ in range(repeat + 1)]
    first, warm = reads[0], statistics.median(reads[1:])
    facts["text"] = {
        "tokens": prompt_tokens, "first_token_s": warm, "cold_first_token_s": opening[0] + first,
        "prefill_tokens_per_s": prompt_tokens / warm,
    }  # fmt: skip
    facts["pictures"] = []
    for count in tiles:
        say(f"reading a picture of {count} tiles")
        facts["pictures"].append(_picture(runner, rng, count, repeat))
    weights = _decoder_bytes(model)
    state, facts["decode"] = runner.new_state(), []
    facts["state_bytes"] = state.nbytes
    for context in contexts:
        state = _read_to(runner, state, rng, context, say)
        say(f"decoding at {context} tokens")
        row = _decode(runner, state, text, new_tokens)
        if weights:
            moved = weights + _state_traffic(model, context)
            row |= {
                "bytes_per_token": moved,
                "share_of_bandwidth": moved * row["tokens_per_s"] / bandwidth,
            }
        facts["decode"].append({"context": context, **row, "rss_bytes": resident_bytes()})
    facts["peak_rss_bytes"] = peak_bytes()
    facts["bundle_bytes"] = _bundle_bytes(model)
    return facts


# --- what is timed ------------------------------------------------------------------------------


def _first_token(runner: Runner, ids: np.ndarray, pixels: np.ndarray | None) -> float:
    """Seconds from a prompt to the logits of its first answer token."""
    with _timed() as seconds:
        runner.prefill(ids, pixels)
    return seconds[0]


def _picture(
    runner: Runner, rng: np.random.Generator, tiles: int, repeat: int
) -> dict[str, float | int]:
    config = runner.config
    image = np.full(tiles * config.tokens_per_tile, config.img_context_token_id, np.int64)
    ids = np.concatenate([_text_ids(runner, rng, 4), image, _text_ids(runner, rng, 12)])
    shape = (tiles, 3, config.image_size, config.image_size)
    pixels = rng.standard_normal(shape, dtype=np.float32)
    seconds = [_first_token(runner, ids, pixels) for _ in range(repeat)]
    return {"tiles": tiles, "tokens": len(ids), "first_token_s": statistics.median(seconds)}


def _read_to(
    runner: Runner, state: State, rng: np.random.Generator, context: int, say: Report
) -> State:
    missing, read = context - state.tokens, state.tokens
    if missing > 0:
        _, state = runner.prefill(
            _text_ids(runner, rng, missing), state=state,
            progress=lambda done, _: say(f"reading up to {context} tokens:", read + done, context),
        )  # fmt: skip
    return state


def _decode(runner: Runner, state: State, ids: np.ndarray, count: int) -> dict[str, float]:
    """Single steps from a copy of the state: the next context goes on from where this one was."""
    own, seconds = state.copy(), []
    for i in range(WARM_STEPS + count):
        with _timed() as spent:
            _, own = runner.step(int(ids[i % len(ids)]), own)
        seconds.append(spent[0])
    seconds = sorted(seconds[WARM_STEPS:])
    median = statistics.median(seconds)
    return {
        "median_s": median, "p95_s": seconds[int(0.95 * (len(seconds) - 1))],
        "tokens_per_s": 1 / median,
    }  # fmt: skip


def _text_ids(runner: Runner, rng: np.random.Generator, count: int) -> np.ndarray:
    config = runner.config
    ids = rng.integers(0, config.vocab_size, count, dtype=np.int64)
    ids[ids == config.img_context_token_id] = 0
    return ids


@contextmanager
def _timed() -> Iterator[list[float]]:
    out: list[float] = []
    began = time.perf_counter()
    yield out
    out.append(time.perf_counter() - began)


# --- the machine --------------------------------------------------------------------------------


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that `threads` threads read together from memory; the best of some rounds."""
    parts = [np.ones(PROBE_BYTES // 4, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            with _timed() as seconds:
                list(pool.map(np.maximum.reduce, parts))  # NumPy lets go of the interpreter
            best = max(best, threads * PROBE_BYTES / seconds[0])
    return best


def physical_cores() -> int:
    """Cores this process may use; of two that share one, one (Linux), which runtimes default to."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if usable is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(path.read_text() if path.is_file() else str(cpu))
    return len(cores)


def resident_bytes(part: str = "VmRSS") -> int:
    """Resident memory of this process; 0 where the system does not say.

    Args:
        part: Linux's name (proc_pid_status(5)): "VmRSS", all; "RssAnon", what was allocated;
            "RssFile", pages of mapped files, which the system takes back and reads again as it
            likes.
    """
    try:
        return _kilobytes(Path("/proc/self/status").read_text(), part)
    except (OSError, StopIteration):
        return 0


def peak_bytes() -> int:
    """The most memory this process had resident; 0 where the system does not say."""
    try:  # Linux: getrusage counts what the parent held when it started this process
        status = Path("/proc/self/status").read_text()
        return _kilobytes(status, "VmHWM")
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(status: str, name: str) -> int:
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


def _decoder_bytes(model: Path) -> int:
    """Bytes of the weights that every token reads; 0 for what is not a bundle."""
    if not (model / "manifest.json").is_file():
        return 0
    files = read_manifest(model).files
    return sum(file.bytes for name, file in files.items() if name.startswith("decoder."))


def _state_traffic(model: Path, context: int) -> int:
    """Bytes of the state that a token moves: caches are read as far as they are filled."""
    manifest = read_manifest(model)
    room = manifest.max_context or 1
    return sum(
        tensor.nbytes * context // room if is_cache(tensor.name) else 2 * tensor.nbytes
        for tensor in manifest.state
    )


def _bundle_bytes(model: Path) -> int:
    if not (model / "manifest.json").is_file():
        return 0
    return sum(file.bytes for file in read_manifest(model).files.values())


# --- what is shown ------------------------------------------------------------------------------


def as_text(facts: dict[str, Any]) -> str:
    """The figures for a terminal."""
    text = facts["text"]
    lines = [
        f"{facts['model']}: {facts['variant']}, {facts['quant']}, {facts['threads']} threads of "
        f"{facts['machine']}, {facts['provider']}",
        f"first token   {text['first_token_s'] * 1e3:,.0f} ms after {text['tokens']} tokens of "
        f"text; {text['cold_first_token_s']:.2f} s from a cold start",
    ]
    lines += [
        f"              {p['first_token_s'] * 1e3:,.0f} ms after a picture of {p['tiles']} "
        f"{'tile' if p['tiles'] == 1 else 'tiles'} ({p['tokens']:,} tokens)"
        for p in facts["pictures"]
    ]
    mib = 2**20
    lines += [
        f"prefill       {text['prefill_tokens_per_s']:,.0f} tokens/s",
        f"memory        {facts['peak_rss_bytes'] / mib:,.0f} MiB at most, "
        f"bundle {facts['bundle_bytes'] / mib:,.0f} MiB, state {facts['state_bytes'] / 1024:,.0f} "
        "KiB",
        "",
        "  context  tokens/s  median ms  p95 ms   RSS MiB  of the memory's speed",
    ]
    for row in facts["decode"]:
        share = row.get("share_of_bandwidth")
        lines.append(
            f"{row['context']:>9,}  {row['tokens_per_s']:>8,.1f}  {row['median_s'] * 1e3:>9.2f}  "
            f"{row['p95_s'] * 1e3:>6.2f}  {row['rss_bytes'] / mib:>8,.0f}  "
            + (f"{share:.0%} of {facts['read_bandwidth_gb_s']:.1f} GB/s" if share else "")
        )
    return "\n".join(lines)


def plot(facts: dict[str, Any], path: Path) -> None:
    """Decoding speed and memory over context, as a PNG."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = [row["context"] for row in facts["decode"]]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    speed.plot(contexts, [row["tokens_per_s"] for row in facts["decode"]], "o-")
    speed.set(xlabel="context (tokens)", ylabel="tokens/s", title="decoding", ylim=(0, None))
    memory.plot(contexts, [row["rss_bytes"] / 2**20 for row in facts["decode"]], "o-")
    memory.set(xlabel="context (tokens)", ylabel="MiB", title="resident memory", ylim=(0, None))
    for axis in (speed, memory):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{facts['variant']}, {facts['quant']}, {facts['threads']} threads")
    from mmmamba_edge.whole import new_file

    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)


def _numbers(text: str, flag: str, *, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text!r}: expected numbers like 0,1024,8192") from None
    if min(numbers) < least or numbers != sorted(numbers):
        raise UserError(f"{flag} {text!r}: expected rising numbers from {least} on")
    return numbers

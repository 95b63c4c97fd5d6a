"""Next-token latency, prefill and memory over context, beside HoVLE.

    python benchmarks/long_context.py --size full --device cuda --json long.json --plot long.png
    python benchmarks/long_context.py                      # small, on a CPU: tests the command

Batch 1, random weights in bfloat16 (float32 on a CPU), released shapes. In a process each:

    original  HoVLE as its code runs it: growing cache, eager (hovle_decoding.Growing);
              ways "repeat" (its eager attention) and "flash" (its flash attention)
    static    HoVLE with a static cache in a CUDA graph; ways "plain" (PyTorch's operations, flash
              attention) and "fused" (our kernels); the faster one counts
    hybrid    mmMamba-hybrid, "head-interleaved 8"; "plain" PyTorch and "fused", in a CUDA graph
    linear    mmMamba-linear, the same

A context is read for real, in chunks, going on from the one before; then each way decodes (events
on the device; the median of --tokens after 5). The floor is the bytes a token must move (weights of
its layers and head, filled cache rows, states read and written) over the fastest of several reads
that the same process makes. The JSON is rewritten after every row: a kill loses nothing.

On one H100 it should all take about 200 s (an estimate): 4 starts with weights of 10 s, compiling
and tuning 90 s, ours and mamba-ssm's, nearly all of it kept in Triton's cache for the next run;
prefill up to 128 K tokens 9 s a HoVLE, 4 and 3 s ours; decoding 25 s, of which 20 the original's.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from full_size import full_config
from hovle_decoding import Growing, StaticStep

from mmmamba_edge.config import Config
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.distill.student import attention_layers
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.decoder import DecoderState, MMMamba
from mmmamba_edge.model.fused_step import FusedStep, Launch, why_not_fused
from mmmamba_edge.model.layers import AttentionState
from mmmamba_edge.model.recorded_step import RecordedStep
from mmmamba_edge.model.step_tuning import tuned
from mmmamba_edge.status import StatusLine
from mmmamba_edge.whole import new_file

MODELS = {  # model -> its attention layers
    "original": "head-stacked {}", "static": "head-stacked {}",
    "hybrid": "head-interleaved 8", "linear": "none",
}  # fmt: skip
CONTEXTS = {
    "small": "64,128,192",
    "full": ",".join(str(1024 * k) for k in (1, 4, 8, 16, 32, 64, 103, 128)),
}
WARM = 5  # tokens before the timed ones
PROBE_BYTES = 2 << 30


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--size", choices=CONTEXTS, default="small")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--contexts", help="tokens, rising (default: 1K to 128K; small: 64 to 192)")
    add("--models", default="linear,original,static,hybrid", help="in this order")
    add("--kernels", default="fused,plain", help="of static, hybrid and linear")
    add("--attention", default="repeat,flash", help="of the original")
    add("--tokens", type=int, default=30, help="timed at each context")
    add("--chunk", type=int, default=2048, help="tokens read at a time")
    add("--no-tune", action="store_true", help="launch the kernels as the runtime does")
    add("--no-pdl", action="store_true", help="no overlapping kernels (programmatic launch)")
    add("--json", type=Path, metavar="FILE", help="rewritten after every row")
    add("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    contexts = [int(n) for n in (args.contexts or CONTEXTS[args.size]).split(",")]
    models = args.models.split(",")
    if unknown := set(models) - set(MODELS):
        raise UserError(f"--models: {sorted(unknown)} are unknown; known are {', '.join(MODELS)}")
    case = {
        "size": args.size, "device": args.device, "contexts": contexts, "tokens": args.tokens,
        "chunk": args.chunk, "kernels": args.kernels.split(","), "tune": not args.no_tune,
        "attention": args.attention.split(","), "pdl": not args.no_pdl,
    }  # fmt: skip
    facts: dict[str, Any] = {"torch": torch.__version__, **case, "about": {}, "rows": []}
    for model in models:
        for row in _alone(model=model, **case):
            if row["kind"] == "about":
                facts["about"][model] = row
            else:
                facts["rows"].append(row)
                print(_line(row), file=sys.stderr, flush=True)
            if args.json:
                with new_file(args.json) as part:
                    part.write_text(json.dumps(facts, indent=1))
    print(as_text(facts))
    if args.plot:
        plot(facts, args.plot)
    return 0


def _alone(**case: Any) -> Iterator[dict[str, Any]]:
    """Rows of one model from a fresh process, as they come; what kills it ends only its rows."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs,), kwargs=case)
    process.start()
    theirs.close()
    try:
        while True:
            yield ours.recv()
    except EOFError:
        process.join()
    if process.exitcode:
        yield {"kind": "error", "model": case["model"], "error": f"exit code {process.exitcode}"}


def _send(rows: Connection, **case: Any) -> None:
    try:
        for row in measure(**case):
            rows.send(row)
    except torch.OutOfMemoryError as error:
        message = str(error).partition("\n")[0]
        rows.send({"kind": "error", "model": case["model"], "error": message})


# --- one model ----------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    *, model: str, size: str, device: str, contexts: list[int], tokens: int, chunk: int,
    kernels: list[str], attention: list[str], tune: bool, pdl: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """An "about" row of the model and device, then a row for each context and way."""
    began, say = time.perf_counter(), StatusLine()
    say(f"{model}: how fast memory is read")
    speed = read_bandwidth(device)
    say(f"{model}: making weights")
    built = build(model, size, device)
    case = (
        Original(built, attention)
        if model == "original"
        else Cached(built, kernels, Launch(pdl=pdl), tune, say)
    )
    weights = sum(p.nbytes for p in built.parameters()) + case.unused_bytes
    yield {
        "kind": "about", "model": model, "read_bandwidth_gb_s": speed / 1e9,
        "weights_bytes": weights,
        "read_weights_bytes": read_weights(built), "seconds_to_start": time.perf_counter() - began,
        "launch": asdict(case.launch) if case.launch else None, "ways": case.ways,
        "card": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip
    random = torch.Generator(device).manual_seed(1)
    ids = torch.randint(
        8, built.config.vocab_size // 2, (1, chunk), device=device, generator=random
    )
    say(f"{model}: compiling what reads prompts")
    case.warm(ids)
    read_s = 0.0
    for context in contexts:
        say(f"{model}: reading up to {context} tokens")
        case.make_room(context + (len(case.ways) + 1) * (WARM + tokens))
        _reset_peak(device)
        started = time.perf_counter()
        while (missing := context - case.tokens) > 0:
            case.read(ids[:, :missing])
        _wait(device)
        read_s += time.perf_counter() - started
        prefill = _peak(device)
        for way in case.ways:
            say(f"{model}, {way}: decoding at {context} tokens")
            at = case.tokens
            _reset_peak(device)
            step = case.step(way)
            milliseconds = _times(step, ids[0], tokens, device)
            del step
            decode, held = _peak(device), case.state_bytes(at)
            moved = read_weights(built) + held["read"] + held["written"]
            median = statistics.median(milliseconds)
            yield {
                "kind": "row", "model": model, "way": way, "context": context, "at": at,
                "median_ms": median, "best_ms": min(milliseconds),
                "p90_ms": sorted(milliseconds)[int(0.9 * (tokens - 1))],
                "moved_bytes": moved, "floor_ms": 1e3 * moved / speed,
                "over_floor": median * speed / moved / 1e3,
                "prefill_s": read_s, "prefill_tokens_per_s": context / read_s,
                "prefill_peak": prefill, "decode_peak": decode,
                "memory": {
                    "weights": weights, "cache": held["cache"], "state": held["state"],
                    "rest": decode["allocated"] - held["cache"] - held["state"] - weights,
                },
            }  # fmt: skip
    say.close(keep=False)


class Original:
    """HoVLE as the original runs it."""

    launch = None

    def __init__(self, model: MMMamba, attention: list[str]):
        self.ways = attention
        self._inner = Growing(model)
        self.unused_bytes = self._inner.unused.nbytes

    @property
    def tokens(self) -> int:
        return self._inner.tokens

    def warm(self, ids: torch.Tensor) -> None:
        """Read once and forget."""
        Growing(self._inner.model).read(ids)

    def make_room(self, capacity: int) -> None:
        """Nothing: its cache grows."""

    def read(self, ids: torch.Tensor) -> None:
        self._inner.attention = "flash"
        self._inner.read(ids)

    def step(self, way: str) -> Callable[[torch.Tensor], torch.Tensor]:
        self._inner.attention = way
        return lambda token: self._inner.read(token[None])

    def state_bytes(self, at: int) -> dict[str, int]:
        cache = sum(k.nbytes + v.nbytes for k, v in self._inner.past)
        row = cache // self.tokens
        return {"cache": cache, "state": 0, "read": at * row, "written": row}


class Cached:
    """Models with a preallocated state: HoVLE, hybrid or linear, decoding in one or two ways."""

    unused_bytes = 0

    def __init__(
        self, model: MMMamba, kernels: list[str], launch: Launch, tune: bool, say: StatusLine
    ):
        self._model, self._static = model, model.config.variant == "teacher"
        self.ways, self.launch, self._fused = list(kernels), None, None
        if "fused" in kernels and (reason := why_not_fused(model)):
            say(f"no fused kernels: {reason}")
            self.ways.remove("fused")
        if self._static and "fused" in self.ways:  # at one position, then at growing ones
            self.ways.sort(reverse=True)
        if "fused" in self.ways:
            self._fused = FusedStep(model, launch)
            if tune and self._fused.device.type == "cuda":
                tuned(self._fused, say)
            self.launch = self._fused.how
        self._state = model.new_state(1, max_context=1)

    @property
    def tokens(self) -> int:
        return int(self._state.length[0])

    def warm(self, ids: torch.Tensor) -> None:
        """Read once and forget."""
        self._model.prefill(ids, self._model.new_state(1, max_context=ids.shape[1]))

    def make_room(self, capacity: int) -> None:
        """The attention caches for `capacity` tokens, as if this were the only context."""
        for layer in self._state.layers:
            if isinstance(layer, AttentionState):
                for name in ("key", "value"):
                    old = getattr(layer, name)
                    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                    new[:, :, : self.tokens] = old[:, :, : self.tokens]
                    setattr(layer, name, new)
        gc.collect()

    def read(self, ids: torch.Tensor) -> None:
        self._model.prefill(ids, self._state)

    def step(self, way: str) -> Callable[[torch.Tensor], torch.Tensor]:
        if way == "fused":
            assert self._fused is not None
            fused, recorded = self._fused, RecordedStep(self._fused, self._state)
            return lambda token: _fed(fused.token, token, lambda: recorded.replay(self._state))
        if self._static:
            static = StaticStep(self._model, self._state)
            return lambda token: _fed(static.token, token, static.replay)
        return lambda token: self._model.step(token, self._state)[0]

    def state_bytes(self, at: int) -> dict[str, int]:
        return _state_bytes(self._state, at)


def _fed(
    place: torch.Tensor, token: torch.Tensor, replay: Callable[[], torch.Tensor]
) -> torch.Tensor:
    place.copy_(token.view_as(place))
    return replay()


def _state_bytes(state: DecoderState, at: int) -> dict[str, int]:
    """Bytes a state holds, and those that a token at position `at` reads and writes."""
    cache = held = read = written = 0
    for layer in state.layers:
        size = sum(t.nbytes for t in layer.tensors().values())
        if isinstance(layer, AttentionState):
            row = size // layer.key.shape[2]
            cache, read, written = cache + size, read + at * row, written + row
        else:
            held, read, written = held + size, read + size, written + size
    return {"cache": cache, "state": held, "read": read, "written": written}


def build(model: str, size: str, device: str) -> MMMamba:
    """The model with random weights, made on the device."""
    config = full_config()
    if size == "small":
        config = _small(config)
    total = len(config.layer_types)
    kept = attention_layers(MODELS[model].format(total), total)
    config = config.with_attention_layers(kept)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            return from_scratch(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def _small(config: Config) -> Config:
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return replace(
        config, vocab_size=512, img_context_token_id=5, eos_token_id=2, image_size=28,
        embedding=replace(config.embedding, **sizes, layer_types=("attention",) * 2),
        llm=replace(config.llm, **sizes, layer_types=("attention",) * 6),
    )  # fmt: skip


def read_weights(model: MMMamba) -> int:
    """Bytes of the weights that a token reads: layers, last norm, head, one row of the table."""
    language = model.language_model
    parts = [*model.layers, language.model.norm, language.output]
    row = model.embedding_model.llm_text_embeddings.weight[0].nbytes
    return row + sum(p.nbytes for part in parts for p in part.parameters())


# --- measuring ----------------------------------------------------------------------------------


def _times(
    step: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, count: int, device: str
) -> list[float]:
    """Milliseconds of each of `count` steps, after WARM more."""
    spent, marks = [], []
    for i in range(WARM + count):
        token = ids[i % len(ids)][None]
        if device == "cuda":
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            step(token)
            pair[1].record()
            marks.append(pair)
        else:
            began = time.perf_counter()
            step(token)
            spent.append(1e3 * (time.perf_counter() - began))
    _wait(device)
    return (spent or [a.elapsed_time(b) for a, b in marks])[WARM:]


def read_bandwidth(device: str) -> float:
    """Bytes a second: the fastest of a sum, a maximum, a product with a vector, and a copy."""
    size = PROBE_BYTES if device == "cuda" else PROBE_BYTES >> 4
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.rand(size // 4, device=device)
    matrix = x.view(dtype)[: size // dtype.itemsize].view(-1, 8192)
    vector = torch.ones(8192, device=device, dtype=dtype)
    out = torch.empty_like(x)
    ways = (
        (size, lambda _: x.sum()), (size, lambda _: x.amax()), (size, lambda _: matrix @ vector),
        (2 * size, lambda _: out.copy_(x)),
    )  # fmt: skip
    ids = torch.zeros(1, device=device)
    best = max(moved / min(_times(way, ids, 7, device)) for moved, way in ways)
    return 1e3 * best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> dict[str, int]:
    """Bytes; 0 on a CPU, where nobody counts them."""
    if device != "cuda":
        return {"allocated": 0, "reserved": 0}
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


# --- what is shown ------------------------------------------------------------------------------


def _line(row: dict[str, Any]) -> str:
    if row["kind"] == "error":
        return f"{row['model']}: {row['error']}"
    return (
        f"{row['model']:<9}{row['way']:<7}{row['context']:>8,}  {row['median_ms']:8.3f} ms  "
        f"{row['over_floor']:5.2f}x floor  {row['prefill_tokens_per_s']:8,.0f} tokens/s read  "
        f"{row['decode_peak']['allocated'] / 1e9:6.2f} GB"
    )


def as_text(facts: dict[str, Any]) -> str:
    """Three tables: latency with ratios, prefill and peaks, the arithmetic of memory."""
    rows = [row for row in facts["rows"] if row["kind"] == "row"]
    rows.sort(key=lambda row: (row["context"], list(MODELS).index(row["model"])))
    best = _best(rows)
    lines = []
    for name, about in facts["about"].items():
        lines.append(
            f"{name}: {about['card']}, reads {about['read_bandwidth_gb_s']:,.0f} GB/s, weights "
            f"{about['weights_bytes'] / 1e9:.2f} GB ({about['read_weights_bytes'] / 1e9:.2f} a "
            f"token), launches {about['launch']}"
        )
    lines += [
        "", "| context | model | kernels | ms a token | p90 | floor ms | over floor "
        "| original 'repeat' / it | original 'flash' / it | static / it |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        others = [("original", "repeat"), ("original", "flash"), ("static", None)]
        ratios = (_ratio(best, row, *other) for other in others)
        lines.append(
            f"| {row['context']:,} | {row['model']} | {row['way']} | {row['median_ms']:.3f} | "
            f"{row['p90_ms']:.3f} | {row['floor_ms']:.3f} | {row['over_floor']:.2f} | "
            + " | ".join(ratios) + " |"
        )  # fmt: skip
    lines += [
        "", "| context | model | kernels | prefill s | tokens/s | prefill peak GB (reserved) "
        "| decode peak GB (reserved) | less than original | weights | cache | state | rest |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        memory = " | ".join(f"{size / 1e9:.3f}" for size in row["memory"].values())
        lines.append(
            f"| {row['context']:,} | {row['model']} | {row['way']} | {row['prefill_s']:.2f} | "
            f"{row['prefill_tokens_per_s']:,.0f} | {_gigabytes(row['prefill_peak'])} | "
            f"{_gigabytes(row['decode_peak'])} | {_saved(rows, row)} | {memory} |"
        )
    lines += [_line(row) for row in facts["rows"] if row["kind"] == "error"]
    return "\n".join(lines)


def _best(rows: list[dict[str, Any]]) -> dict[tuple[str, str | None, int], float]:
    """The least milliseconds by model, way (None: any) and context."""
    out: dict[tuple[str, str | None, int], float] = {}
    for row in rows:
        for way in (row["way"], None):
            key = (row["model"], way, row["context"])
            out[key] = min(out.get(key, row["median_ms"]), row["median_ms"])
    return out


def _ratio(
    best: dict[tuple[str, str | None, int], float], row: dict[str, Any], model: str, way: str | None
) -> str:
    other = best.get((model, way, row["context"]))
    return f"{other / row['median_ms']:.2f}" if other else ""


def _saved(rows: list[dict[str, Any]], row: dict[str, Any]) -> str:
    """Less memory than the leaner of the original's ways has at this context, decoding."""
    others = [
        r["decode_peak"]["allocated"]
        for r in rows
        if r["model"] == "original" and r["context"] == row["context"]
    ]
    if not others or not min(others):
        return ""
    return f"{row['decode_peak']['allocated'] / min(others) - 1:+.1%}"


def _gigabytes(peak: dict[str, int]) -> str:
    return f"{peak['allocated'] / 1e9:.2f} ({peak['reserved'] / 1e9:.2f})"


def plot(facts: dict[str, Any], path: Path) -> None:
    """Milliseconds a token and peak memory over context, as a PNG."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in facts["rows"] if row["kind"] == "row"]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    colours = dict(zip(MODELS, ("tab:red", "tab:orange", "tab:green", "tab:blue"), strict=True))
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        contexts = [row["context"] for row in mine]
        style = "o-" if way in ("fused", "repeat") else "s--"
        label = f"{model}, {way}"
        speed.plot(contexts, [row["median_ms"] for row in mine], style, label=label, ms=4,
                   color=colours[model])  # fmt: skip
        memory.plot(contexts, [row["decode_peak"]["allocated"] / 1e9 for row in mine], style,
                    label=label, ms=4, color=colours[model])  # fmt: skip
        if way == "fused":
            speed.plot(contexts, [row["floor_ms"] for row in mine], ":", color=colours[model])
    speed.set(xlabel="context (tokens)", ylabel="ms a token (dotted: bandwidth's floor)",
              xscale="log", yscale="log")  # fmt: skip
    memory.set(xlabel="context (tokens)", ylabel="peak memory, decoding (GB)", xscale="log",
               ylim=(0, None))  # fmt: skip
    for axes in (speed, memory):
        axes.grid(alpha=0.3, which="both")
    speed.legend(fontsize=7, loc="center left", bbox_to_anchor=(0.0, 0.42), ncol=2, framealpha=0.6)
    cards = {about["card"] for about in facts["about"].values()}
    figure.suptitle(f"{facts['size']} size, batch 1, {', '.join(sorted(cards))}")
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

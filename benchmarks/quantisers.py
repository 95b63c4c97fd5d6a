"""Quantisers side by side on one real model and one text: KL divergence against bytes.

    python benchmarks/quantisers.py build/smol --ours build/smol-* --bundle build/smol-mixed-onnx \
        --peer-python peers/bin/python --types Q4_0,Q4_K_M,Q8_0 --tokens 50000 --plot docs/x.png

CHECKPOINT is an all-attention model of Llama's kind. `--ours` are its quantised checkpoints, read
in PyTorch with the numbers that their codes stand for: weights alone. `--bundle` are exported files
on their own runtime, 8-bit activations included. llama.cpp quantises the same weights, in an
environment that llama_peer.py describes. The text is the half of Python's help that no calibration
reads. Bytes are of the decoder's matrices: embedding and head are 8 bits or more on all sides.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.layers import split_wqkv
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.accuracy import log_softmax
from mmmamba_edge.quant.builtin_text import topics
from mmmamba_edge.quant.stored import QuantizedCheckpoint
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.status import StatusLine
from mmmamba_edge.tokenizer import load_tokenizer

LENGTH = 1024
say = StatusLine()
Logits = Callable[[np.ndarray], np.ndarray]  # (tokens,) ids -> (tokens, vocabulary)


@dataclass
class Side:
    """A quantised model, and what its answers lost."""

    name: str
    bits: float  # a decoder weight
    bytes: int  # of the decoder's matrices
    logits: Logits
    kld: list[np.ndarray] = field(default_factory=list)
    same: int = 0
    nll: float = 0.0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ours", nargs="*", type=Path, default=[])
    parser.add_argument("--bundle", nargs="*", type=Path, default=[])
    parser.add_argument("--peer-python")
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q8_0")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        facts = compare(args, Path(work))
    if args.plot:
        plot(facts, args.plot)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All sides read the same sequences; nothing is kept but a number a position."""
    reference = torch_logits(args.checkpoint, args.device)
    sides = [_ours(folder, args.device) for folder in args.ours]
    sides += [_bundle(folder) for folder in args.bundle]
    if args.peer_python:
        sides += list(peers(args.checkpoint, args.peer_python, args.types.split(","), work))
    nll, read, total = 0.0, 0, args.tokens
    for ids in sequences(args.checkpoint, args.tokens):
        say("reading", read, total)
        p = log_softmax(reference(ids))
        nll -= float(p[np.arange(len(ids) - 1), ids[1:]].sum())
        for side in sides:
            q = log_softmax(side.logits(ids))
            side.kld.append((np.exp(p) * (p - q)).sum(1))
            side.same += int((p.argmax(1) == q.argmax(1)).sum())
            side.nll -= float(q[np.arange(len(ids) - 1), ids[1:]].sum())
        read += len(ids)
    say.close()
    rows = [_row(side, nll, read) for side in sides]
    return {"checkpoint": args.checkpoint.name, "tokens": read,
            "perplexity": float(np.exp(nll / read)), "rows": rows}  # fmt: skip


def sequences(checkpoint: Path, tokens: int) -> Iterator[np.ndarray]:
    """The evaluation half of Python's help, `LENGTH` tokens at a time."""
    tokenizer = load_tokenizer(checkpoint)
    text = "\n\n".join(text for _, text in topics("evaluation"))
    ids = np.array(tokenizer.encode_text(text)[:tokens], np.int64)
    for start in range(0, len(ids) - 1, LENGTH):
        yield ids[start : start + LENGTH]


def torch_logits(checkpoint: Path, device: str) -> Logits:
    """Of a model in PyTorch, float32."""
    model = load_model(checkpoint, device, torch.float32)

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None].to(device))[0].cpu().numpy()

    return logits


def _ours(folder: Path, device: str) -> Side:
    opened = open_checkpoint(folder)
    assert isinstance(opened, QuantizedCheckpoint), f"{folder}: not a quantised checkpoint"
    bits = opened.facts.bits_per_weight
    return Side(folder.name, bits, int(bits * _weights(folder) / 8), torch_logits(folder, device))


def _bundle(folder: Path) -> Side:
    runner = open_bundle(folder, verify=False)
    about = runner.manifest.settings.get("quantized", {})  # pyright: ignore
    bits = about.get("bits_per_weight", 0.0)

    def logits(ids: np.ndarray) -> np.ndarray:
        return runner.read_all(ids)[0]  # pyright: ignore

    name = f"{folder.name} ({type(runner).__name__.removesuffix('Runner')})"
    return Side(name, bits, int(bits * _weights(folder, runner.config) / 8), logits)


def _weights(folder: Path, config: Any = None) -> int:
    config = config or open_checkpoint(folder).config
    total = 0
    for i in range(len(config.layer_types)):
        c = config.stack_of(i)
        total += c.hidden_size * (2 * c.hidden_size + 2 * c.key_value_dim)
        total += 3 * c.hidden_size * c.intermediate_size
    return total


# --- llama.cpp ------------------------------------------------------------------------------------


def peers(checkpoint: Path, python: str, types: list[str], work: Path) -> Iterator[Side]:
    """The same weights as llama.cpp quantises them."""
    plain = work / "f32.gguf"
    say("writing GGUF")
    write_gguf(checkpoint, plain)
    script = str(Path(__file__).parent / "llama_peer.py")
    for kind in types:
        path = work / f"{kind}.gguf"
        say(f"llama.cpp quantises to {kind}")
        command = [python, script, "quantize", str(plain), str(path), "--type", kind]
        made = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        command = [python, script, "serve", str(path), "--context", str(LENGTH)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _answer(process)
        fallen = ", ".join(f"{n} {k}" for k, n in sorted(made["kinds"].items()))
        yield Side(
            f"llama.cpp {kind} ({fallen})", 8 * made["bytes"] / made["weights"], made["bytes"],
            _asking(process, work / f"{kind}.npy"),
        )  # fmt: skip


def _asking(process: subprocess.Popen, path: Path) -> Logits:
    def logits(ids: np.ndarray) -> np.ndarray:
        assert process.stdin
        process.stdin.write(
            json.dumps({"do": "logits", "ids": ids.tolist(), "to": str(path)}) + "\n"
        )
        process.stdin.flush()
        _answer(process)
        return np.load(path)

    return logits


def _answer(process: subprocess.Popen) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit("llama.cpp has ended; its message is above")
    return json.loads(line)


def write_gguf(checkpoint: Path, path: Path) -> None:
    """An all-attention checkpoint as a Llama GGUF in float32 (no tokenizer: ids are read)."""
    import gguf

    source = open_checkpoint(checkpoint)
    config, c = source.config, source.config.llm
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_block_count(len(config.layer_types))
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)

    def add(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, tensor.float().contiguous().numpy())

    add("token_embd.weight", source.get("embedding_model.llm_text_embeddings.weight"))
    add("output.weight", source.get("language_model.output.weight"))
    add("output_norm.weight", source.get("language_model.model.norm.weight"))
    names = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
    for i in range(len(config.layer_types)):
        prefix, stack = layer_prefix(config, i), config.stack_of(i)
        q, k, v = split_wqkv(source.get(f"{prefix}attention.wqkv.weight"), stack)
        add(f"blk.{i}.attn_q.weight", _interleaved(q, stack.num_attention_heads))
        add(f"blk.{i}.attn_k.weight", _interleaved(k, stack.num_key_value_heads))
        add(f"blk.{i}.attn_v.weight", v)
        add(f"blk.{i}.attn_output.weight", source.get(f"{prefix}attention.wo.weight"))
        add(f"blk.{i}.attn_norm.weight", source.get(f"{prefix}attention_norm.weight"))
        add(f"blk.{i}.ffn_norm.weight", source.get(f"{prefix}ffn_norm.weight"))
        for ours, theirs in names.items():
            add(f"blk.{i}.{theirs}.weight", source.get(f"{prefix}feed_forward.{ours}.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in GGUF's rotary order."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, -1)


# --- figures --------------------------------------------------------------------------------------


def _row(side: Side, nll: float, read: int) -> dict[str, Any]:
    means = [float(part.mean()) for part in side.kld]
    kld = np.concatenate(side.kld)
    half = 1.96 * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return {
        "name": side.name, "bits": round(side.bits, 3), "bytes": side.bytes,
        "mean_kld": float(kld.mean()), "interval": half, "median_kld": float(np.median(kld)),
        "kld_99.9": float(np.quantile(kld, 0.999)), "top1": side.same / read,
        "perplexity_ratio": float(np.exp((side.nll - nll) / read)),
    }  # fmt: skip


def as_text(facts: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = [
        f"{facts['checkpoint']}: {facts['tokens']:,} tokens, perplexity {facts['perplexity']:.2f}",
        "", "| | bits | MiB | mean KLD | median | 99.9 % | same top token | perplexity ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in sorted(facts["rows"], key=lambda row: row["mean_kld"]):
        lines.append(
            f"| {r['name']} | {r['bits']:.2f} | {r['bytes'] / 2**20:.1f} | {r['mean_kld']:.4f} ± "
            f"{r['interval']:.4f} | {r['median_kld']:.4f} | {r['kld_99.9']:.2f} | "
            f"{r['top1']:.2%} | {r['perplexity_ratio']:.4f} |"
        )
    return "\n".join(lines)


def plot(facts: dict[str, Any], path: Path) -> None:
    """KL against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    middle = statistics.median(r["bytes"] for r in facts["rows"])
    for r in facts["rows"]:
        right, bundle = r["bytes"] > 1.3 * middle, r["name"].endswith("Runtime)")
        peer = r["name"].startswith("llama.cpp")
        axes.plot(r["bytes"] / 2**20, r["mean_kld"], "s" if peer else "o",
                  color="tab:orange" if peer else "tab:blue")  # fmt: skip
        axes.annotate(
            r["name"].partition(" (")[0] if peer else r["name"],
            (r["bytes"] / 2**20, r["mean_kld"]), fontsize=8, textcoords="offset points",
            xytext=(-7 if right else 7, 4 if bundle else -4), ha="right" if right else "left",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("decoder matrices (MiB)")
    axes.set_ylabel("mean KL from float32 (nats a token)")
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

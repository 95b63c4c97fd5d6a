"""The SSD alone in training, forward and backward: our kernels beside PyTorch and mamba-ssm.

    python benchmarks/ssd_training.py --device cuda
    python benchmarks/ssd_training.py                      # small, on a CPU: tests the command

On the same random inputs, gradients of q, k, v, dt and a included:

    kernels    training_ops.ssd_chunked, what distillation runs on CUDA
    compiled   ssd.chunked_products under torch.compile
    eager      ssd.chunked_products
    mamba-ssm  its mamba_chunk_scan_combined, where it is installed; a row for each chunk size

On CUDA each is recorded as a graph and replayed, so that no host's launches are in it. Seconds are
medians between events on the device (a clock elsewhere), in turns, so that a card that slows down
slows all of them. The error is a gradient's largest difference from float32, to its largest value;
the worst of the five. For mamba-ssm keys and values are repeated for every query head first, as
its kernels ask: its time includes that.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmmamba_edge.distill.cuda_graph import graphed
from mmmamba_edge.errors import UserError
from mmmamba_edge.model import ssd
from mmmamba_edge.model.device import require_device
from mmmamba_edge.model.training_ops import has_triton, ssd_chunked

SHAPES = {  # batch, positions, heads, key/value heads, head size
    "small": (2, 200, 4, 2, 16),
    "smollm2": (16, 2048, 9, 3, 64),
    "full": (1, 8192, 16, 8, 128),
}
MAMBA_CHUNKS = (128, 256)

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", help=f"of {', '.join(SHAPES)}; default: small, on CUDA the rest")
    parser.add_argument("--repeat", type=int, default=20, help="timed turns, after three")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    sizes = (args.sizes or ("smollm2,full" if args.device == "cuda" else "small")).split(",")
    try:
        require_device(args.device)
        if args.repeat < 1:
            raise UserError(f"--repeat {args.repeat}: expected a number above 0")
        for size in sizes:
            if size not in SHAPES:
                raise UserError(f"--sizes {size}: expected some of {', '.join(SHAPES)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row for size in sizes for row in measure(size, args.device, args.repeat)]
    about = {"torch": torch.__version__, "repeat": args.repeat}
    if args.device == "cuda":
        about["card"] = torch.cuda.get_device_name()
    print(json.dumps({**about, "rows": rows}) if args.json else _table(about, rows))
    return 0


def measure(size: str, device: str, repeat: int) -> list[dict[str, Any]]:
    """A row for each way of computing the SSD at this size."""
    inputs, dy = _inputs(size, device)
    torch.set_float32_matmul_precision("highest")
    reference = _gradients(_eager, [x.detach().float().requires_grad_() for x in inputs], dy)
    torch.set_float32_matmul_precision("high")  # as in training
    scans, errors, seconds = _scans(device), {}, {}
    for name, scan in scans.items():
        found = _gradients(scan, inputs, dy)
        pairs = zip(found, reference, strict=True)
        errors[name] = max(float((x.float() - y).abs().max() / y.abs().max()) for x, y in pairs)
    runs = {name: _recorded(scan, inputs, dy) for name, scan in scans.items()}
    for turn in range(repeat + 3):
        for name, run in runs.items():
            took = _seconds(run, device)
            if turn >= 3:
                seconds.setdefault(name, []).append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "size": size, "shape": SHAPES[size], "way": name, "seconds": medians[name],
            "to_the_fastest": medians[name] / min(medians.values()), "error": errors[name],
        }
        for name in scans
    ]  # fmt: skip


def _inputs(size: str, device: str) -> tuple[list[Tensor], Tensor]:
    batch, seq, heads, kv_heads, dim = SHAPES[size]
    random = torch.Generator().manual_seed(0)
    half = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, dy = (
        torch.randn(batch, seq, count, dim, generator=random).to(device, half)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    # Step sizes and decays as seeding spreads them: memories of a few to thousands of positions.
    dt = torch.exp(torch.rand(batch, seq, heads, generator=random) * 4 - 7).to(device)
    a = -torch.exp(torch.rand(heads, generator=random) * 3).to(device)
    return [x.requires_grad_() for x in (q, k / dim**0.5, v, dt, a)], dy


def _scans(device: str) -> dict[str, Scan]:
    scans: dict[str, Scan] = {"eager": _eager}
    if device == "cuda":
        # A second size would be compiled for any size, and slower.
        scans["compiled"] = torch.compile(_eager, dynamic=False)
        if has_triton():
            scans["kernels"] = ssd_chunked
        if kernel := ssd.mamba_kernel():
            scans |= {f"mamba-ssm, {chunk}": _mamba(kernel, chunk) for chunk in MAMBA_CHUNKS}
    return scans


def _eager(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor) -> Tensor:
    return ssd.chunked_products(q, k, v, dt, a)[0]


def _mamba(kernel: Callable[..., Any], chunk: int) -> Scan:
    def scan(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        return kernel(v, dt, a, k, q, chunk_size=chunk)

    return scan


def _gradients(scan: Scan, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = scan(*inputs)
    return list(torch.autograd.grad(y, inputs, dy.to(y.dtype)))


def _recorded(scan: Scan, inputs: list[Tensor], dy: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return _gradients(scan, inputs, dy)[0]

    return graphed(run, {}) if dy.is_cuda else run


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = ["| size | way | ms | to the fastest | error |", "|---|---|---|---|---|"]
    for row in rows:
        ms, ratio, error = row["seconds"] * 1000, row["to_the_fastest"], row["error"]
        lines.append(f"| {row['size']} | {row['way']} | {ms:.2f} | {ratio:.2f} | {error:.1e} |")
    return "\n".join([", ".join(f"{key} {value}" for key, value in about.items()), *lines])


if __name__ == "__main__":
    sys.exit(main())

"""Size, memory and speed of a bundle, measured in a process of its own.

That process imports nothing of PyTorch: its memory is the bundle's and its runtime's.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from mmmamba_edge import bench


def cost(bundle: Path, runtime: str) -> dict[str, Any] | None:
    """Bytes, and tokens a second; None where the process did not survive it."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as apart:
            return apart.submit(measured, bundle, runtime).result()
    except BrokenProcessPool:  # no memory for a second copy of the model, most likely
        return None


def measured(bundle: Path, runtime: str) -> dict[str, Any]:
    """`cost`, in this process."""
    found = bench.measure(
        bundle, runtime=runtime, prompt_tokens=128, new_tokens=32, contexts=[0], tiles=[], repeat=2
    )
    return {
        "bundle_bytes": found["bundle_bytes"],
        "state_bytes": found["state_bytes"],
        "peak_rss_bytes": found["peak_rss_bytes"],
        "prefill_tokens_per_s": found["text"]["prefill_tokens_per_s"],
        "decode_tokens_per_s": found["decode"][0]["tokens_per_s"],
        "threads": found["threads"],
        "machine": found["machine"],
    }

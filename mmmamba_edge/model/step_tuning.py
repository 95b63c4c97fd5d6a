"""Which launches of `FusedStep` are fastest on this device: whole steps are timed, not kernels.

What matters between kernels of 5 us is how one starts while another ends, so every candidate is
recorded as a whole step and replayed. The defaults are `fused_step.Launch`'s own; runtimes use
those, since another tile sums in another order.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from mmmamba_edge.model.decoder import DecoderState
from mmmamba_edge.model.fused_step import FusedStep, Launch
from mmmamba_edge.model.recorded_step import compile_kernels, record
from mmmamba_edge.status import Report, silent

CANDIDATES = ((16_384, 8), (8192, 8), (8192, 4), (4096, 4))  # weights a program takes, its warps
REPLAYS = 9
GAIN = 0.997  # a candidate must be faster than this share of the best


@torch.inference_mode()
def tuned(fused: FusedStep, say: Report = silent) -> Launch:
    """The fastest launches found, one product after the other; `fused` has them afterwards.

    Args:
        fused: on CUDA. Takes some seconds, most of them compiling, once on a machine.
        say: told what is tried.
    """
    state = fused.model.new_state(1, max_context=256)
    best, least = fused.how, _seconds(fused, state)
    for name, how in _candidates(fused):
        say(f"trying launches of {name}")
        fused.how = how(best)
        if fused.how == best:
            continue
        spent = _seconds(fused, state)
        if spent < least * GAIN:
            best, least = fused.how, spent
    fused.how = best
    return best


def _candidates(fused: FusedStep) -> Iterator[tuple[str, "_Change"]]:
    if fused.how.pdl:
        yield "pdl", _Change(pdl=False)
    kinds = set(fused.model.config.layer_types)
    absent = {"attention": ("attention_in", "wo"), "mamba2": ("mixer_in", "mixer_out")}
    skipped = {name for kind, names in absent.items() if kind not in kinds for name in names}
    for name in fused.how.tile:
        if name not in skipped:
            for tile, warps in CANDIDATES:
                yield name, _Change(name, tile, warps)


class _Change:
    """One product's launch, or PDL, exchanged in another `Launch`."""

    def __init__(self, name: str = "", tile: int = 0, warps: int = 0, pdl: bool = True):
        self._name, self._tile, self._warps, self._pdl = name, tile, warps, pdl

    def __call__(self, how: Launch) -> Launch:
        if not self._name:
            return replace(how, pdl=self._pdl)
        return replace(
            how, tile={**how.tile, self._name: self._tile},
            warps={**how.warps, self._name: self._warps},
        )  # fmt: skip


def _seconds(fused: FusedStep, state: DecoderState) -> float:
    """The median time of a recorded step on a state near its beginning."""
    state.length.zero_()
    compile_kernels(fused)
    graph = record(lambda: fused.launch(state))
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for end in ends:
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    pairs = zip(ends, ends[1:], strict=False)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3

"""How long each head remembers: measured while the reference reads.

What a token wrote into a head's state fades by exp(-dt |a|) with every token after it. A head's
*memory* is 1 / mean(dt |a|): the tokens after which it has faded to 1/e.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.model.mixer import Mamba2Mixer

EDGES = (0, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)  # tokens; the last bucket is open


class Fading:
    """The mean of dt |a| over the tokens that a layer reads, for each of its heads."""

    def __init__(self, mixer: Mamba2Mixer) -> None:
        self._mixer = mixer
        self._sum = torch.zeros(mixer.config.num_attention_heads, dtype=torch.float64)
        self._tokens = 0

    def see(self, _: nn.Module, __: Any, projected: Tensor) -> None:
        """A forward hook of `in_proj`: (batch, tokens, heads), before bias and softplus."""
        dt = F.softplus(projected.float() + self._mixer.dt_bias.float())
        self._sum += dt.double().sum((0, 1))
        self._tokens += projected.shape[0] * projected.shape[1]

    def memory(self) -> list[float]:
        """Tokens, by head."""
        per_token = self._sum / self._tokens * self._mixer.A_log_bias.double().exp()
        return (1 / per_token.clamp(min=1e-12)).tolist()


@contextmanager
def fading(layer: DecoderLayer) -> Iterator[Fading | None]:
    """Watch a layer read; None for one that is attention."""
    if not isinstance(layer.attention, Mamba2Mixer):
        yield None
        return
    found = Fading(layer.attention)
    hook = layer.attention.in_proj.register_forward_hook(found.see)
    try:
        yield found
    finally:
        hook.remove()


def histogram(memory: Mapping[Any, Sequence[float]]) -> list[dict[str, float | int | None]]:
    """Heads by how long they remember: first and stop in tokens (None: open), and how many."""
    tokens = [t for heads in memory.values() for t in heads]
    buckets = [(first, stop) for first, stop in pairwise(EDGES)]
    out: list[dict[str, float | int | None]] = [
        {"first": first, "stop": stop, "heads": sum(first <= t < stop for t in tokens)}
        for first, stop in buckets
    ]
    out.append({"first": EDGES[-1], "stop": None, "heads": sum(t >= EDGES[-1] for t in tokens)})
    return out

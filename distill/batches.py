"""What training stages read: batches of rows, and where a source of them goes on after a kill."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmmamba_edge.config import IMAGE_MEAN, IMAGE_STD

# Tokens that count in the loss: all real ones (the paper), or those that predict an answer's.
Positions = Literal["all", "answers"]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded to a common length.

    Attributes:
        ids: (rows, seq) int64.
        lengths: (rows,) int64, real tokens of each row; at least 1.
        weights: (rows, seq) float32, how much each position counts in the loss; 0 at padding.
        pixel_values: (tiles, 3, height, width), tiles of the whole batch in reading order: float32,
            normalised, or uint8, which `to` normalises on the device; None without pictures.
        dense: text alone, every position a real token of weight 1. Nothing has then to be looked
            up on the device, where a look makes the host wait.
    """

    ids: Tensor
    lengths: Tensor
    weights: Tensor
    pixel_values: Tensor | None = None
    dense: bool = False

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, its pixels normalised."""
        pixels = self.pixel_values
        if pixels is not None:
            pixels = pixels.to(device, non_blocking=True)
            if pixels.dtype == torch.uint8:
                pixels = normalised(pixels)
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            pixel_values=pixels,
        )

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.lengths.sum())


def normalised(pixels: Tensor) -> Tensor:
    """(tiles, 3, height, width) uint8 -> float32, mean and deviation as in spec 7.3."""
    mean, std = _pixel_statistics(pixels.device)
    return (pixels.float() / 255 - mean) / std


@cache
def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([IMAGE_MEAN, IMAGE_STD], device=device).view(2, 3, 1, 1)
    return mean, std


@dataclass(frozen=True)
class StepBatches:
    """What one optimiser step reads in this process.

    Attributes:
        micro: forward and backward run once for each; never empty.
        position: JSON; given back to `Source.steps`, the source goes on with the next step.
        skipped: bad rows met since the step before, in words.
    """

    micro: list[Batch]
    position: dict
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """Which part of each global batch this process reads.

    Attributes:
        rows: of the global batch of one optimiser step, over all processes.
        micro_rows: at most so many go through the model at once.
        rank, world: this process's number, and how many there are; `rows` is divisible by `world`.
    """

    rows: int
    micro_rows: int
    rank: int = 0
    world: int = 1


class Source(Protocol):
    """An endless supply of steps, the same rows in the same global batches for any `world`."""

    def steps(self, position: dict | None, share: Share) -> Iterator[StepBatches]:
        """Steps from `position` on; None: from the beginning."""
        ...

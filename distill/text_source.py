"""Packed text as training data: windows of fixed length, without padding, shuffled every epoch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmmamba_edge.distill.batches import Batch, Share, StepBatches
from mmmamba_edge.distill.permutation import Permutation
from mmmamba_edge.errors import UserError


@dataclass(frozen=True)
class PackedTokens:
    """Token files of one split, mapped and not read.

    Attributes:
        files: by source, (tokens,) uint16.
        folder: of the split.
    """

    files: dict[str, np.ndarray]
    folder: Path


def open_tokens(folder: Path, split: str, vocab_size: int) -> PackedTokens:
    """The token files that `text.corpus` made.

    Raises:
        UserError: not such a folder, no such split, or made with a tokenizer of more tokens.
    """
    try:
        facts = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/tokens.json: {error}; make the folder with "
            "`python -m mmmamba_edge.distill.text.corpus`"
        ) from error
    if facts["vocab_size"] > vocab_size:
        raise UserError(
            f"{folder}: packed with a tokenizer of {facts['vocab_size']} tokens, the model has "
            f"{vocab_size}; pack again with the model's tokenizer.json"
        )
    files = {}
    for name in facts["sources"]:
        path = folder / split / f"{name}.npy"
        try:
            files[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}; pack the corpus again") from error
    return PackedTokens(files, folder / split)


class TextSource:
    """Epochs over all windows, each in an order of its own.

    Every epoch cuts each file at another place, so that a window is hardly seen twice.

    Args:
        tokens: of one split.
        length: tokens of a window.
        seed: of order and cuts.
    """

    def __init__(self, tokens: PackedTokens, length: int, seed: int) -> None:
        # One window is given up for the cut to move, unless it is the only one.
        spare = {name: len(ids) // length - 1 for name, ids in tokens.files.items()}
        self._files = [(tokens.files[n], max(1, k), k > 0) for n, k in spare.items() if k >= 0]
        self._ends = np.cumsum([count for _, count, _ in self._files])
        if not self._files:
            raise UserError(f"{tokens.folder}: no source has {length} tokens; lower length")
        self.length, self.seed, self.folder = length, seed, tokens.folder
        self._epoch, self._order, self._cuts = -1, Permutation(1, seed), [0]

    def __len__(self) -> int:
        """Windows of an epoch."""
        return int(self._ends[-1])

    def steps(self, position: dict | None, share: Share) -> Iterator[StepBatches]:
        """As in `Source`; the position is the number of windows read."""
        done = position["rows"] if position else 0
        while True:
            mine = range(done + share.rank, done + share.rows, share.world)
            rows = [self._window(i) for i in mine]
            micro = [
                _batch(rows[i : i + share.micro_rows])
                for i in range(0, len(rows), share.micro_rows)
            ]
            done += share.rows
            yield StepBatches(micro, {"rows": done})

    def _window(self, i: int) -> np.ndarray:
        epoch, place = divmod(i, len(self))
        if epoch != self._epoch:
            self._begin(epoch)
        number = self._order[place]
        file = int(np.searchsorted(self._ends, number, side="right"))
        ids, count, _ = self._files[file]
        start = (number - (int(self._ends[file]) - count)) * self.length + self._cuts[file]
        return ids[start : start + self.length]

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = Permutation(len(self), (self.seed, epoch))
        moves = Permutation(self.length, (self.seed, epoch, 1))
        self._cuts = [
            moves[i % self.length] if moving else 0 for i, (*_, moving) in enumerate(self._files)
        ]


def _batch(rows: Sequence[np.ndarray]) -> Batch:
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    if torch.cuda.is_available():
        ids = ids.pin_memory()
    count, length = ids.shape
    return Batch(ids, torch.full((count,), length), torch.ones(count, length), dense=True)

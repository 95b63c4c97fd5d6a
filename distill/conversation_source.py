"""Conversations as batches: shuffled, sorted by length within a window, resumable (spec 6.5).

    source = ConversationSource("data/meta.json", tokenizer, config, "cache/")
    for step in source.steps(None, Share(rows=128, micro_rows=2, rank=rank, world=world)): ...

A window is planned whole: its rows are found, tokenised, sorted and cut into global batches, from
text and the headers of pictures alone. Every process plans alike, so all agree on what a batch
holds and which rows are bad; each decodes the pictures of its own rows only.
"""

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.distill.batches import Batch, Positions, Share, StepBatches
from mmmamba_edge.distill.conversation_tokens import MAX_TILES, Tokens, pixels, tokenize
from mmmamba_edge.distill.conversations import BadRow, RowFile, read_meta
from mmmamba_edge.distill.permutation import Permutation
from mmmamba_edge.distill.workers import Workers
from mmmamba_edge.errors import UserError
from mmmamba_edge.prompt import get_template
from mmmamba_edge.tokenizer import Tokenizer, check_tokenizer

AHEAD = 1  # steps whose pictures are decoded while the trainer computes

_log = logging.getLogger(__name__)


class ConversationSource:
    """The rows of a meta file, without end; a `Source`.

    Each epoch reads the rows of all datasets, repeats included, in another order.

    Args:
        meta: the meta file (see `read_meta`).
        tokenizer, config: the model's.
        cache: a folder for indexes of the JSONL files; made if it is not there.
        seed: of all shuffling.
        max_length: rows of more tokens are bad.
        max_tiles: of all pictures of a row together, thumbnails not counted.
        positions: what counts in the loss: "all" real tokens (the paper), or "answers": those whose
            next token is an answer's, for the output at t predicts token t + 1.
        window: global batches whose rows are sorted by length together.
        threads: that decode pictures.

    Attributes:
        total: rows of an epoch.

    Raises:
        UserError: see `read_meta`, `RowFile`, `check_tokenizer`; or a setting out of range.
    """

    def __init__(
        self,
        meta: str | Path,
        tokenizer: Tokenizer,
        config: Config,
        cache: str | Path,
        *,
        seed: int = 0,
        max_length: int = 8192,
        max_tiles: int = MAX_TILES,
        positions: Positions = "all",
        window: int = 16,
        threads: int = 2,
    ) -> None:
        limits = {"max_length": max_length, "max_tiles": max_tiles}
        _check_counts(**limits, window=window, threads=threads)
        if positions not in get_args(Positions):
            raise UserError(f"positions: {positions!r}; expected one of {get_args(Positions)}")
        if config.pixel_shuffle_loc == "post":
            raise UserError("config: pixel_shuffle_loc 'post' cannot be trained; expected 'pre'")
        check_tokenizer(tokenizer, config)
        self.meta, self.tokenizer, self.config = Path(meta), tokenizer, config
        self.seed, self.positions, self.window, self.threads = seed, positions, window, threads
        self._limits = limits
        self._template = get_template(config.template)
        self._pad = 0 if config.img_context_token_id else 1  # padding must not ask for pixels
        self._parts = _open_parts(self.meta, Path(cache), seed)
        self.total = self._parts[-1].end

    def steps(self, position: dict | None, share: Share) -> Iterator[StepBatches]:
        """Steps from `position` on; None: from the beginning. See `Source`.

        `share.rows` is to be what it was when the position was made; `world`, `rank` and
        `micro_rows` may differ. `skipped` names a row that planning found bad at rank 0 only, and
        one whose picture could not be decoded where that was tried; there it is replaced by one
        padding token, so that no process gets out of step. Closing the iterator ends its threads.

        Raises:
            UserError: a share that does not divide, or a position of other data; while iterating:
                no row of an epoch is good.
        """
        _check_counts(rows=share.rows, micro_rows=share.micro_rows, world=share.world)
        if share.rows % share.world or not 0 <= share.rank < share.world:
            raise UserError(
                f"batch of {share.rows} rows, process {share.rank} of {share.world}: expected rows "
                "that the number of processes divides, and processes numbered from 0"
            )
        cursor, done = self._parse(position)
        return self._steps(cursor, done, share)

    def _steps(self, cursor: "_Cursor", done: int, share: Share) -> Iterator[StepBatches]:
        planner, decoders = Workers(1), Workers(self.threads)
        waiting: deque[tuple[_Step, list[_Decoding]]] = deque()
        try:
            for step in self._planned(cursor, done, share, planner):
                waiting.append((step, [decoders.submit(self._pixels, row) for row in step.rows]))
                if len(waiting) > AHEAD:
                    yield self._assembled(*waiting.popleft(), share.micro_rows)
        finally:
            planner.close()
            decoders.close()

    # --- planning ---------------------------------------------------------------------------------

    def _planned(
        self, cursor: "_Cursor", done: int, share: Share, planner: "Workers"
    ) -> Iterator["_Step"]:
        future = planner.submit(self._plan, cursor, share, planner.over)
        while True:
            window = future.result()
            future = planner.submit(self._plan, window.next, share, planner.over)
            for number in range(done, self.window):
                last = number + 1 == self.window
                place, batch = (window.next, 0) if last else (cursor, number + 1)
                skipped = window.skipped if number == 0 and share.rank == 0 else []
                yield _Step(window.batches[number], {**place._asdict(), "batch": batch}, skipped)
            cursor, done = window.next, 0

    def _plan(self, cursor: "_Cursor", share: Share, over: Callable[[], bool]) -> "_Window":
        """The window that starts at `cursor`, with this process's rows of each global batch."""
        epoch, row, number = cursor
        order = Permutation(self.total, self.seed + epoch)
        hope = row > 0  # some row of this epoch is good, or may have been
        good: list[Tokens] = []
        skipped: list[str] = []
        while len(good) < self.window * share.rows:
            if over():
                raise CancelledError
            if row == self.total:
                if not hope:
                    raise UserError(f"{self.meta}: no row can be used; the last is {skipped[-1]}")
                epoch, row, hope = epoch + 1, 0, False
                order = Permutation(self.total, self.seed + epoch)
            try:
                good.append(self._tokens(order[row]))
                hope = True
            except BadRow as bad:
                skipped.append(str(bad))
            row += 1
        good.sort(key=lambda tokens: len(tokens.ids))
        batches = [
            good[i * share.rows : (i + 1) * share.rows][share.rank :: share.world]
            for i in Permutation(self.window, (self.seed, number))
        ]
        return _Window(batches, skipped, _Cursor(epoch, row, number + 1))

    def _tokens(self, i: int) -> Tokens:
        """Row i of an epoch that is not shuffled."""
        part = self._parts[bisect_right(self._parts, i, key=lambda part: part.end)]
        # Each dataset in an order of its own, of which an epoch reads a share, or repeats.
        row = part.rows[part.order[(part.end - 1 - i) % len(part.rows)]]
        return tokenize(row, self.tokenizer, self._template, self.config, **self._limits)

    def _parse(self, position: dict | None) -> tuple["_Cursor", int]:
        if position is None:
            return _Cursor(0, 0, 0), 0
        keys = ("epoch", "row", "window", "batch")
        numbers: list[Any] = [position.get(key) for key in keys]
        good = all(type(number) is int and number >= 0 for number in numbers)
        if not good or numbers[1] > self.total or numbers[3] >= self.window:
            raise UserError(
                f"position {position}: not one in {self.total} rows and windows of {self.window} "
                "batches; go on with the data and settings it was made with, or begin anew"
            )
        epoch, row, window, batch = numbers
        return _Cursor(epoch, row, window), batch

    # --- batches ----------------------------------------------------------------------------------

    def _pixels(self, tokens: Tokens) -> NDArray[np.float32] | None:
        return pixels(tokens, self.config, max_tiles=self._limits["max_tiles"])

    def _assembled(
        self, step: "_Step", decodings: list["_Decoding"], micro_rows: int
    ) -> StepBatches:
        skipped, micro = list(step.skipped), []
        for start in range(0, len(step.rows), micro_rows):
            rows: list[Tokens | None] = []
            tiles: list[NDArray[np.float32]] = []
            for tokens in step.rows[start : start + micro_rows]:
                try:
                    decoded = decodings.pop(0).result()
                    tiles += [] if decoded is None else [decoded]
                    rows.append(tokens)
                except UserError as error:
                    skipped.append(f"{tokens.where}: unreadable image ({error})")
                    rows.append(None)
            micro.append(self._batch(rows, tiles))
        return StepBatches(micro, step.position, tuple(skipped))

    def _batch(self, rows: Sequence[Tokens | None], tiles: list[NDArray[np.float32]]) -> Batch:
        """Rows side by side; None: a row that is one padding token."""
        lengths = [1 if tokens is None else len(tokens.ids) for tokens in rows]
        ids = torch.full((len(rows), max(lengths)), self._pad)
        weights = torch.zeros(ids.shape)
        for row, tokens in enumerate(rows):
            if tokens is None:
                continue
            ids[row, : lengths[row]] = torch.from_numpy(tokens.ids)
            if self.positions == "all":
                weights[row, : lengths[row]] = 1
            else:
                weights[row, : lengths[row] - 1] = torch.from_numpy(tokens.answer[1:]).float()
        joined = torch.from_numpy(np.concatenate(tiles)) if tiles else None
        return Batch(ids, torch.tensor(lengths), weights, joined)


# --- what is passed on ----------------------------------------------------------------------------


class _Cursor(NamedTuple):
    """Where a window starts: at this row of this epoch's order."""

    epoch: int
    row: int
    window: int


class _Window(NamedTuple):
    batches: list[list[Tokens]]  # of each global batch, this process's rows
    skipped: list[str]
    next: _Cursor


class _Step(NamedTuple):
    rows: list[Tokens]
    position: dict[str, int]
    skipped: list[str]


_Decoding = Future[NDArray[np.float32] | None]


class _Part(NamedTuple):
    """A dataset's place in an epoch: its numbers end before `end`."""

    rows: RowFile
    order: Permutation
    end: int


def _open_parts(meta: Path, cache: Path, seed: int) -> list[_Part]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cache}: cannot be made ({error.strerror or error})") from error
    parts, end = [], 0
    for number, dataset in enumerate(read_meta(meta)):
        file = dataset.annotation.resolve()
        index = cache / f"{file.stem}-{sha256(str(file).encode()).hexdigest()[:16]}.npy"
        rows = RowFile(file, dataset.root, index)
        if not len(rows):
            raise UserError(f"{file}: no rows; expected a JSON object a line")
        if dataset.length not in (None, len(rows)):
            _log.warning(
                "%s: %s has length %s, but %s has %d rows, which are taken",
                meta, dataset.name, dataset.length, file, len(rows),
            )  # fmt: skip
        end += max(1, round(len(rows) * dataset.repeat_time))
        parts.append(_Part(rows, Permutation(len(rows), (seed, number)), end))
    return parts


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise UserError(f"{name}: {count!r}; expected a whole number from 1 up")

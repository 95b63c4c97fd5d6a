"""Prefix snapshots: what a conversation begins with, read once.

The state after the system message and after each picture of a first turn is kept, so that another
question about the same picture, in a fresh session, does not read the picture again.
"""

import hashlib
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError
from mmmamba_edge.reduced_state import reduce_state, restore_state
from mmmamba_edge.resting import check_heads
from mmmamba_edge.runtimes.base import Progress, Runner, State
from mmmamba_edge.state import REDUCED, VERSION, Tensors, read_tensors, write_tensors

SNAPSHOT = "mmmamba-edge prefix snapshot"  # the kind of file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state after a prefix, in the neutral layout: any runner of the same weights reads it."""

    arrays: Tensors
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class PrefixCache:
    """Snapshots of prompts' beginnings (system prompt, pictures), the least lately used dropped.

    Args:
        max_bytes: room for all of them, in memory and again in `folder`.
        folder: keep them here as well, one safetensors file (mode 0600) each, for later runs. The
            files hold what was said and shown, so the folder should be private.
        precision: of the snapshots: "float32", exact; "int16" or "float16", half the size, where
            the model allows it (resting.py).
    """

    def __init__(
        self, max_bytes: int = 128 << 20, folder: str | Path | None = None,
        precision: str = "float32",
    ) -> None:  # fmt: skip
        self.max_bytes = max_bytes
        self.precision = precision
        self.folder = None if folder is None else Path(folder)
        self._kept: OrderedDict[str, Snapshot] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(snapshot.nbytes for snapshot in self._kept.values())

    def __len__(self) -> int:
        """Snapshots held in memory."""
        return len(self._kept)

    def prefill(
        self,
        runner: Runner,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        *,
        opening: int = 0,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float32], State, int]:
        """Read a conversation's first prompt, as far as possible from snapshots.

        Args:
            runner, input_ids, pixel_values, progress: as for `Runner.prefill`.
            opening: how many of the ids every conversation begins with (the system message).

        Returns:
            Logits (vocab_size,), the state, and how many ids did not have to be read.
        """
        check_heads(runner, self.precision)
        parts = _parts(runner, input_ids, pixel_values, opening)
        keys: list[str] = []
        for part in parts[:-1]:
            keys.append(prefix_key(runner, keys[-1] if keys else self._root, part.ids, part.pixels))
        state, known = self._longest(runner, keys)
        logits = np.zeros(0, np.float32)
        for number, part in enumerate(parts[known:], known):
            tell = progress and _from(part.start, len(input_ids), progress)
            logits, state = runner.prefill(part.ids, part.pixels, state, progress=tell)
            if number < len(keys):
                self.put(keys[number], state)
        assert state is not None
        return logits, state, parts[known].start

    def get(self, key: str) -> Snapshot | None:
        """The snapshot named `key`, or None. An unreadable file counts as none."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self.folder is None:
            return None
        path = self.folder / _file_name(key)
        try:
            tensors, metadata = read_tensors(path, SNAPSHOT)
            snapshot = Snapshot(tensors, int(metadata["tokens"]))
            os.utime(path)  # the time of last use decides what is dropped
        except (UserError, KeyError, ValueError, OSError):
            return None
        self._keep(key, snapshot)
        return snapshot

    def put(self, key: str, state: State) -> None:
        """Keep a copy of `state` under `key`, unless it alone is larger than `max_bytes`."""
        snapshot = Snapshot(reduce_state(state.arrays(), self.precision), state.tokens)
        if key in self._kept or snapshot.nbytes > self.max_bytes:
            return
        self._keep(key, snapshot)
        if self.folder is not None:
            try:
                self._write(self.folder, key, snapshot)
            except (UserError, OSError) as error:  # a full disk must not cost the answer
                _log.warning("prefix snapshots are kept in memory only from here on: %s", error)
                self.folder = None

    @property
    def _root(self) -> str:
        """What keys begin with: equal keys mean equal states, rounding included."""
        return "" if self.precision == "float32" else self.precision

    def _longest(self, runner: Runner, keys: list[str]) -> tuple[State | None, int]:
        """The state after as many parts as are kept, and how many those are."""
        for known in range(len(keys), 0, -1):
            snapshot = self.get(keys[known - 1])
            if snapshot is not None:
                try:
                    return runner.load_state(restore_state(snapshot.arrays), snapshot.tokens), known
                except UserError as error:  # a file from elsewhere under this name
                    _log.warning("prefix snapshot %s: %s", keys[known - 1], error)
        return None, 0

    def _keep(self, key: str, snapshot: Snapshot) -> None:
        self._kept[key] = snapshot
        while self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)

    def _write(self, folder: Path, key: str, snapshot: Snapshot) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / _file_name(key)
        version = VERSION if self.precision == "float32" else REDUCED
        write_tensors(path, SNAPSHOT, snapshot.arrays, {"tokens": str(snapshot.tokens)}, version)
        ours = folder.glob(_file_name("*"))  # no other file is ours to remove
        oldest_first = sorted(ours, key=lambda f: f.stat().st_mtime_ns)
        total = sum(file.stat().st_size for file in oldest_first)
        for file in oldest_first[:-1]:
            if total > self.max_bytes:
                total -= file.stat().st_size
                file.unlink(missing_ok=True)


def prefix_key(
    runner: Runner,
    previous: str,
    input_ids: NDArray[np.int64],
    pixel_values: NDArray[np.float32] | None = None,
) -> str:
    """The name of what is read after `previous` ("" at the beginning): SHA-256, 64 hex digits.

    It covers the model, its quantisation, every id and every pixel, so that equal keys mean equal
    states.
    """
    digest = hashlib.sha256(f"{runner.model_id}\n{runner.quant}\n{previous}\n".encode())
    digest.update(np.ascontiguousarray(input_ids, np.int64).data)
    if pixel_values is not None and pixel_values.size:
        digest.update(f"\n{pixel_values.shape}\n".encode())
        digest.update(np.ascontiguousarray(pixel_values, np.float32).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """A run of ids, with the tiles whose image positions are among them."""

    start: int
    ids: NDArray[np.int64]
    pixels: NDArray[np.float32] | None


def _parts(
    runner: Runner,
    ids: NDArray[np.int64],
    pixels: NDArray[np.float32] | None,
    opening: int,
) -> list[_Part]:
    """The prompt cut after the opening and after each picture; the last part is what is asked."""
    image = ids == runner.config.img_context_token_id
    ends = np.flatnonzero(image[:-1] & ~image[1:]) + 1
    cuts = [0, *sorted({opening, *ends.tolist()} - {0, len(ids)}), len(ids)]
    tiles = np.cumsum(image) // runner.config.tokens_per_tile  # complete up to each id
    parts = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        first, last = int(tiles[start - 1]) if start else 0, int(tiles[stop - 1])
        mine = None if pixels is None or first == last else pixels[first:last]
        parts.append(_Part(start, ids[start:stop], mine))
    return parts


def _from(start: int, total: int, progress: Progress) -> Progress:
    return lambda done, _: progress(start + done, total)


def _file_name(key: str) -> str:
    return f"prefix-{key}.safetensors"

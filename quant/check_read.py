"""Both models over the same sequences, piece by piece: what is compared is never all in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.quant.accuracy import Scores
from mmmamba_edge.quant.check_data import Item
from mmmamba_edge.quant.check_reference import Reference
from mmmamba_edge.runtimes.base import Runner, State
from mmmamba_edge.status import Report, silent

Floats = NDArray[np.float32]
PIECE = 128  # tokens, at most, but for a tile, which is never cut


class Artefact(Runner, Protocol):
    """A runner that tells the logits of every position."""

    def read_all(
        self, input_ids: NDArray[np.int64], pixel_values: Floats | None = None,
        state: State | None = None,
    ) -> tuple[Floats, State]:  # fmt: skip
        """Logits (tokens, vocab_size), and the state after them."""
        ...


@dataclass
class Readings:
    """What came of reading everything.

    Attributes:
        scores: artefact against reference.
        cross: artefact against the other one, if there is one.
        right: of each answer in the data, whether artefact and reference give it.
    """

    scores: Scores = field(default_factory=Scores)
    cross: Scores | None = None
    right: list[tuple[bool, bool]] = field(default_factory=list)


def read(
    runner: Artefact, reference: Reference, items: Sequence[Item], other: Artefact | None = None,
    say: Report = silent,
) -> Readings:  # fmt: skip
    """Read all sequences with all models, and compare them position by position."""
    out = Readings(cross=Scores() if other else None)
    total, done = sum(len(item.ids) for item in items), 0
    for number, item in enumerate(items):
        config = runner.config
        kinds, following = item.kinds(config), item.following(config)
        agrees: list[NDArray[np.bool_]] = []
        ours, theirs = pieces(runner, item), pieces(other, item) if other else None
        for part, logits in ours:
            say("reading, token", done + part.start, total)
            want = reference.logits(number, part)
            second = next(theirs)[1] if theirs else None
            # The last token of a sequence is followed by nothing.
            part = slice(part.start, min(part.stop, len(kinds)))
            size = part.stop - part.start
            if size <= 0:
                continue
            positions, said = np.arange(part.start, part.stop), logits[:size]
            out.scores.add(number, positions, kinds[part], said, want[:size], following[part])
            if out.cross is not None and second is not None:
                out.cross.add(number, positions, kinds[part], said, second[:size], following[part])
            wanted = following[part]
            agrees.append(
                np.stack([said.argmax(1) == wanted, want[:size].argmax(1) == wanted], axis=1)
            )
        done += len(item.ids)
        all_agree = np.concatenate(agrees) if agrees else np.empty((0, 2), np.bool_)
        for answer in item.answers():
            said = all_agree[answer]
            out.right.append((bool(said[:, 0].all()), bool(said[:, 1].all())))
    say("reading, token", total, total)
    return out


def pieces(runner: Artefact, item: Item) -> Iterator[tuple[slice, Floats]]:
    """A sequence read in pieces: positions, and their logits (positions, vocab_size)."""
    state: State | None = None
    tiles = item.tiles()
    for part, shown in cuts(item.ids, tiles, runner.config):
        logits, state = runner.read_all(item.ids[part], shown, state)
        yield part, logits


def cuts(
    ids: NDArray[np.int64], tiles: Floats | None, config: Config
) -> Iterator[tuple[slice, Floats | None]]:
    """Where a sequence may be cut: positions and their tiles, about PIECE tokens at a time."""
    image = np.concatenate([[0], np.cumsum(ids == config.img_context_token_id)])
    whole = image % config.tokens_per_tile == 0  # before position i no tile is cut
    start = 0
    while start < len(ids):
        stop = min(start + PIECE, len(ids))
        inside = np.flatnonzero(whole[start + 1 : stop + 1])
        if len(inside):
            stop = start + 1 + int(inside[-1])
        else:
            stop += int(np.flatnonzero(whole[stop:])[0])
        first, last = image[start] // config.tokens_per_tile, image[stop] // config.tokens_per_tile
        yield slice(start, stop), tiles[first:last] if tiles is not None and last > first else None
        start = stop


def facts(runner: Any) -> dict[str, Any]:
    """Name and version of a runner's runtime, for the report."""
    from importlib.metadata import PackageNotFoundError, version

    name = {"OnnxRuntimeRunner": "onnxruntime", "ExecuTorchRunner": "executorch"}.get(
        type(runner).__name__, "torch"
    )
    for package in (name, f"{name}-gpu"):
        try:
            return {"runtime": name, "version": version(package)}
        except PackageNotFoundError:
            continue
    return {"runtime": name, "version": "unknown"}

"""Rendered scenes as training data: which rows a step reads follows from (seed, step) alone."""

from collections.abc import Iterator

import numpy as np
import torch

from mmmamba_edge.distill.batches import Batch, Share, StepBatches
from mmmamba_edge.distill.permutation import Permutation
from mmmamba_edge.distill.scenes.dataset import SceneCache
from mmmamba_edge.distill.scenes.tokenizer import PAD
from mmmamba_edge.errors import UserError


class SceneSource:
    """Epochs over the first `count` scenes of a cache, each in an order of its own.

    Args:
        cache: rendered scenes.
        count: how many are in use.
        seed: of the order.
        answers_only: only positions that predict an answer's token count; else every real token.
    """

    def __init__(self, cache: SceneCache, count: int, seed: int, *, answers_only: bool) -> None:
        if not 1 <= count <= (there := len(cache)):
            raise UserError(f"{cache.folder}: {there} scenes there, {count} asked for")
        self.cache, self.count, self.seed, self.answers_only = cache, count, seed, answers_only
        self._orders: dict[int, Permutation] = {}

    def steps(self, position: dict | None, share: Share) -> Iterator[StepBatches]:
        """As in `Source`; the position is the number of rows read."""
        if share.rows > self.count:
            raise UserError(f"batch {share.rows}: more than the {self.count} scenes in use")
        done = position["rows"] if position else 0
        while True:
            rows = [
                self._scene(i) for i in range(done + share.rank, done + share.rows, share.world)
            ]
            micro = [
                self._batch(np.array(rows[i : i + share.micro_rows]))
                for i in range(0, len(rows), share.micro_rows)
            ]
            done += share.rows
            yield StepBatches(micro, {"rows": done})

    def _scene(self, i: int) -> int:
        epoch, place = divmod(i, self.count)
        if epoch not in self._orders:
            self._orders = {epoch: Permutation(self.count, (self.seed, epoch))}
        return self._orders[epoch][place]

    def _batch(self, picks: np.ndarray) -> Batch:
        # Not cut to the longest row: rows fill the cache's length anyway, and compiled code likes
        # one shape.
        rows = self.cache.rows(picks)
        real = rows.ids != PAD
        lengths = real.sum(1)
        weights = real.astype(np.float32)
        if self.answers_only:
            weights[:, :-1], weights[:, -1] = rows.mask[:, 1:], 0.0
        images = rows.images[rows.has_image].transpose(0, 3, 1, 2)
        return Batch(
            torch.from_numpy(rows.ids.astype(np.int64)),
            torch.from_numpy(lengths.astype(np.int64)),
            torch.from_numpy(weights),
            torch.from_numpy(np.ascontiguousarray(images)) if len(images) else None,
        )

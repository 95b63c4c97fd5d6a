"""How far one model's answers are from another's: figures for each position, and their intervals.

Streamed: logits come a few positions at a time and are forgotten; a position leaves six numbers.
Distributions are compared in float64, for in float32 a divergence below 1e-7 would be noise.

Intervals are 95 % by a paired bootstrap over *units*, not over positions: neighbours in a text
share their past, so that positions alone would make an interval that is too narrow. A unit is up
to `UNIT` neighbouring positions of one sequence; both models are always resampled together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

UNIT = 128  # positions that are resampled together
RESAMPLES = 1000
ELEMENTS = 1 << 21  # of logits in float64 at a time
TOP = 5
WORST = 10  # positions that are kept with what was said there
APART = 8  # positions between two of them, at least: one slip is often a run of them

TEXT, IMAGE, ANSWER = range(3)
KINDS = ("text", "image", "answer")  # of a position, by number

QUANTILES = {"median_kld": 0.5, "p99_kld": 0.99, "p999_kld": 0.999}


# --- one position ---------------------------------------------------------------------------------


class Columns(NamedTuple):
    """What is known of some positions; every array is (positions,).

    Attributes:
        kld: KL(reference || artefact) in nats.
        same: the likeliest token is the same.
        top5: share of the reference's five likeliest tokens among the artefact's five.
        nll: -log p of the token that follows, artefact; NaN where none or a picture follows.
        reference_nll: likewise, reference.
    """

    kld: Wide
    same: NDArray[np.bool_]
    top5: Wide
    nll: Wide
    reference_nll: Wide


def compare(got: Floats, want: Floats, following: NDArray[np.int64]) -> Columns:
    """Compare logits.

    Args:
        got: the artefact's, (positions, vocab_size).
        want: the reference's, likewise.
        following: (positions,) the token that really follows; below 0: nothing to predict.
    """
    step = max(1, ELEMENTS // got.shape[1])
    parts = [
        _compare(got[i : i + step], want[i : i + step], following[i : i + step])
        for i in range(0, len(got), step)
    ]
    return Columns._make(np.concatenate(column) for column in zip(*parts, strict=True))


def _compare(got: Floats, want: Floats, following: NDArray[np.int64]) -> Columns:
    p, q = log_softmax(want), log_softmax(got)
    # A divergence is never negative; its sum of rounded terms may be, by 1e-16.
    kld = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0)
    rows, ids = np.arange(len(got)), np.maximum(following, 0)
    return Columns(
        kld, got.argmax(1) == want.argmax(1), _shared(got, want),
        np.where(following < 0, np.nan, -q[rows, ids]),
        np.where(following < 0, np.nan, -p[rows, ids]),
    )  # fmt: skip


def log_softmax(logits: Floats) -> Wide:
    """log softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def likeliest(logits: Floats, count: int = TOP) -> NDArray[np.int64]:
    """(positions, count) ids, the likeliest first."""
    count = min(count, logits.shape[1])
    ids = np.argpartition(-logits, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)


def _shared(got: Floats, want: Floats) -> Wide:
    ours, theirs = likeliest(got), likeliest(want)
    return (ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean(axis=1)


# --- all of them ----------------------------------------------------------------------------------


class Slip(NamedTuple):
    """A position where the two differ most."""

    kld: float
    sequence: int
    position: int
    got: list[tuple[int, float]]  # likeliest ids, with their probabilities
    want: list[tuple[int, float]]


@dataclass
class Scores:
    """What was measured at every scored position, in reading order."""

    columns: list[Columns] = field(default_factory=list)
    kinds: list[NDArray[np.uint8]] = field(default_factory=list)
    sequences: list[NDArray[np.int64]] = field(default_factory=list)
    positions: list[NDArray[np.int64]] = field(default_factory=list)
    slips: list[Slip] = field(default_factory=list)

    def add(
        self, sequence: int, positions: NDArray[np.int64], kinds: NDArray[np.uint8], got: Floats,
        want: Floats, following: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Some positions of one sequence; arguments as for `compare`."""
        found = compare(got, want, following)
        self.columns.append(found)
        self.kinds.append(kinds)
        self.sequences.append(np.full(len(positions), sequence))
        self.positions.append(positions)
        least = self.slips[-1].kld if len(self.slips) >= 4 * WORST else -1.0
        spoken = np.where(kinds == IMAGE, -1.0, found.kld)  # nobody reads what is said amid pixels
        for row in np.argsort(-spoken)[: 4 * WORST]:
            if not spoken[row] > least:
                break
            self.slips.append(
                Slip(
                    float(spoken[row]), sequence, int(positions[row]), _said(got[row]),
                    _said(want[row]),
                )
            )  # fmt: skip
        self.slips = sorted(self.slips, key=lambda slip: -slip.kld)[: 4 * WORST]

    def whole(self) -> "Table":
        """Everything, as arrays."""
        return Table(
            Columns._make(np.concatenate(column) for column in zip(*self.columns, strict=True)),
            np.concatenate(self.kinds), np.concatenate(self.sequences),
            np.concatenate(self.positions),
        )  # fmt: skip

    def worst(self) -> list[Slip]:
        """The positions that differ most, no two of them neighbours."""
        kept: list[Slip] = []
        for slip in self.slips:
            near = (
                s.sequence == slip.sequence and abs(s.position - slip.position) < APART
                for s in kept
            )
            if not any(near):
                kept.append(slip)
        return kept[:WORST]


def _said(logits: Floats) -> list[tuple[int, float]]:
    ids = likeliest(logits[None])[0]
    p = np.exp(log_softmax(logits[None])[0, ids])
    return [(int(i), float(x)) for i, x in zip(ids, p, strict=True)]


@dataclass(frozen=True)
class Table:
    """Scored positions; every array is (positions,)."""

    columns: Columns
    kinds: NDArray[np.uint8]
    sequences: NDArray[np.int64]
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kinds)

    def where(self, mask: NDArray[np.bool_]) -> "Table":
        """Those positions only."""
        columns = Columns._make(column[mask] for column in self.columns)
        return Table(columns, self.kinds[mask], self.sequences[mask], self.positions[mask])

    def of(self, *kinds: int) -> "Table":
        """Positions of some kinds."""
        return self.where(np.isin(self.kinds, kinds))


# --- figures and intervals ------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def figures(table: Table, seed: int = 0) -> dict[str, Estimate]:
    """The figures of some positions: means, quantiles, agreement, perplexity.

    Args:
        table: positions; at least one.
        seed: of the bootstrap.

    Returns:
        mean_kld, median_kld, p99_kld, p999_kld (nats), top1, top5 (shares) and, where a token
        follows anywhere, ppl_ratio: the artefact's perplexity by the reference's.
    """
    assert len(table)
    c = table.columns
    draws = Draws(table, seed)
    out = {"mean_kld": draws.mean(c.kld)}
    out |= draws.quantiles(c.kld, QUANTILES)
    out |= {"top1": draws.mean(c.same.astype(np.float64)), "top5": draws.mean(c.top5)}
    known = ~np.isnan(c.reference_nll)  # of the artefact's own, NaN would be a broken model
    if known.any():
        worse = draws.mean(np.where(known, c.nll - c.reference_nll, 0), known)
        with np.errstate(over="ignore"):
            out["ppl_ratio"] = Estimate(*(float(x) for x in np.exp(worse)))
    return out


class Draws:
    """Resampled units of some positions: the same ones for every figure."""

    def __init__(self, table: Table, seed: int) -> None:
        keys = table.sequences * (1 << 32) + table.positions // UNIT
        _, unit = np.unique(keys, return_inverse=True)
        self.unit: NDArray[np.int64] = unit
        self.units = int(unit.max()) + 1
        rng = np.random.default_rng(seed)
        equal = np.full(self.units, 1 / self.units)
        self.counts = rng.multinomial(self.units, equal, RESAMPLES).astype(np.float64)

    def mean(self, values: Wide, counted: NDArray[np.bool_] | None = None) -> Estimate:
        """Of `values` (positions,), those `counted` only."""
        weight = np.ones(len(values)) if counted is None else counted.astype(np.float64)
        sums = np.bincount(self.unit, values * weight, self.units)
        sizes = np.bincount(self.unit, weight, self.units)
        drawn = self.counts @ sizes
        with np.errstate(invalid="ignore"):
            means = (self.counts @ sums)[drawn > 0] / drawn[drawn > 0]
        return _estimate(float(sums.sum() / sizes.sum()), means)

    def quantiles(self, values: Wide, asked: dict[str, float]) -> dict[str, Estimate]:
        """Quantiles of `values` (positions,), by name."""
        if not np.isfinite(values).all():
            return {name: Estimate(np.nan, np.nan, np.nan) for name in asked}
        order = np.argsort(values)
        ranked, unit = values[order], self.unit[order]
        drawn = np.empty((RESAMPLES, len(asked)))
        shares = np.array(list(asked.values()))
        for row, counts in enumerate(self.counts):
            below = np.cumsum(counts[unit])
            place = np.searchsorted(below, shares * below[-1])
            drawn[row] = ranked[np.minimum(place, len(ranked) - 1)]
        whole = np.quantile(ranked, shares, method="inverted_cdf")
        return {name: _estimate(float(whole[i]), drawn[:, i]) for i, name in enumerate(asked)}


def _estimate(value: float, drawn: Wide) -> Estimate:
    if not np.isfinite(value) or not np.isfinite(drawn).all():
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


# --- answers --------------------------------------------------------------------------------------


def flips(right: Sequence[bool], reference: Sequence[bool], seed: int = 0) -> dict[str, Estimate]:
    """How answers to the same questions changed.

    An answer is right where every one of its tokens is the likeliest after the true ones before
    it: exactly then greedy decoding would have given it, so nothing need be generated.

    Args:
        right: of each answer, whether the artefact gives it.
        reference: likewise, the reference.
        seed: of the bootstrap, over answers.

    Returns:
        accuracy, reference_accuracy, delta, flips: shares of the answers.
    """
    got, want = np.array(right, np.float64), np.array(reference, np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(got), (RESAMPLES, len(got)))
    parts = {
        "accuracy": got, "reference_accuracy": want, "delta": got - want, "flips": got != want,
    }  # fmt: skip
    return {
        name: _estimate(float(np.mean(values)), np.mean(values[drawn], axis=1))
        for name, values in parts.items()
    }


# --- shapes ---------------------------------------------------------------------------------------


def by_position(table: Table) -> list[dict[str, float]]:
    """Mean divergence of text and answers by place in the sequence, in buckets that grow fourfold.

    Returns:
        Buckets in order: first, stop (positions), count, mean_kld, low, high, top1.
    """
    out: list[dict[str, float]] = []
    edges = [0, 64, *(256 * 4**i for i in range(9))]
    for first, stop in zip(edges, edges[1:], strict=False):
        part = table.where((table.positions >= first) & (table.positions < stop))
        if len(part):
            kld = Draws(part, 0).mean(part.columns.kld)
            out.append(
                {
                    "first": first, "stop": stop, "count": len(part), "mean_kld": kld.value,
                    "low": kld.low, "high": kld.high, "top1": float(part.columns.same.mean()),
                }
            )  # fmt: skip
    return out


def histogram(table: Table) -> dict[str, list[float]]:
    """Positions by the size of their divergence: edges in log10 nats, one more than counts."""
    edges = np.arange(-12, 2.5, 0.5)
    sizes = np.log10(np.clip(table.columns.kld, 1e-12, 10**1.99))
    counts, _ = np.histogram(sizes, edges)
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    return {"log10_edges": edges[first : last + 1].tolist(), "counts": counts[first:last].tolist()}

"""One tensor of a bundle against the checkpoint's: how good an approximation, and what is wrong.

Codes are an approximation, so the question is whether they are as good a one as rounding to nearest
with the same bits and groups would be; better methods trade a little of it for a better answer, not
10 dB.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.export.weights import Weights
from mmmamba_edge.quant.codes import Codes, quantize_int4, quantize_int8
from mmmamba_edge.quant.held_matrices import Matrix
from mmmamba_edge.quant.initializers import Initializers

Floats = NDArray[np.float32]

ROWS_DB = 10.0  # a matrix this much worse than rounded to nearest is not that matrix
FLOAT_DB = 60.0  # of what is kept in float16 or float32
SCALE = {8: (0.8, 1.25), 4: (0.65, 1.55)}  # a scale's factor between these may be a method's choice


@dataclass(frozen=True)
class Finding:
    """One tensor of the checkpoint, as the bundle has it.

    Attributes:
        name: training name.
        bits: of its codes; 32 or 16 where it is kept.
        sqnr_db: of the bundle's numbers.
        expected_db: of rounding to nearest with the same bits and groups.
        fault: what is wrong with it; empty: nothing.
    """

    name: str
    bits: int
    sqnr_db: float
    expected_db: float
    fault: str = ""


def compare(name: str, got: Matrix | None, want: Floats) -> Finding | None:
    """A matrix against what it should stand for, fold included."""
    if got is None:
        return None
    if (got.count, got.columns) != want.shape:
        fault = f"it is {got.count} x {got.columns}, not {want.shape[0]} x {want.shape[1]}"
        return Finding(name, got.bits, 0.0, 0.0, fault)
    sums = _Sums(got.columns)
    scale_fault = ""
    for rows, part in got.blocks():
        wanted = want[rows]
        if isinstance(part, Codes):
            number = part.dequantized()
            nearest = quantize_int4(wanted, got.group) if part.bits == 4 else quantize_int8(wanted)
            sums.add(number, wanted, nearest.dequantized())
            scale_fault = scale_fault or _scale_fault(
                part, number, wanted, nearest.scale, rows.start
            )
        else:
            sums.add(part, wanted, wanted.astype(np.float16) if got.bits == 16 else wanted)
    db, expected = sums.db(sums.error), sums.db(sums.nearest)
    floor = expected - ROWS_DB if got.bits < 16 else FLOAT_DB
    if db >= floor:
        return Finding(name, got.bits, db, expected, scale_fault)
    if sums.db(sums.swapped) >= floor - ROWS_DB and got.bits == 4:
        fault = "neighbouring codes are swapped: nibbles in the wrong order"
    elif sums.db(sums.error - sums.explained) >= floor - ROWS_DB:
        low, high = np.quantile(sums.factors, (0.01, 0.99))
        if high / max(low, 1e-9) < 1.05:
            fault = f"all its numbers are {np.median(sums.factors):.3g} times what they should be"
        else:
            fault = (
                f"its columns are multiplied by {low:.2g} to {high:.2g} and nothing before them "
                "is divided: a fold was done by half"
            )
    else:
        fault = scale_fault or "its numbers are not those of the checkpoint"
    return Finding(name, got.bits, db, expected, fault)


class _Sums:
    """Sums over a matrix that is seen a few rows at a time."""

    def __init__(self, columns: int) -> None:
        self.signal = self.error = self.nearest = self.swapped = 0.0
        self._cross, self._power = np.zeros(columns), np.zeros(columns)

    def add(self, got: Floats, want: Floats, nearest: NDArray[Any]) -> None:
        got64, want64 = got.astype(np.float64), want.astype(np.float64)
        self.signal += float(np.square(want64).sum())
        self.error += float(np.square(got64 - want64).sum())
        self.nearest += float(np.square(nearest - want64).sum())
        if got.shape[1] % 2 == 0:
            turned = got64.reshape(len(got), -1, 2)[:, :, ::-1].reshape(got.shape)
            self.swapped += float(np.square(turned - want64).sum())
        self._cross += (got64 * want64).sum(axis=0)
        self._power += np.square(want64).sum(axis=0)

    @property
    def factors(self) -> NDArray[np.float64]:
        """(columns,) what each column seems to be multiplied by."""
        return np.where(self._power > 0, self._cross / np.maximum(self._power, 1e-300), 1.0)

    @property
    def explained(self) -> float:
        """How much of the error those factors explain."""
        return float((np.square(self.factors - 1) * self._power).sum())

    def db(self, error: float) -> float:
        """Signal to `error` in dB, at most 200."""
        if not np.isfinite(error):
            return -200.0
        if error == 0:
            return 200.0
        return float(min(200.0, 10 * np.log10((self.signal + 1e-300) / (error + 1e-300))))


def _scale_fault(part: Codes, got: Floats, want: Floats, nearest: Floats, first: int) -> str:
    """The first group whose scale is off by a factor; empty if none is.

    A group whose weights are all small beside its scale's step says nothing of it.
    """
    rows, groups = part.scale.shape
    wide_got = got.reshape(rows, groups, -1).astype(np.float64)
    wide = want.reshape(rows, groups, -1).astype(np.float64)
    power = np.square(wide).sum(axis=2)
    telling = power / wide.shape[2] > np.square(nearest)
    factor = np.where(telling, (wide_got * wide).sum(axis=2) / np.maximum(power, 1e-300), 1.0)
    low, high = SCALE[part.bits]
    wrong = np.argwhere(~((factor >= low) & (factor <= high)))
    if not len(wrong):
        return ""
    row, group = (int(i) for i in wrong[0])
    at = f"row {first + row}" + (f", group {group}" if groups > 1 else "")
    return f"scale of {at} is {factor[row, group]:.2f} times what its weights call for"


def norm(
    held: Initializers, weights: Weights, name: str, repeat: int = 1
) -> tuple[Floats, Finding | None]:
    """What a norm's weight leaves to the columns behind it, and what is to be said of it."""
    want = np.tile(weights.tensor(name), repeat)
    got = held.get(name)
    if got is None:
        return np.ones(len(want), np.float32), None
    flat = np.ravel(got).astype(np.float32)
    got = np.tile(flat, repeat) if len(flat) * repeat == len(want) else flat
    by_head = held.get(f"{name.removesuffix('.weight')}.by_head")  # of a fold into a shared norm
    if by_head is not None and by_head.size == got.size:
        got = got * np.ravel(by_head)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.ones(len(want), np.float32), same(name, got, want)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(got != 0, want / got, 1.0).astype(np.float32)
    if np.allclose(factor, 1, atol=1e-6):
        return np.ones(len(want), np.float32), same(name, got, want)
    # Right if the columns behind it are multiplied by `factor`: they are judged by that.
    return factor, Finding(name, 32, 200.0, 200.0)


def columns_fit(got: Matrix, want: Floats) -> bool:
    """Whether no column of a matrix is off by a factor: one among many hides in a sum."""
    sums = _Sums(got.columns)
    for rows, block in got.blocks():
        number = block.dequantized() if isinstance(block, Codes) else block
        sums.add(number, want[rows], want[rows])
    low, high = SCALE.get(got.bits, (0.99, 1.01))
    return bool(((sums.factors >= low) & (sums.factors <= high)).all())


def row_factors(part: Matrix, want: Floats) -> Floats:
    """(rows,) what each row seems to be multiplied by."""
    out = np.ones(part.count, np.float32)
    for rows, block in part.blocks():
        got = block.dequantized() if isinstance(block, Codes) else block
        power = np.square(want[rows], dtype=np.float64).sum(axis=1)
        cross = (got * want[rows]).sum(axis=1, dtype=np.float64)
        out[rows] = np.where(power > 0, cross / np.maximum(power, 1e-300), 1.0)
    return np.where(np.abs(out) > 1e-6, out, 1)


def same(name: str, got: NDArray[Any] | None, want: Floats) -> Finding | None:
    """A tensor that no scheme rounds."""
    if got is None:
        return None
    if got.size != want.size:
        return Finding(name, 32, 0.0, 200.0, f"it has {got.size} numbers, not {want.size}")
    sums = _Sums(want.size)
    sums.add(got.reshape(1, -1).astype(np.float32), want.reshape(1, -1), want.reshape(1, -1))
    db = sums.db(sums.error)
    fault = "" if db >= FLOAT_DB else "its numbers are not those of the checkpoint"
    return Finding(name, 32, db, 200.0, fault)

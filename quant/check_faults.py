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

# A matrix so much worse than rounded to nearest needs a reason; a fault that explains it is one.
SUSPECT_DB = 10.0
# So much worse is another matrix. GPTQ on 120 tokens of calibration, far too few, came to 10.
BROKEN_DB = 15.0
EXPLAINED_DB = 6.0  # a fault explains an error if what is left is this near to rounding's own
LAST = {8: 127, 4: 7}  # the codes at the end of the range, in size
FLOAT_DB = 60.0  # of what is kept in float16 or float32
SCALE = (0.75, 1.33)  # a scale's factor between these may be a method's choice
CHANCE = 6.0  # standard errors of that factor that chance reaches in no model: one group in 1e9
COLUMN = (0.4, 1.75)  # likewise of a column, over all rows


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
    sums, scales = _Sums(got.columns), _Scales()
    for rows, part in got.blocks():
        wanted = want[rows]
        if isinstance(part, Codes):
            number = part.dequantized()
            nearest = quantize_int4(wanted, got.group) if part.bits == 4 else quantize_int8(wanted)
            sums.add(number, wanted, nearest.dequantized())
            scales.add(part, wanted, nearest, rows.start)
        else:
            sums.add(part, wanted, wanted.astype(np.float16) if got.bits == 16 else wanted)
    db, expected = sums.db(sums.error), sums.db(sums.nearest)
    return Finding(name, got.bits, db, expected, _fault(got.bits, sums, scales, db, expected))


def _fault(bits: int, sums: "_Sums", scales: "_Scales", db: float, expected: float) -> str:
    """What is wrong with a matrix; empty if nothing is."""
    if bits >= 16 and db >= FLOAT_DB or bits < 16 and db >= expected - SUSPECT_DB:
        return scales.fault()
    explained = max(expected if bits < 16 else FLOAT_DB, db) - EXPLAINED_DB
    if bits == 4 and sums.db(sums.swapped) >= explained:
        return "neighbouring codes are swapped: nibbles in the wrong order"
    if sums.db(sums.error - sums.explained) >= explained:
        low, high = np.quantile(sums.factors, (0.01, 0.99))
        if low > 0 and high / low < 1.05:
            return f"all its numbers are {np.median(sums.factors):.3g} times what they should be"
        return (
            f"its columns are multiplied by {low:.2g} to {high:.2g} and nothing before them is "
            "divided: a fold was done by half"
        )
    if scales.fault():
        return scales.fault()
    broken = bits >= 16 or not db >= expected - BROKEN_DB
    return "its numbers are not those of the checkpoint" if broken else ""


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


class _Scales:
    """Groups of a matrix whose scale is off by a factor.

    Told by what is left once the factor is taken out: of a wrong scale rounding's own error, of a
    group that GPTQ has moved to make up for others far more. Weights at the end of the codes' range
    do not count: a method that clips them has made them smaller on purpose, and all of a group
    where one column of much larger inputs has chosen the scale.
    """

    def __init__(self) -> None:
        self._wrong = self._groups = 0
        self._first = ""

    def add(self, got: Codes, want: Floats, nearest: Codes, first: int) -> None:
        """Some rows, the first of which is number `first`."""
        rows, groups = nearest.scale.shape

        def grouped(x: Floats) -> NDArray[np.float64]:
            return x.reshape(rows, groups, -1).astype(np.float64)

        inside = (np.abs(got.codes) < LAST[got.bits]).reshape(rows, groups, -1)
        a, b = inside * grouped(got.dequantized()), inside * grouped(want)
        power = np.square(b).sum(axis=2)
        factor = (a * b).sum(axis=2) / np.maximum(power, 1e-300)
        left = np.square(a - factor[..., None] * b).sum(axis=2)
        error = inside * (grouped(nearest.dequantized()) - b)
        rounding = np.square(factor) * np.square(error).sum(axis=2)
        # Weights that are all small beside the scale's step say nothing of it.
        telling = power > np.maximum(inside.sum(axis=2), 1) * np.square(nearest.scale)
        low, high = SCALE
        off = ~((factor >= low) & (factor <= high))
        spread = left / np.maximum(inside.sum(axis=2) - 1, 1)  # the factor's variance times power
        off &= np.square(factor - 1) * power > CHANCE**2 * spread
        wrong = telling & off & (left <= rounding * 10 ** (EXPLAINED_DB / 10))
        self._groups += rows * groups
        self._wrong += int(wrong.sum())
        if wrong.any() and not self._first:
            row, group = (int(i) for i in np.argwhere(wrong)[0])
            at = f"row {first + row}" + (f", group {group}" if groups > 1 else "")
            self._first = (
                f"scale of {at} is {factor[row, group]:.2f} times what its weights call for"
            )

    def fault(self) -> str:
        """The first of them, and how many there are; empty if there is none."""
        if self._wrong < 2:
            return self._first
        return f"{self._first}; so are {self._wrong - 1:,} more of {self._groups:,}"


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
    low, high = COLUMN if got.bits < 16 else (0.99, 1.01)
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

"""A bundle's weights against the checkpoint's, tensor by tensor: which one is wrong, and how.

Codes are an approximation, so the question is whether they are as good a one as rounding to nearest
with the same bits and groups would be; better methods trade a little of it for a better answer, not
10 dB. What a fold moves from a norm into the columns behind it (or from a product's columns into
the rows before it) is followed, so that smoothed models pass and a fold done by half is seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.export.decoder_graph import unpacked_rows
from mmmamba_edge.export.weights import EMBEDDING, HEAD, PROJECTOR, STEM, Weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.quant.codes import Codes, quantize_int4, quantize_int8, unpack_blocks
from mmmamba_edge.quant.initializers import Initializers
from mmmamba_edge.status import Report, silent

Floats = NDArray[np.float32]

ROWS_DB = 10.0  # a matrix this much worse than rounded to nearest is not that matrix
FLOAT_DB = 60.0  # of what is kept in float16 or float32
SCALE = {8: (0.8, 1.25), 4: (0.65, 1.55)}  # a scale's factor between these may be a method's choice
BLOCK = 1 << 22  # elements at a time


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


def check_tensors(
    folder: Path, manifest: Manifest, weights: Weights, say: Report = silent
) -> tuple[list[Finding], list[str]]:
    """Compare every tensor that the bundle's graphs hold under a name of ours.

    Args:
        folder: the bundle, with graphs in ONNX.
        manifest: its manifest.
        weights: of the checkpoint, in float32.
        say: told how far it is.

    Returns:
        What was found of each tensor, and the names of those that the graphs do not show.
    """
    decoder = Initializers(folder / manifest.graphs["decoder"])
    embed = Initializers(folder / manifest.graphs["embed"])
    vision = Initializers(folder / manifest.graphs["vision"])
    found: list[Finding] = []
    unseen: list[str] = []
    config = weights.config

    def note(what: Finding | None, name: str) -> None:
        if what is None:
            unseen.append(name)
        else:
            found.append(what)

    total = len(config.layer_types)
    for index, kind in enumerate(config.layer_types):
        say("comparing weights, layer", index, total)
        _Layer(decoder, weights, index, kind, note).check()
    say("comparing weights, layer", total, total)
    rows = held_matrix(embed, "embedding")
    note(_compare(EMBEDDING, rows, weights.seen(EMBEDDING)), EMBEDDING)
    name = "language_model.model.norm.weight"
    factor, what = _norm(decoder, weights, name)
    note(what, name)
    head = held_matrix(decoder, "head")
    note(_compare(HEAD, head, weights.seen(HEAD) * factor), HEAD)
    for part in ("0", "2"):
        name = f"{PROJECTOR}{part}.weight"
        note(_compare(name, held_matrix(vision, f"mlp.{part}"), weights.tensor(name)), name)
        name = f"{PROJECTOR}{part}.bias"
        note(_same(name, vision.get(f"mlp.{part}.bias"), weights.tensor(name)), name)
    for ours, name in (("patch.weight", "patch_embedding.weight"),
                       ("patch.bias", "patch_embedding.bias")):  # fmt: skip
        note(_same(STEM + name, vision.get(ours), weights.tensor(STEM + name)), STEM + name)
    name = f"{STEM}position_embedding"  # its first row is the class token's, which no graph has
    note(_same(name, vision.get("positions"), weights.tensor(name)[0, 1:].T), name)
    return found, unseen


class _Layer:
    """The tensors of one decoder layer."""

    def __init__(
        self, held: Initializers, weights: Weights, index: int, kind: str,
        note: Callable[[Finding | None, str], None],
    ) -> None:  # fmt: skip
        self.held, self.weights, self.kind, self.note = held, weights, kind, note
        self.stack = weights.config.stack_of(index)
        self.prefix = weights.prefix(index)

    def check(self) -> None:
        p = self.prefix
        factor = self.norm(f"{p}attention_norm.weight")
        if self.kind == "mamba2":
            self.mixer(f"{p}attention.", factor)
        else:
            self.attention(f"{p}attention.", factor)
        factor = self.norm(f"{p}ffn_norm.weight")
        self.feed_forward(f"{p}feed_forward.", factor)

    def norm(self, name: str) -> Floats:
        """What the norm leaves to the columns behind it: (columns,), all 1 without a fold."""
        factor, what = _norm(self.held, self.weights, name)
        self.note(what, name)
        return factor

    def product(self, name: str, stored: str, factor: Floats | float = 1.0) -> None:
        got = held_matrix(self.held, stored)
        self.note(_compare(name, got, self.weights.tensor(name) * factor), name)

    def mixer(self, a: str, factor: Floats) -> None:
        w, held = self.weights, self.held
        names = [f"{a}{x}_proj.weight" for x in "vkqg"]
        dt = f"{a}in_proj.weight"
        fused = held_matrix(held, f"{a}vkqg")
        if fused is None:
            fused, names = held_matrix(held, f"{a}vkqgdt"), [*names, dt]
        else:
            got = held.get(f"{a}dt.weight")
            self.note(_same(dt, None if got is None else got.T, w.tensor(dt) * factor), dt)
        start = 0
        for name in names:
            want = w.tensor(name) * factor
            part = None if fused is None else fused.rows(start, start + len(want))
            self.note(_compare(name, part, want), name)
            start += len(want)
        conv = f"{a}conv1d.weight"
        kernel = held.get(conv)
        if kernel is None:
            taps = [held.get(f"{a}conv1d.tap{i}") for i in range(2)]
            if not any(tap is None for tap in taps):
                kernel = np.stack([np.ravel(cast(Floats, tap)) for tap in taps], axis=-1)[:, None]
        self.note(_same(conv, kernel, w.tensor(conv)), conv)
        for name in ("conv1d.bias", "dt_bias"):
            self.note(_same(a + name, held.get(a + name), w.tensor(a + name)), a + name)
        name = f"{a}A_log_bias"
        self.note(_same(name, held.get(f"{a}a"), -np.exp(w.tensor(name))), name)
        # The norm is shared by the heads; one that took a fold has a number for each channel.
        name, heads = f"{a}g_norm.weight", self.stack.num_attention_heads
        factor, what = _norm(held, w, name, repeat=heads)
        self.note(what, name)
        self.product(f"{a}o_proj.weight", f"{a}o_proj", factor)

    def attention(self, a: str, factor: Floats) -> None:
        stack = self.stack
        packed, out = f"{a}wqkv.weight", f"{a}wo.weight"
        q, k, v = unpacked_rows(stack)
        whole = self.weights.tensor(packed) * factor
        got = held_matrix(self.held, f"{a}qkv")
        size, end = len(q) + len(k), len(q) + len(k) + len(v)
        part = None if got is None else got.rows(0, size)
        self.note(_compare(packed, part, whole[np.concatenate([q, k])]), packed)
        part = None if got is None else got.rows(size, end)
        groups = stack.num_attention_heads // stack.num_key_value_heads

        def spread(factors: Floats) -> Floats:  # every query head reads its value head's channels
            by_head = factors.reshape(stack.num_key_value_heads, 1, stack.head_dim)
            return np.repeat(by_head, groups, axis=1).ravel()

        wo = held_matrix(self.held, f"{a}wo")
        self.pair(packed, part, whole[v], out, wo, self.weights.tensor(out), spread)

    def feed_forward(self, f: str, factor: Floats) -> None:
        w = self.weights
        names = [f"{f}{name}.weight" for name in ("w1", "w3", "w2")]
        gate_up, down = held_matrix(self.held, f"{f}w1w3"), held_matrix(self.held, f"{f}w2")
        gate, up = w.tensor(names[0]) * factor, w.tensor(names[1]) * factor
        inner = len(gate)
        part = None if gate_up is None else gate_up.rows(0, inner)
        self.note(_compare(names[0], part, gate), names[0])
        part = None if gate_up is None else gate_up.rows(inner, 2 * inner)
        self.pair(names[1], part, up, names[2], down, w.tensor(names[2]), lambda x: x)

    def pair(
        self, before: str, part: Matrix | None, up: Floats, behind: str, down: Matrix | None,
        want: Floats, spread: Callable[[Floats], Floats],
    ) -> None:  # fmt: skip
        """Rows of one matrix that may have given factors to columns of the next."""
        found = _compare(before, part, up), _compare(behind, down, want)
        if part is not None and down is not None and any(x and x.fault for x in found):
            moved = _row_factors(part, up)
            folded = want / spread(moved)
            other = _compare(before, part, up * moved[:, None]), _compare(behind, down, folded)
            if not any(x and x.fault for x in other) and _columns_fit(down, folded):
                found = other
        for what, name in zip(found, (before, behind), strict=True):
            self.note(what, name)


# --- matrices as the graphs hold them -------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """Rows of a matrix as a graph holds it, read when they are looked at.

    Attributes:
        count, columns: its shape.
        bits: 8 or 4 of codes; 16 or 32 of numbers.
        group: columns that share a scale.
    """

    count: int
    columns: int
    bits: int  # 32 and 16: numbers
    group: int
    read: Callable[[int, int], Codes | Floats]
    first: int = 0

    def rows(self, start: int, stop: int) -> "Matrix":
        """Some of them, as a matrix of their own."""
        return Matrix(
            stop - start, self.columns, self.bits, self.group, self.read, self.first + start
        )

    def blocks(self) -> Iterator[tuple[slice, Codes | Floats]]:
        """All rows, some at a time."""
        step = max(1, BLOCK // self.columns)
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            yield slice(start, stop), self.read(self.first + start, self.first + stop)


def held_matrix(held: Initializers, name: str) -> Matrix | None:
    """The matrix that a graph holds as `name`, in whichever form; None where it has none."""
    plain = held.get(f"{name}.weight")
    if plain is not None:
        turned = plain if name == "embedding" else plain.T
        bits = 16 if plain.dtype == np.float16 else 32
        return Matrix(
            *turned.shape, bits, turned.shape[1],
            lambda a, b: np.ascontiguousarray(turned[a:b], np.float32),
        )  # fmt: skip
    codes, scales = held.get(f"{name}.codes"), held.get(f"{name}.scales")
    if codes is None or scales is None:
        return None
    options = held.attributes(f"{name}.codes")
    if "K" in options:  # MatMulNBits: (rows, blocks, bytes)
        bits, columns = options["bits"], options["K"]
        scales = scales.reshape(len(codes), -1)

        def packed(a: int, b: int) -> Codes:
            return unpack_blocks(codes[a:b], scales[a:b], columns, bits)

        group = options["block_size"] if bits == 4 else columns
        return Matrix(len(codes), columns, bits, group, packed)
    if held.is_int4(f"{name}.codes"):
        rows, columns = codes.shape[0], 2 * codes.shape[1]

        def pairs(a: int, b: int) -> Codes:
            both = np.stack([codes[a:b] & 15, codes[a:b] >> 4], axis=-1).reshape(b - a, columns)
            signed = ((both ^ 8).astype(np.int8) - 8).astype(np.int8)
            return Codes(signed, np.asarray(scales[a:b]), 4)

        return Matrix(rows, columns, 4, columns // scales.shape[1], pairs)
    turned = codes.T if codes.dtype == np.int8 and name != "embedding" else codes
    offset = 128 if turned.dtype == np.uint8 else 0

    def whole(a: int, b: int) -> Codes:
        part = (turned[a:b].astype(np.int16) - offset).astype(np.int8)
        return Codes(part, np.asarray(scales[a:b]).reshape(b - a, -1)[:, :1])

    return Matrix(len(turned), turned.shape[1], 8, turned.shape[1], whole)


# --- judging --------------------------------------------------------------------------------------


def _compare(name: str, got: Matrix | None, want: Floats) -> Finding | None:
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
            nearest = (
                quantize_int4(wanted, got.group) if part.bits == 4 else quantize_int8(wanted)
            )
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


def _norm(
    held: Initializers, weights: Weights, name: str, repeat: int = 1
) -> tuple[Floats, Finding | None]:
    """What a norm's weight leaves to the columns behind it, and what is to be said of it."""
    want = np.tile(weights.tensor(name), repeat)
    got = held.get(name)
    if got is None:
        return np.ones(len(want), np.float32), None
    flat = np.ravel(got).astype(np.float32)
    got = np.tile(flat, repeat) if len(flat) * repeat == len(want) else flat
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.ones(len(want), np.float32), _same(name, got, want)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(got != 0, want / got, 1.0).astype(np.float32)
    if np.allclose(factor, 1, atol=1e-6):
        return np.ones(len(want), np.float32), _same(name, got, want)
    # Right if the columns behind it are multiplied by `factor`: they are judged by that.
    return factor, Finding(name, 32, 200.0, 200.0)


def _columns_fit(got: Matrix, want: Floats) -> bool:
    """Whether no column of a matrix is off by a factor: one among many hides in a sum."""
    sums = _Sums(got.columns)
    for rows, block in got.blocks():
        number = block.dequantized() if isinstance(block, Codes) else block
        sums.add(number, want[rows], want[rows])
    low, high = SCALE.get(got.bits, (0.99, 1.01))
    return bool(((sums.factors >= low) & (sums.factors <= high)).all())


def _row_factors(part: Matrix, want: Floats) -> Floats:
    """(rows,) what each row seems to be multiplied by."""
    out = np.ones(part.count, np.float32)
    for rows, block in part.blocks():
        got = block.dequantized() if isinstance(block, Codes) else block
        power = np.square(want[rows], dtype=np.float64).sum(axis=1)
        cross = (got * want[rows]).sum(axis=1, dtype=np.float64)
        out[rows] = np.where(power > 0, cross / np.maximum(power, 1e-300), 1.0)
    return np.where(np.abs(out) > 1e-6, out, 1)


def _same(name: str, got: NDArray[Any] | None, want: Floats) -> Finding | None:
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



"""Matrices of an ONNX bundle as the graphs hold them: codes of 8 or 4 bits, half or full floats."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.quant.codes import Codes, unpack_blocks
from mmmamba_edge.quant.initializers import Initializers

Floats = NDArray[np.float32]
BLOCK = 1 << 22  # elements at a time


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
        rows, columns = turned.shape

        def numbers(a: int, b: int) -> Floats:
            return np.ascontiguousarray(turned[a:b], np.float32)

        return Matrix(rows, columns, bits, columns, numbers)
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

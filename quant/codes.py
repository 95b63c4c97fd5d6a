"""The one integer representation: codes and scales that every exporter writes and no one remakes.

Symmetric: weight = code * scale, without a zero point. The rules (quant.md section 5) hold on every
runtime at once:

* 8 bits: codes in -127..127, one scale for each output row;
  4 bits: codes in -8..7, one scale for each group of 32, 64 or 128 neighbours in a row;
* a scale is positive and exact in bfloat16, because some runtimes keep it so; the codes are made
  with the scale that is stored, never with one that is rounded afterwards;
* a scale is at least 2**-14, the smallest normal float16, so that it is exact there as well.

NumPy only: torch and the runtimes meet at these arrays.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

LIMIT = {8: 127, 4: 7}  # largest code; round-to-nearest uses no -128 and no -8
ZERO_POINT = {8: 128, 4: 8}  # of the unsigned number that runtimes store a code in
GROUPS = (32, 64, 128)
MIN_SCALE = 2.0**-14


@dataclass(frozen=True)
class Codes:
    """A quantised matrix (rows, columns): rows are outputs of a Linear or ids of an embedding.

    Attributes:
        codes: (rows, columns) int8.
        scale: (rows, groups) float32, each for `columns / groups` neighbours.
        bits: 8 or 4.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def group(self) -> int:
        """Neighbours in a row that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantized(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, (rows, columns)."""
        rows, groups = self.scale.shape
        return (self.codes.reshape(rows, groups, -1) * self.scale[..., None]).reshape(self.shape)

    def digest(self) -> str:
        """SHA-256 over codes and scales: what two bundles compare."""
        total = hashlib.sha256(np.ascontiguousarray(self.codes).data)
        total.update(np.ascontiguousarray(self.scale).data)
        return total.hexdigest()


def quantize_int8(weight: NDArray[np.float32]) -> Codes:
    """Round a matrix (rows, columns) to 8 bits, one scale a row.

    The error is at most half a scale, everywhere: scales are rounded up, so that nothing is
    clipped.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    return _rounded(weight, weight.shape[1], 8)


def quantize_int4(weight: NDArray[np.float32], group: int) -> Codes:
    """Round a matrix (rows, columns) to 4 bits, one scale for each `group` columns.

    As `quantize_int8`; `group` divides the columns.
    """
    return _rounded(weight, group, 4)


def group_of(columns: int, asked: int) -> int | None:
    """The largest group up to `asked` that divides a matrix's columns; None: 4 bits do not fit."""
    return next((g for g in reversed(GROUPS) if g <= asked and columns % g == 0), None)


def _rounded(weight: NDArray[np.float32], group: int, bits: int) -> Codes:
    rows, columns = weight.shape
    assert columns % group == 0
    grouped = weight.reshape(rows, columns // group, group)
    largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2)).astype(np.float32)
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest).all(axis=1))[0])
        raise ValueError(f"row {row} holds NaN or infinity; such weights cannot be quantised")
    limit = LIMIT[bits]
    scale = bfloat16_up(np.maximum(largest / np.float32(limit), np.float32(MIN_SCALE)))
    codes = grouped / scale[..., None]
    np.rint(codes, out=codes)
    assert np.abs(codes).max(initial=0) <= limit
    return Codes(codes.astype(np.int8).reshape(rows, columns), scale, bits)


def stacked(parts: list[Codes]) -> Codes:
    """Matrices of equal width, bits and group as one, rows below each other; codes are kept."""
    if len(parts) == 1:
        return parts[0]
    return Codes(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        parts[0].bits,
    )


M = TypeVar("M", bound="NDArray[Any] | Codes")


def take_rows(matrix: M, rows: NDArray[np.int64]) -> M:
    """Rows of a matrix in another order, quantised or not."""
    if isinstance(matrix, Codes):
        return Codes(matrix.codes[rows], matrix.scale[rows], matrix.bits)  # pyright: ignore
    return matrix[rows]  # pyright: ignore[reportReturnType]


def pack_blocks(codes: Codes, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The same numbers as ONNX Runtime's MatMulNBits wants them.

    Args:
        codes: (rows, columns).
        block: columns that share a scale there: of 4 bits the group; of 8 any, a row's scale is
            repeated for each of its blocks.

    Returns:
        Bytes (rows, blocks, block * bits / 8): code + 128, or two of code + 8 with the first in the
        low half; the last block padded with zeros' byte. And scales (rows, blocks).
    """
    rows, columns = codes.shape
    blocks = -(-columns // block)
    if codes.bits == 4:
        assert block == codes.group
        unsigned = (codes.codes + np.int8(8)).view(np.uint8)
        data = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
        return data.reshape(rows, blocks, block // 2), codes.scale
    data = np.full((rows, blocks * block), ZERO_POINT[8], np.uint8)
    data[:, :columns] = codes.codes.view(np.uint8) ^ np.uint8(0x80)  # two's complement + 128
    return data.reshape(rows, blocks, block), np.repeat(codes.scale, blocks, axis=1)


def unpack_blocks(
    data: NDArray[np.uint8], scales: NDArray[np.float32], columns: int, bits: int = 8
) -> Codes:
    """`pack_blocks` backwards."""
    flat = data.reshape(len(data), -1)
    if bits == 4:
        pairs = np.stack([flat & np.uint8(15), flat >> np.uint8(4)], axis=-1)
        codes = pairs.reshape(len(data), -1).view(np.int8) - np.int8(8)
        return Codes(codes[:, :columns], scales.copy(), 4)
    return Codes((flat[:, :columns] ^ np.uint8(0x80)).view(np.int8), scales[:, :1].copy())


def bfloat16_up(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest bfloat16 number that is not below `x`, for positive x, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)

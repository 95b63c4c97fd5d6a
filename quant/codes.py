"""The one integer representation: codes and scales that every exporter writes and no one remakes.

Symmetric: weight = code * scale, without a zero point. The rules (quant.md section 5) hold on every
runtime at once:

* codes are int8 in -127..127 (int8), one scale for each output row;
* a scale is positive and exact in bfloat16, because some runtimes keep it so; the codes are made
  with the scale that is stored, never with one that is rounded afterwards;
* a scale is at least 2**-14, the smallest normal float16, so that it is exact there as well.

NumPy only: torch and the runtimes meet at these arrays.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIMIT = 127  # largest code; -128 is left out so that codes are symmetric
MIN_SCALE = 2.0**-14
ZERO_POINT = 128  # of the unsigned byte that ONNX Runtime stores a code in


@dataclass(frozen=True)
class Codes:
    """A quantised matrix (rows, columns): rows are outputs of a Linear or ids of an embedding."""

    codes: NDArray[np.int8]  # (rows, columns)
    scale: NDArray[np.float32]  # (rows, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantized(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, (rows, columns)."""
        return self.codes * self.scale

    def digest(self) -> str:
        """SHA-256 over codes and scales: what two bundles compare."""
        total = hashlib.sha256(np.ascontiguousarray(self.codes).data)
        total.update(np.ascontiguousarray(self.scale).data)
        return total.hexdigest()


def quantize_int8(weight: NDArray[np.float32]) -> Codes:
    """Quantise a matrix to int8, one scale a row.

    Args:
        weight: (rows, columns), finite.

    Returns:
        Codes whose error is at most half a scale, everywhere: the scale is rounded up, so that no
        weight is clipped.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    assert weight.ndim == 2
    largest = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32)
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest[:, 0]))[0])
        raise ValueError(f"row {row} holds NaN or infinity; such weights cannot be quantised")
    scale = bfloat16_up(np.maximum(largest / np.float32(LIMIT), np.float32(MIN_SCALE)))
    codes = np.rint(weight / scale)
    assert np.abs(codes).max(initial=0) <= LIMIT
    return Codes(codes.astype(np.int8), scale)


def stacked(parts: list[Codes]) -> Codes:
    """Matrices of equal width as one, rows below each other: codes are kept as they are."""
    return Codes(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
    )


def take_rows(
    matrix: "NDArray[np.float32] | Codes", rows: NDArray[np.int64]
) -> "NDArray[np.float32] | Codes":
    """Rows of a matrix in another order, quantised or not."""
    if isinstance(matrix, Codes):
        return Codes(matrix.codes[rows], matrix.scale[rows])
    return matrix[rows]


def pack_blocks(codes: Codes, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The same numbers as ONNX Runtime's MatMulNBits (bits 8) wants them.

    Args:
        codes: (rows, columns).
        block: columns that share a scale there; a row's scale is repeated for each of its blocks.

    Returns:
        Bytes (rows, blocks, block), code + 128, the last block padded with zeros' byte; and scales
        (rows, blocks).
    """
    rows, columns = codes.shape
    blocks = -(-columns // block)
    data = np.full((rows, blocks * block), ZERO_POINT, np.uint8)
    data[:, :columns] = codes.codes.view(np.uint8) ^ np.uint8(0x80)  # two's complement + 128
    return data.reshape(rows, blocks, block), np.repeat(codes.scale, blocks, axis=1)


def unpack_blocks(data: NDArray[np.uint8], scales: NDArray[np.float32], columns: int) -> Codes:
    """`pack_blocks` backwards."""
    flat = data.reshape(len(data), -1)[:, :columns]
    return Codes((flat ^ np.uint8(0x80)).view(np.int8), scales[:, :1].copy())


def bfloat16_up(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest bfloat16 number that is not below `x`, for positive x, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)

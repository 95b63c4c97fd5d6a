"""A state in half its bytes, for files and for states that wait: int16 with a scale, or float16.

int16 has a scale for each row, (head, key) of an SSD state and (head, token) of a cache: 5 digits
of every row's largest number. float16 has 3 digits and ends at 65504; where a state is larger it is
refused, with the heads named. Rounding once, when a session is saved, is harmless in both. Rounding
after every token is not: a slow head's updates fall below half a unit and it stagnates (quant.md
section 1), so the runtimes keep float32 while they decode.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError

PRECISIONS = ("float32", "int16", "float16")
ROWS = (".ssm", ".key", ".value")  # what is large; the conv's column stays float32
SCALE = ".scale"
LARGEST = {"int16": 32767, "float16": 65504}

Arrays = Mapping[str, NDArray[Any]]


def reduce_state(arrays: Arrays, precision: str) -> dict[str, NDArray[Any]]:
    """The neutral layout's arrays with large ones reduced.

    Args:
        arrays: float32 by name, as `State.arrays` gives them.
        precision: one of `PRECISIONS`.

    Raises:
        UserError: unknown precision, numbers that are not finite, or too large for float16.
    """
    if precision not in PRECISIONS:
        raise UserError(f"state precision {precision!r}: known are {', '.join(PRECISIONS)}")
    out: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if precision == "float32" or not name.endswith(ROWS):
            out[name] = array
            continue
        largest = np.abs(array).max(axis=-1, initial=0.0)
        _check(name, largest, precision)
        if precision == "float16":
            out[name] = array.astype(np.float16)
            continue
        scale = np.maximum(largest / LARGEST["int16"], np.finfo(np.float32).tiny)
        scale = scale.astype(np.float32)
        out[name] = np.rint(array / scale[..., None]).astype(np.int16)
        out[name + SCALE] = scale
    return out


def restore_state(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """`reduce_state` backwards, whichever precision it was."""
    out = {}
    for name, array in arrays.items():
        if name.endswith(SCALE):
            continue
        whole = array.astype(np.float32)
        if array.dtype == np.int16:
            whole *= arrays[name + SCALE][..., None]
        out[name] = whole
    return out


def _check(name: str, largest: NDArray[np.float32], precision: str) -> None:
    layer, _, kind = name.partition(".")
    limit = LARGEST["float16"] if precision == "float16" else np.finfo(np.float32).max
    bad = ~(largest <= limit)  # NaN too
    if bad.any():
        heads = sorted(set(np.argwhere(bad)[:, 0].tolist()))
        raise UserError(
            f"state of layer {layer} ({kind}), heads {', '.join(map(str, heads))}: up to "
            f"{np.nanmax(largest):g}, which {precision} cannot hold; keep it as float32"
        )

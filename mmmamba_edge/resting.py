"""States that wait, in half their bytes: only where no head would stagnate.

A head forgets over some number of tokens (its *memory*, quant/head_memory.py). Rounded after every
token, its state stops changing once a token's part in it, about 1 / memory, is less than half a
unit of the format. A state that waits is rounded once a turn, and a turn may be short: so a format
is refused for a model with a head that remembers longer than the format can follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError
from mmmamba_edge.reduced_state import reduce_state, restore_state
from mmmamba_edge.runtimes.base import Runner, State

# Tokens of memory that a head may have: up to here the answers of a head, rounded after each of
# 100,000 tokens, are off by less than `check` allows (benchmarks/state_formats.py, quant.md 4).
HOLDS = {"float32": float("inf"), "int16": 65_536.0, "float16": 1_024.0, "bfloat16": 256.0}
SETTING = "head_memory"  # of a manifest: tokens for each head, by layer

HeadMemory = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class RestingState:
    """A state put by: no runner steps it, `load_state` wakes it.

    Attributes:
        reduced: the neutral layout, its large arrays in the precision asked for.
        tokens: read so far.
    """

    reduced: Mapping[str, NDArray[Any]]
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(array.nbytes for array in self.reduced.values())

    def copy(self) -> "RestingState":
        """Itself: nothing changes it."""
        return self

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The neutral layout in float32."""
        return restore_state(self.reduced)


def put_by(runner: Runner, state: State, precision: str) -> RestingState:
    """A state as it waits.

    Raises:
        UserError: see `check_heads` and `reduce_state`.
    """
    check_heads(runner, precision)
    return RestingState(reduce_state(state.arrays(), precision), state.tokens)


def check_heads(runner: Runner, precision: str) -> None:
    """Refuse a precision in which a head of this model would stagnate.

    Raises:
        UserError: naming the heads; or the bundle does not say how long they remember.
    """
    limit = HOLDS.get(precision)
    if limit is None:
        raise UserError(f"state precision {precision!r}: known are {', '.join(HOLDS)}")
    if limit == float("inf") or "mamba2" not in runner.config.layer_types:
        return
    manifest = getattr(runner, "manifest", None)
    memory: HeadMemory | None = manifest.settings.get(SETTING) if manifest else None
    if memory is None:
        raise UserError(
            f"a state in {precision}: this model does not say how long its heads remember, so it "
            "cannot be judged; keep float32, or export the bundle with its report"
        )
    if slow := stagnating(memory, precision):
        raise UserError(
            f"a state in {precision} follows a memory of {limit:,.0f} tokens, and these heads "
            f"remember longer: {named(slow)}; keep float32"
        )


def stagnating(memory: HeadMemory, precision: str) -> list[tuple[int, int, float]]:
    """(layer, head, tokens) of the heads that remember longer than `precision` can follow."""
    return [
        (int(layer), head, tokens)
        for layer, heads in memory.items()
        for head, tokens in enumerate(heads)
        if tokens > HOLDS[precision]
    ]


def named(heads: Sequence[tuple[int, int, float]], most: int = 6) -> str:
    """Heads in words, the longest memories first."""
    heads = sorted(heads, key=lambda one: -one[2])
    told = [f"layer {a} head {b} ({tokens:,.0f})" for a, b, tokens in heads[:most]]
    more = len(heads) - most
    return ", ".join(told) + (f" and {more} more" if more > 0 else "")

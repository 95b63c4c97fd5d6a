"""What every runtime refuses, in the same words: ids, pictures and states that do not fit."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.runtimes.base import Arrays


def check_ids(
    input_ids: NDArray[np.int64], config: Config, read: int, max_context: int | None
) -> NDArray[np.int64]:
    """The ids as int64, or UserError: no ids, not the vocabulary's, or no room after `read`."""
    ids = np.asarray(input_ids)
    if ids.ndim != 1 or not len(ids):
        raise UserError(f"input_ids: expected (tokens,) with at least one, found {ids.shape}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(
            f"input_ids: {int(ids.min())}..{int(ids.max())} leaves the vocabulary of "
            f"{config.vocab_size}; this is another model's tokenizer"
        )
    check_room(read + len(ids), max_context)
    return ids.astype(np.int64, copy=False)


def check_room(tokens: int, max_context: int | None) -> None:
    """UserError if the attention caches cannot hold `tokens`."""
    if max_context is not None and tokens > max_context:
        raise UserError(
            f"{tokens} tokens exceed the context of {max_context} that this model's attention "
            "cache was made for; reset, or export it with a larger --max-context"
        )


def check_pictures(
    ids: NDArray[np.int64], pixel_values: NDArray[np.float32] | None, config: Config
) -> int:
    """How many tiles there are, or UserError: not as many as the ids' image tokens, or no tiles."""
    places = int((ids == config.img_context_token_id).sum())
    tiles = 0 if pixel_values is None else len(pixel_values)
    if places != tiles * config.tokens_per_tile:
        raise UserError(
            f"input_ids hold {places} image tokens; {tiles} tiles make "
            f"{tiles * config.tokens_per_tile}"
        )
    expected = (3, config.image_size, config.image_size)
    if pixel_values is not None and tiles:
        if pixel_values.shape[1:] != expected or pixel_values.dtype != np.float32:
            raise UserError(
                f"pixel_values: expected float32 (tiles, {', '.join(map(str, expected))}), found "
                f"{pixel_values.dtype} {pixel_values.shape}"
            )
    return tiles


class Owned(Protocol):
    """A state that only one runner can read."""

    owner: Any


S = TypeVar("S", bound=Owned)


def check_own(state: Any, kind: type[S], runner: object) -> S:
    """The state, or UserError: of another runtime, or of another runner of this one."""
    if not isinstance(state, kind) or state.owner is not runner:
        raise UserError(
            f"a {type(state).__name__} of another runner; convert it with "
            "runner.load_state(state.arrays(), state.tokens)"
        )
    return state


def check_state(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError unless `arrays` are exactly the tensors of `shapes`."""
    extra = sorted(set(arrays) - set(shapes))
    if extra:
        raise UserError(f"state has {extra[0]}, which this model does not; it is another model's")
    for name, shape in shapes.items():
        found = arrays[name].shape if name in arrays else "nothing"
        if found != shape:
            raise UserError(f"state {name}: expected {shape}, found {found}")

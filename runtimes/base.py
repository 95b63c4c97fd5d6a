"""The one protocol every runtime speaks: NumPy in, NumPy out, the state a value that is handed on.

Chat, sessions and evaluation are built on this and on nothing else of a runtime.

Neutral state layout, the one that session files keep, all float32 and without a batch axis:

    {i}.conv    (channels, kernel - 1)          the mixer's last pre-conv column; channels v, k, q
    {i}.ssm     (heads, key_dim, value_dim)     the SSD state S
    {i}.key     (kv_heads, tokens, head_dim)    an attention layer's keys, after RoPE
    {i}.value   (kv_heads, tokens, head_dim)

with i the layer's number over the whole stack, embedding layers first.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import Config

Arrays = Mapping[str, NDArray[np.float32]]
Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


class State(Protocol):
    """What a model remembers of everything it has read. Its size is fixed when it is made."""

    @property
    def tokens(self) -> int:
        """How many tokens it has read."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes it occupies, whatever `tokens` is."""
        ...

    def copy(self) -> Self:
        """An independent copy: stepping one never changes the other."""
        ...

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The state in the neutral layout above (copies)."""
        ...


class Runner(Protocol):
    """A loaded model on some runtime."""

    config: Config
    model_id: str  # SHA-256 over the weights before any quantisation: the model's identity
    quant: str  # "none", "int8", ...: another quantisation of the same model_id differs here
    max_context: int | None  # tokens a hybrid's attention cache was made for; None: no limit
    tokenizer_dir: Path | None  # folder with the tokenizer files; None: this model takes ids only

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float32], State]:
        """Read a prompt, in chunks where the runtime likes that.

        Args:
            input_ids: (tokens,) int64; image positions hold `config.img_context_token_id`.
            pixel_values: (tiles, 3, height, width) float32, normalised; None without images.
            state: where to go on from (its memory may be reused); None: from the beginning.
            progress: called after each chunk; an exception it raises (Ctrl-C) leaves `state` as
                it was at the last finished chunk.

        Returns:
            Logits of the last position, (vocab_size,) float32, and the new state.

        Raises:
            UserError: ids out of range, image positions that do not match the tiles, or more
                tokens than `max_context`.
        """
        ...

    def step(self, token_id: int, state: State) -> tuple[NDArray[np.float32], State]:
        """Read one token: logits (vocab_size,) and the state, which may be the same object."""
        ...

    def new_state(self) -> State:
        """A state that has read nothing."""
        ...

    def load_state(self, arrays: Arrays, tokens: int) -> State:
        """A state from the neutral layout; UserError where a name or shape does not fit."""
        ...

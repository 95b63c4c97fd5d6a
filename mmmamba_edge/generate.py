"""The decode loop: sample a token, hand it out, read it, and be consistent at every moment.

A token is handed out *before* the model reads it. So an answer that ends, by its limit or by a
Ctrl-C, leaves one token that was said and not read (`Position.pending`); whoever goes on reads it
first. A stop token is neither handed out nor read: the next turn brings the template's own ending.
"""

import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError
from mmmamba_edge.resting import RestingState
from mmmamba_edge.runtimes.base import Runner, State
from mmmamba_edge.sampling import Sampler

Reason = Literal["stop", "length", "context", "closed"]


@dataclass
class Position:
    """Where a conversation stands."""

    state: State | RestingState
    logits: NDArray[np.float32]  # (vocab,) after the last token read; our own copy
    pending: int | None = None  # a token said but not read yet; `logits` are older then

    def copy(self) -> "Position":
        """An independent copy."""
        return Position(self.state.copy(), self.logits.copy(), self.pending)

    def wake(self, runner: Runner) -> State:
        """The state, given back to the runner if it was put by."""
        if isinstance(self.state, RestingState):
            self.state = runner.load_state(self.state.arrays(), self.state.tokens)
        return self.state


class Generation:
    """An iterator of token ids; `position` is right after each of them, however the loop ends.

    It needs the same memory for its first token and its millionth.

    Args:
        runner: the model.
        position: where to begin; it is moved along.
        sampler: picks the tokens.
        max_new_tokens: how many to give at most.
        stop_ids: tokens that end the answer.
    """

    def __init__(
        self,
        runner: Runner,
        position: Position,
        sampler: Sampler,
        max_new_tokens: int,
        stop_ids: Collection[int],
    ) -> None:
        check_limit(max_new_tokens)
        self.runner = runner
        self.position = position
        self.sampler = sampler
        self.left = max_new_tokens  # tokens that may still come
        self.given = 0  # tokens handed out
        self.steps = 0  # tokens read
        self.stop_ids = frozenset(stop_ids)
        self.reason: Reason | None = None  # why it ended; None while it goes on

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.reason is None:
            self.reason = self._must_end()
        if self.reason is not None:
            raise StopIteration
        position = self.position
        if position.pending is not None:
            self.read_pending()
        # An image token stands for a picture's vector: said, it could never be read.
        position.logits[self.runner.config.img_context_token_id] = -np.inf
        token = self.sampler.sample(position.logits)
        if token in self.stop_ids:
            self.reason = "stop"
            raise StopIteration
        position.pending = token
        self.left -= 1
        self.given += 1
        return token

    def read_pending(self) -> None:
        """Let the model read the token that was said last."""
        position = self.position
        assert position.pending is not None
        with interrupts_wait():
            state = position.wake(self.runner)
            logits, position.state = self.runner.step(position.pending, state)
            position.logits[:] = logits  # the runner may use its buffer again
            position.pending = None
            self.steps += 1

    def _must_end(self) -> Reason | None:
        if self.left == 0:
            return "length"
        limit, position = self.runner.max_context, self.position
        if limit is not None and position.pending is not None and position.state.tokens >= limit:
            return "context"
        return None


def generate_ids(
    runner: Runner,
    logits: NDArray[np.float32],
    state: State,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> Generation:
    """Token ids that follow a prompt, for a model used without a tokenizer.

    Args:
        runner: the model.
        logits: (vocab,) as `runner.prefill` gave them.
        state: the state beside them; it is used up (`.position.state` is the one to go on with).
        sampler: picks the tokens.
        max_new_tokens: how many to give at most.
        stop_ids: tokens that end the answer; they are not given.

    Returns:
        An iterator of ids.

    Example:
        logits, state = runner.prefill(ids)
        ids = list(generate_ids(runner, logits, state, Sampler(), max_new_tokens=20))
    """
    return Generation(runner, Position(state, logits.copy()), sampler, max_new_tokens, stop_ids)


def check_limit(max_new_tokens: int) -> None:
    """UserError unless `max_new_tokens` is a whole number above 0."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number above 0")


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let a Ctrl-C wait until the block is done, so that no state is left half changed.

    Only the main thread meets KeyboardInterrupt, so elsewhere there is nothing to do.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came[:] = [(number, frame)]

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])

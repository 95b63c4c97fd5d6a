"""An answer being said: token ids turned to text as they come, and what the turn took."""

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.generate import Generation, Position, Reason, check_limit
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.sampling import Sampler
from mmmamba_edge.tokenizer import Tokenizer


@dataclass
class Stats:
    """What the last turn took. Its size is fixed; nothing is kept per token."""

    turn: int = 0  # questions asked so far
    prompt_tokens: int = 0  # read before the answer began
    reused_tokens: int = 0  # of those, taken from a prefix snapshot
    generated_tokens: int = 0
    steps: int = 0  # tokens of the answer that the model has read
    context_tokens: int = 0  # of the whole conversation, read so far
    state_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0  # within the decode loop; the caller's own time is not in it
    first_token_s: float = 0.0  # from the question to its first token

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read a second, reused ones not counted."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prefill_s if self.prefill_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second, prefill not counted."""
        return self.steps / self.decode_s if self.decode_s else 0.0


class Answer:
    """An answer being said: an iterator of pieces of text, none of which splits a character.

    Args:
        generation: the ids.
        tokenizer: turns them to text.
        stats: of this turn; kept up to date.
        recent: last ids of the part already said, when an answer goes on that was interrupted.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        stats: Stats,
        recent: Collection[int] = (),
    ) -> None:
        self.generation = generation
        self.tokenizer = tokenizer
        self.stats = stats
        # Enough ids to hold every token of one character: what a text stream depends on.
        self.recent: deque[int] = deque(recent, maxlen=8)
        self._text = tokenizer.stream()
        for token in self.recent:
            self._text.push(token)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            start = time.perf_counter()
            try:
                token = next(self.generation)
            except StopIteration:
                tail = self._text.flush() if self.reason == "stop" else ""
                if tail:
                    return tail
                raise
            finally:
                self._count(time.perf_counter() - start)
            self.recent.append(token)
            piece = self._text.push(token)
            if piece:
                return piece

    @property
    def reason(self) -> Reason | None:
        """Why it ended: by a "stop" token, its "length" limit, a full "context", or "closed" by a
        later question; None while it goes on."""
        return self.generation.reason

    @property
    def position(self) -> Position:
        """Where the conversation stands."""
        return self.generation.position

    def close(self) -> None:
        """End it here, as far as it got."""
        self.generation.reason = self.generation.reason or "closed"

    def extend(self, max_new_tokens: int) -> None:
        """Let it go on for so many tokens, if it was its limit that ended it."""
        check_limit(max_new_tokens)
        self.generation.left = max_new_tokens
        self.generation.reason = None

    def copy(self) -> "Answer":
        """An independent copy that goes on exactly as this one would."""
        old = self.generation
        new = Generation(old.runner, old.position.copy(), old.sampler.copy(), 1, old.stop_ids)
        new.left, new.given, new.steps, new.reason = old.left, old.given, old.steps, old.reason
        return Answer(new, self.tokenizer, replace(self.stats), self.recent)

    # --- for session files -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All but state, logits and the tokens seen, as JSON values."""
        generation = self.generation
        return {
            "pending": self.position.pending,
            "left": generation.left,
            "given": generation.given,
            "steps": generation.steps,
            "reason": generation.reason,
            "recent": list(self.recent),
            "sampler": generation.sampler.to_dict(),
            "stats": asdict(self.stats),
        }

    @classmethod
    def from_dict(
        cls,
        data: dict[str, Any],
        runner: Runner,
        tokenizer: Tokenizer,
        position: Position,
        seen: NDArray[np.bool_],
        stop_ids: Collection[int],
    ) -> "Answer":
        """Go on from `to_dict`; KeyError, TypeError or ValueError where it is not well-formed."""
        if position.logits.shape != (runner.config.vocab_size,):
            raise ValueError(f"logits of shape {position.logits.shape}")
        position.pending = None if data["pending"] is None else int(data["pending"])
        sampler = Sampler.from_dict(data["sampler"], seen)
        generation = Generation(runner, position, sampler, 1, stop_ids)
        for name in ("left", "given", "steps"):
            setattr(generation, name, int(data[name]))
        generation.reason = data["reason"]
        recent = [int(token) for token in data["recent"]]
        return cls(generation, tokenizer, Stats(**data["stats"]), recent)

    # --- parts -----------------------------------------------------------------------------------

    def _count(self, seconds: float) -> None:
        stats, generation = self.stats, self.generation
        if not stats.generated_tokens:
            stats.first_token_s = stats.prefill_s + seconds
        stats.decode_s += seconds
        stats.generated_tokens, stats.steps = generation.given, generation.steps
        stats.context_tokens = generation.position.state.tokens

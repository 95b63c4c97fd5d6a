"""Choosing the next token from logits: greedy, or drawn after temperature, top-k and top-p.

The order and the conventions are Hugging Face's: repetition penalty, temperature, top-k, top-p.
A sampler's memory is one byte per vocabulary entry, however long the answer grows.
"""

import math
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError

SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")


class Sampler:
    """Picks token ids; the same seed, settings and logits give the same ids.

    Args:
        temperature: 0 takes the most likely token; above 0 draws, flatter as it grows.
        top_p: draw among the fewest tokens whose probabilities reach this sum; 1 keeps all.
        top_k: draw among this many most likely tokens; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of the tokens already
            seen in this turn, prompt and answer; 1 changes nothing.
        seed: where the random numbers start.

    Raises:
        UserError: a setting is out of its range.

    >>> Sampler(temperature=0.7, top_p=0.9, seed=3).sample(np.zeros(8, np.float32)) in range(8)
    True
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        _require(_finite(temperature) and temperature >= 0, "temperature", temperature, "0 or more")
        _require(_finite(top_p) and 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
        _require(_whole(top_k) and top_k >= 0, "top_k", top_k, "a whole number, 0 (all) or more")
        _require(
            _finite(repetition_penalty) and repetition_penalty > 0,
            "repetition_penalty",
            repetition_penalty,
            "above 0 (1 changes nothing)",
        )
        _require(_whole(seed) and seed >= 0, "seed", seed, "a whole number, 0 or more")
        self.temperature = float(temperature)
        self.top_p = float(top_p)
        self.top_k = int(top_k)
        self.repetition_penalty = float(repetition_penalty)
        self.seed = int(seed)
        self._bits = np.random.PCG64(self.seed)
        self._seen = np.zeros(0, np.bool_)  # (vocab,) once a penalty needs it

    def see(self, ids: Iterable[int] | NDArray[np.int64]) -> None:
        """Count `ids` (the prompt) among the tokens that the repetition penalty holds back."""
        if self.repetition_penalty != 1.0:
            ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
            if ids.size:
                self._reserve(int(ids.max()) + 1)
                self._seen[ids] = True

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token for `logits` (vocab,), which are left as they are.

        Raises:
            UserError: the logits are NaN or infinite, as a broken model's are.
        """
        if self.repetition_penalty != 1.0:
            logits = self._penalised(logits)
        token = int(np.argmax(logits))
        if not np.isfinite(logits[token]):
            raise UserError(
                "the model's logits are not finite: its weights are damaged or its precision is "
                "too low; compare it with its checkpoint (mmmamba-edge check)"
            )
        if self.temperature > 0:
            token = self._draw(logits, float(logits[token]))
        if self.repetition_penalty != 1.0:
            self._seen[token] = True
        return token

    def copy(self) -> Self:
        """An independent sampler that goes on exactly as this one would."""
        return type(self).from_dict(self.to_dict(), self.seen)

    # --- for session files ------------------------------------------------------------------------

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which tokens the penalty holds back, (vocab,) or shorter (a copy)."""
        return self._seen.copy()

    def to_dict(self) -> dict[str, Any]:
        """Settings and random state as JSON values; `seen` goes beside it."""
        state = self._bits.state["state"]
        random = {
            name: f"{state[name]:032x}" for name in ("state", "inc")
        }  # 128 bits: hex, not JSON
        return {**{name: getattr(self, name) for name in SETTINGS}, "random": random}

    @classmethod
    def from_dict(cls, data: dict[str, Any], seen: NDArray[np.bool_]) -> Self:
        """Go on from `to_dict` and `seen`; UserError where a setting is missing or out of range."""
        try:
            sampler = cls(**{name: data[name] for name in SETTINGS})
            random = {name: int(data["random"][name], 16) for name in ("state", "inc")}
            state: Any = {**sampler._bits.state, "state": random}
            sampler._bits.state = state
        except (KeyError, TypeError, OverflowError) as error:
            raise UserError(f"sampler state: {error!r}") from error
        sampler._seen = seen.astype(np.bool_, copy=True)
        return sampler

    # --- the parts -----------------------------------------------------------------------------

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self._reserve(len(logits))
        held = np.flatnonzero(self._seen[: len(logits)])
        logits = logits.copy()
        values = logits[held]
        penalty = np.float32(self.repetition_penalty)
        logits[held] = np.where(values > 0, values / penalty, values * penalty)
        return logits

    def _draw(self, logits: NDArray[np.float32], best: float) -> int:
        with np.errstate(over="ignore"):  # a tiny temperature sends the rest to -inf: probability 0
            scores = (logits.astype(np.float64) - best) / self.temperature
        ids = np.arange(len(scores))
        if 0 < self.top_k < len(scores):
            ids = _largest(scores, self.top_k)
        weights = np.exp(scores[ids])  # of the candidates, not yet normalised
        if self.top_p < 1:
            ids, weights = _nucleus(ids, weights / weights.sum(), self.top_p)
        cumulative = np.cumsum(weights)
        # 53 random bits to [0, 1); NumPy promises this stream for ever, unlike Generator.random's.
        point = (self._bits.random_raw() >> 11) * 2.0**-53 * cumulative[-1]
        chosen = int(np.searchsorted(cumulative, point, side="right"))
        return int(ids[min(chosen, len(ids) - 1)])

    def _reserve(self, size: int) -> None:
        if len(self._seen) < size:
            self._seen = np.concatenate([self._seen, np.zeros(size - len(self._seen), np.bool_)])


def _largest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Ids of exactly `count` largest scores; of equal scores the lower ids, on every machine."""
    edge = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > edge)
    level = np.flatnonzero(scores == edge)[: count - len(above)]
    return np.concatenate([above, level])


def _nucleus(
    ids: NDArray[np.int64], probabilities: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fewest most likely of `ids` whose probabilities sum to `top_p`: at least one."""
    # All tokens below this bound weigh less than 1 - top_p together, so none is in the nucleus:
    # what is left to sort is a few hundred of 92,553.
    likely = probabilities >= (1 - top_p) / len(ids)
    ids, probabilities = ids[likely], probabilities[likely]
    order = np.lexsort((ids, -probabilities))
    ids, probabilities = ids[order], probabilities[order]
    count = int(np.searchsorted(np.cumsum(probabilities), top_p, side="left")) + 1
    return ids[:count], probabilities[:count]


def _require(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise UserError(f"{name} is {value!r}; expected {expected}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

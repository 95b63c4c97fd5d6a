"""A shuffled order of any length that takes no memory: entry i is computed, not looked up."""

import hashlib
import struct

ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of range(n), the same on every machine and Python version.

        order = Permutation(1_701_560, seed=0)
        order[0], order[1]                      # the first two of 1.7 million, shuffled

    A balanced Feistel network permutes the numbers of an even count of bits, the fewest that hold
    n - 1; a result of n or more goes through it again (cycle walking), on average fewer than four
    times.

    Args:
        n: how many; at least 1.
        seed: one number or several; each gives another order.

    Raises:
        ValueError: n below 1.
    """

    def __init__(self, n: int, seed: int | tuple[int, ...]) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n}; expected at least 1")
        numbers = seed if isinstance(seed, tuple) else (seed,)
        text = ",".join(str(int(number)) for number in numbers)
        self._key = hashlib.blake2b(text.encode()).digest()
        self._n = int(n)
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> int:
        """Which number stands at place i, 0 <= i < n; IndexError elsewhere."""
        if not 0 <= i < self._n:
            raise IndexError(f"place {i} of a permutation of {self._n}")
        value = self._network(int(i))
        while value >= self._n:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (self._hash(number, right) & mask)
        return left << self._half | right

    def _hash(self, number: int, value: int) -> int:
        # 16 bytes of value: halves of up to 128 bits
        words = struct.pack("<BQQ", number, value & (1 << 64) - 1, value >> 64)
        return int.from_bytes(hashlib.blake2b(words, digest_size=16, key=self._key).digest())

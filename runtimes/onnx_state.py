"""The ONNX Runtime runner's state: NumPy arrays that the decoder reads and writes in place."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.manifest import StateTensor, is_cache


class Tensor:
    """A NumPy array and the OrtValue that shares its memory; the array must outlive the value."""

    def __init__(self, array: NDArray) -> None:
        import onnxruntime as ort

        self.array = array
        self.value = ort.OrtValue.ortvalue_from_numpy(array)


class OnnxState:
    """A state of batch 1 in memory made once.

    Args:
        layout: its tensors, from the manifest.
        copies: 1 where the decoder writes it over itself, 2 where old and new take turns.
        owner: the runner whose graphs are bound to it.
    """

    def __init__(self, layout: tuple[StateTensor, ...], copies: int, owner: object) -> None:
        self.layout = layout
        self.owner = owner
        self.tokens = 0
        self.sets = [
            {t.name: Tensor(np.zeros(t.shape, t.dtype)) for t in layout} for _ in range(copies)
        ]
        self.now = 0  # the set that holds the state; the next step writes the one after it
        self.bindings: list[Any] = [None] * copies  # of a single step, made when first needed

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, both copies where there are two."""
        return sum(t.array.nbytes for tensors in self.sets for t in tensors.values())

    @property
    def past(self) -> dict[str, Tensor]:
        """What the decoder reads."""
        return self.sets[self.now]

    @property
    def present(self) -> dict[str, Tensor]:
        """What it writes."""
        return self.sets[(self.now + 1) % len(self.sets)]

    def advance(self, tokens: int) -> None:
        """The decoder has read `tokens` more."""
        self.tokens += tokens
        self.now = (self.now + 1) % len(self.sets)

    def copy(self) -> "OnnxState":
        """An independent copy."""
        new = OnnxState(self.layout, len(self.sets), self.owner)
        new.tokens = self.tokens
        for name, tensor in new.past.items():
            used = np.s_[:, :, : self.tokens] if is_cache(name) else np.s_[:]
            tensor.array[used] = self.past[name].array[used]
        return new

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The neutral layout of runtimes/base.py."""
        out = {}
        for name, tensor in self.past.items():
            array = tensor.array[0]
            used = array[:, : self.tokens] if is_cache(name) else array
            out[name] = used.astype(np.float32)  # a copy
        return out

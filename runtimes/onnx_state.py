"""The ONNX Runtime runner's state: NumPy arrays that the decoder reads and writes in place."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.manifest import StateTensor, is_cache


class Tensor:
    """A NumPy array and what graphs are bound to: on the CPU one memory, elsewhere two.

    Args:
        array: it must outlive the value.
        device: ONNX Runtime's name of another device ("cuda"); None: the CPU. There `push` and
            `pull` carry the numbers over; here they do nothing.
    """

    def __init__(self, array: NDArray, device: str | None = None) -> None:
        import onnxruntime as ort

        self.array, self._apart = array, device is not None
        self.value = ort.OrtValue.ortvalue_from_numpy(array, device or "cpu", 0)

    def push(self) -> None:
        """To the device, after `array` was written."""
        if self._apart:
            self.value.update_inplace(self.array)

    def pull(self) -> NDArray:
        """From the device, before `array` is read."""
        if self._apart:
            self.array[...] = self.value.numpy()
        return self.array


class OnnxState:
    """A state of batch 1 in memory made once.

    Args:
        layout: its tensors, from the manifest.
        copies: 1 where the decoder writes it over itself, 2 where old and new take turns.
        owner: the runner whose graphs are bound to it.
        device: where it lies, as `Tensor` has it.
    """

    def __init__(
        self, layout: tuple[StateTensor, ...], copies: int, owner: object,
        device: str | None = None,
    ) -> None:  # fmt: skip
        self.layout = layout
        self.owner = owner
        self.device = device
        self.tokens = 0
        self.sets = [
            {t.name: Tensor(np.zeros(t.shape, t.dtype), device) for t in layout}
            for _ in range(copies)
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
        new = OnnxState(self.layout, len(self.sets), self.owner, self.device)
        new.tokens = self.tokens
        for name, tensor in new.past.items():
            used = np.s_[:, :, : self.tokens] if is_cache(name) else np.s_[:]
            tensor.array[used] = self.past[name].pull()[used]
            tensor.push()
        return new

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The neutral layout of runtimes/base.py."""
        out = {}
        for name, tensor in self.past.items():
            array = tensor.pull()[0]
            used = array[:, : self.tokens] if is_cache(name) else array
            out[name] = used.astype(np.float32)  # a copy
        return out

"""A tiny NumPy model that speaks the runner protocol, so that sessions are tested without weights.

Its answers depend on every token and pixel it has read, in order. It is unkind on purpose, within
the protocol: the given state is changed in place and returned, one logits buffer is used for ever,
and an interrupted step leaves the state half changed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mmmamba_edge.config import Config, LayerType, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.runtimes.base import Progress

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>")
IMAGE = SPECIAL.index("<IMG_CONTEXT>")
CHUNK = 16  # tokens between two calls of `progress`


def tiny_config(hybrid: bool = False, vocab_size: int = 1024) -> Config:
    def half(types: tuple[LayerType, ...]) -> StackConfig:
        return StackConfig(16, 32, 2, 2, 1e-6, 10000.0, 4096, types)

    return Config(
        embedding=half(("mamba2",)),
        llm=half(("attention",) if hybrid else ("mamba2",)),
        vocab_size=vocab_size,
        image_size=28,
        patch_size=7,
        img_context_token_id=IMAGE,
        max_dynamic_patch=4,
    )


def write_tokenizer(folder: Path, vocab_size: int = 1024) -> Path:
    """A byte tokenizer: 8 special tokens, 256 bytes, then made-up words for the model to say."""
    bytes_ = ByteLevel.alphabet()
    words = [f"\u0120word{i}" for i in range(8 + len(bytes_), vocab_size)]  # \u0120: a space
    tokenizer = Tokenizer(
        BPE({w: i for i, w in enumerate([*SPECIAL, *sorted(bytes_), *words])}, [])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class FakeState:
    """The neutral layout itself; attention arrays have room for the whole context."""

    def __init__(self, arrays: dict[str, NDArray[np.float32]], tokens: int) -> None:
        self.held = arrays
        self.tokens = tokens

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.held.values())

    def copy(self) -> "FakeState":
        return FakeState({k: a.copy() for k, a in self.held.items()}, self.tokens)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        return {
            k: (a[:, : self.tokens] if k.endswith(("key", "value")) else a).copy()
            for k, a in self.held.items()
        }


class FakeRunner:
    """See the module. `ids_read` counts tokens; `during_step` is called in the midst of a step."""

    def __init__(
        self,
        tokenizer_dir: Path | None = None,
        *,
        max_context: int | None = None,
        model_id: str = "a" * 64,
        quant: str = "none",
        vocab_size: int = 1024,
    ) -> None:
        self.config = tiny_config(max_context is not None, vocab_size)
        self.model_id = model_id
        self.quant = quant
        self.max_context = max_context
        self.tokenizer_dir = tokenizer_dir
        self.calls: list[list[int]] = []  # ids of each prefill
        self.ids_read = 0
        self.steps: list[int] = []  # ids of each step
        self.log_steps = True
        self.during_step: Callable[[], None] | None = None
        self.script: list[int] = []  # ids to be answered next, whatever the weights say
        rng = np.random.default_rng(int(model_id[:8], 16))

        def weights(*shape: int) -> NDArray[np.float32]:
            return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

        self._table, self._head = weights(vocab_size, 16) * 4, weights(vocab_size, 16) * 24
        self._vision = weights(16, 3 * 14 * 14)
        self._mix = [weights(48, 16) * 2 for _ in self.config.layer_types]  # to v, k, q
        self._tap = [weights(48) for _ in self.config.layer_types]
        self._logits = np.zeros(vocab_size, np.float32)

    def new_state(self) -> FakeState:
        arrays: dict[str, NDArray[np.float32]] = {}
        for i, kind in enumerate(self.config.layer_types):
            if kind == "mamba2":
                arrays[f"{i}.conv"] = np.zeros((48, 1), np.float32)
                arrays[f"{i}.ssm"] = np.zeros((2, 8, 8), np.float32)
            else:
                for name in ("key", "value"):
                    arrays[f"{i}.{name}"] = np.zeros((2, self.max_context or 0, 8), np.float32)
        return FakeState(arrays, 0)

    def load_state(self, arrays: Mapping[str, NDArray[np.float32]], tokens: int) -> FakeState:
        state = self.new_state()
        if sorted(arrays) != sorted(state.held):
            raise UserError(f"state: has {sorted(arrays)}; expected {sorted(state.held)}")
        for name, room in state.held.items():
            array = arrays[name]
            if name.endswith(("key", "value")):
                if array.shape != (2, tokens, 8) or tokens > room.shape[1]:
                    raise UserError(f"state: {name} has shape {array.shape}")
                room[:, :tokens] = array
            else:
                if array.shape != room.shape:
                    raise UserError(f"state: {name} has shape {array.shape}, not {room.shape}")
                room[:] = array
        state.tokens = tokens
        return state

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: Any = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float32], FakeState]:
        state = state or self.new_state()
        assert input_ids.dtype == np.int64 and input_ids.ndim == 1 and len(input_ids)
        self.calls.append(input_ids.tolist())
        vectors = np.zeros((0, 3, 14, 14), np.float32)
        if pixel_values is not None:
            assert pixel_values.dtype == np.float32 and pixel_values.shape[1:] == (3, 28, 28)
            parts = pixel_values.reshape(-1, 3, 2, 14, 2, 14)
            vectors = parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3, 14, 14)
        if (input_ids == IMAGE).sum() != len(vectors):
            raise UserError("image positions do not match the tiles")
        image = iter(vectors)
        for done, token in enumerate(input_ids.tolist(), 1):
            patch = next(image).ravel() if token == IMAGE else None
            vector = self._table[token] if patch is None else self._vision @ patch
            self._read(vector, state)
            if progress and (done % CHUNK == 0 or done == len(input_ids)):
                progress(done, len(input_ids))
        if input_ids[-1] < len(SPECIAL):  # only a part of a prompt: nothing is answered to it
            return self._logits, state
        return self._answer(), state

    def step(self, token_id: int, state: Any) -> tuple[NDArray[np.float32], FakeState]:
        self._read(self._table[token_id], state, self.during_step)
        if self.log_steps:
            self.steps.append(token_id)
        return self._answer(), state

    def _read(
        self,
        x: NDArray[np.float32],
        state: FakeState,
        midst: Callable[[], None] | None = None,
    ) -> None:
        if self.max_context is not None and state.tokens >= self.max_context:
            raise UserError(f"context of {self.max_context} tokens is full")
        for i, kind in enumerate(self.config.layer_types):
            if i == 1 and midst is not None:
                midst()
            vkq = self._mix[i] @ x
            if kind == "mamba2":
                conv = state.held[f"{i}.conv"]
                mixed = np.tanh(vkq + self._tap[i] * conv[:, 0])
                conv[:, 0] = vkq
                v, k, q = mixed.reshape(3, 2, 8)
                ssm = state.held[f"{i}.ssm"]
                ssm *= np.float32(0.95)
                ssm += k[:, :, None] * v[:, None, :]
                y = (q[:, :, None] * ssm).sum(1)
            else:
                v, k, q = vkq.reshape(3, 2, 8)
                t = state.tokens
                keys, values = state.held[f"{i}.key"], state.held[f"{i}.value"]
                keys[:, t], values[:, t] = k, v
                scores = (keys[:, : t + 1] * q[:, None]).sum(2)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                y = (weights[:, :, None] * values[:, : t + 1]).sum(1)
            x = np.tanh(x + y.reshape(16))
        state.tokens += 1
        self.ids_read += 1
        np.matmul(self._head, x, out=self._logits)

    def _answer(self) -> NDArray[np.float32]:
        if self.script:
            self._logits[self.script.pop(0)] = 1e4
        return self._logits

"""The ExecuTorch runtime: a .pte behind the runtimes' protocol.

The file holds three methods (export/pte_modules.py). Its decoder keeps one state in buffers of its
own; a `PteState` is either the one that lies there, or has its numbers put by. Going from one state
to another is a copy of a state's size, and nothing where a conversation has one.
"""

import logging
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.bundle import file_sha256, read_manifest, verify_files
from mmmamba_edge.errors import UserError
from mmmamba_edge.manifest import TOKENIZER, Manifest, is_cache
from mmmamba_edge.runtimes.base import Arrays, Progress, State
from mmmamba_edge.runtimes.checks import (
    check_ids,
    check_own,
    check_pictures,
    check_room,
    check_state,
)

MANIFEST_METHOD = "mmmamba_manifest"  # the manifest as JSON, so that the file stands alone
METHODS = ("token_embedding", "vision_encoder", "text_decoder")


class PteState:
    """A state of batch 1 of one runner."""

    def __init__(self, owner: "ExecuTorchRunner") -> None:
        self.owner = owner
        self.tokens = 0
        self.put_by: dict[str, NDArray[np.float32]] | None = None  # buffers; None: nothing read yet

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.owner.manifest.state_bytes

    def copy(self) -> "PteState":
        """An independent copy."""
        new = PteState(self.owner)
        new.tokens, new.put_by = self.tokens, self.owner.buffers_of(self)
        return new

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The neutral layout of runtimes/base.py."""
        buffers = self.owner.buffers_of(self) or self.owner.empty_buffers()
        return {
            name: array[:, : self.tokens].copy() if is_cache(name) else array
            for name, array in buffers.items()
        }


class ExecuTorchRunner:
    """A .pte, by itself or in a bundle, on ExecuTorch.

    Args:
        path: the file, or the bundle folder that holds it.
        threads: of XNNPACK's pool, which all of a process share; None: ExecuTorch's choice.
        provider: "cpu".
        verify: hash the bundle's files first (see `bundle.verify_files`).

    Raises:
        UserError: no .pte of this project, a damaged one, or executorch not installed.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, provider: str = "cpu", *,
        verify: bool | None = None,
    ):  # fmt: skip
        if provider != "cpu":
            raise UserError(f"provider {provider!r}: a .pte runs where it was lowered for: cpu")
        runtime = _runtime(threads)
        path = Path(path)
        if path.is_dir():
            manifest = read_manifest(path)
            verify_files(path, manifest, hashes=verify)
            file = path / manifest.graphs["decoder"]
        else:
            manifest, file = None, path
        check_whole(file)
        try:
            self._program = runtime.load_program(file)
        except Exception as error:  # its exceptions share no base class
            raise UserError(f"{file}: ExecuTorch cannot load it ({error})") from error
        missing = [m for m in (*METHODS, MANIFEST_METHOD) if m not in self._program.method_names]
        if missing:
            raise UserError(
                f"{file}: has no method {missing[0]}; expected a file that "
                "`mmmamba-edge export --to executorch` wrote"
            )
        text = self._load(MANIFEST_METHOD, file).execute([])[0]
        inside = Manifest.from_json(text, f"{file} ({MANIFEST_METHOD})")
        if inside.ops != "xnnpack":
            raise UserError(f"{file}: lowered to {inside.ops}, which does not run here")
        if manifest is not None and (manifest.model_id, manifest.quant) != (
            inside.model_id, inside.quant,
        ):  # fmt: skip
            raise UserError(f"{file}: another model's file than {path}'s manifest says")
        self.manifest: Manifest = manifest or inside
        self.config = self.manifest.model
        self.model_id = self.manifest.model_id
        self.quant = self.manifest.quant
        self.max_context = self.manifest.max_context
        self.tokenizer_dir = _tokenizer(file.parent / TOKENIZER, inside)

        self._file = file
        self._embed = self._load("token_embedding", file)
        self._decoder = self._load("text_decoder", file)
        self._vision = None
        self.chunk = int(self._decoder.metadata.input_tensor_meta(0).sizes()[1])
        self._resident: PteState | None = None
        self._buffers = {
            tensor.name: self._decoder._method.get_attribute(buffer_name(tensor.name))
            for tensor in self.manifest.state
        }

    # --- the protocol ---------------------------------------------------------------------------

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float32], PteState]:
        """Read a prompt in chunks; see `runtimes.base.Runner.prefill`."""
        own = self.new_state() if state is None else self._own(state)
        ids = check_ids(input_ids, self.config, own.tokens, self.max_context)
        logits = np.empty(0, np.float32)
        for part, vectors in self._chunks(ids, pixel_values, self.chunk):
            logits = self._read(own, vectors)
            if progress:
                progress(part.stop, len(ids))
        return logits, own

    def step(self, token_id: int, state: State) -> tuple[NDArray[np.float32], PteState]:
        """Read one token; see `runtimes.base.Runner.step`."""
        own = self._own(state)
        ids = check_ids(np.array([token_id]), self.config, own.tokens, self.max_context)
        return self._read(own, self._embedded(ids)), own

    def new_state(self) -> PteState:
        """A state that has read nothing."""
        return PteState(self)

    def load_state(self, arrays: Arrays, tokens: int) -> PteState:
        """A state from the neutral layout."""
        check_room(tokens, self.max_context)
        new, buffers = self.new_state(), self.empty_buffers()
        targets = {
            name: array[:, :tokens] if is_cache(name) else array for name, array in buffers.items()
        }
        check_state(arrays, {name: target.shape for name, target in targets.items()})
        for name, target in targets.items():
            target[:] = arrays[name]
        new.tokens, new.put_by = tokens, buffers
        return new

    # --- beyond the protocol --------------------------------------------------------------------

    def read_all(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
    ) -> tuple[NDArray[np.float32], PteState]:
        """A prompt token by token, with the logits of every position (tokens, vocab_size)."""
        own = self.new_state() if state is None else self._own(state)
        ids = check_ids(input_ids, self.config, own.tokens, self.max_context)
        chunks = self._chunks(ids, pixel_values, 1)
        return np.stack([self._read(own, vectors) for _, vectors in chunks]), own

    def drop_vision(self) -> None:
        """Give back the memory of the vision method; the next picture loads it again."""
        self._vision = None

    # --- states ---------------------------------------------------------------------------------

    def buffers_of(self, state: PteState) -> dict[str, NDArray[np.float32]] | None:
        """A copy of a state's numbers, by neutral name; None where nothing was read."""
        if state is self._resident:
            return {
                name: buffer.numpy().reshape(self._shape(name)).copy()
                for name, buffer in self._buffers.items()
            }
        if state.put_by is None:
            return None
        return {name: array.copy() for name, array in state.put_by.items()}

    def empty_buffers(self) -> dict[str, NDArray[np.float32]]:
        """Zeros in the shapes of the neutral layout, caches in full."""
        return {t.name: np.zeros(self._shape(t.name), np.float32) for t in self.manifest.state}

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(t.shape[1:] for t in self.manifest.state if t.name == name)

    def _enter(self, state: PteState) -> None:
        """Make the decoder's buffers those of `state`."""
        import torch

        if state is self._resident:
            return
        if self._resident is not None:
            self._resident.put_by = self.buffers_of(self._resident)
        if state.put_by is not None:  # else the decoder begins anew by itself, at position 0
            for name, buffer in self._buffers.items():
                buffer.copy_(torch.from_numpy(state.put_by[name]).reshape(buffer.shape))
        self._resident, state.put_by = state, None

    def _own(self, state: State) -> PteState:
        return check_own(state, PteState, self)

    # --- reading --------------------------------------------------------------------------------

    def _chunks(
        self, ids: NDArray[np.int64], pixel_values: NDArray[np.float32] | None, size: int
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The prompt in pieces: which positions, and their vectors (1, tokens, hidden)."""
        images = self._image_vectors(ids, pixel_values)
        for start in range(0, len(ids), size):
            part = slice(start, min(start + size, len(ids)))
            vectors = self._embedded(ids[part])
            places = np.flatnonzero(ids[part] == self.config.img_context_token_id)
            if len(places):
                vectors[0, places], images = images[: len(places)], images[len(places) :]
            yield part, vectors

    def _read(self, state: PteState, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        self._enter(state)
        logits = _run(self._decoder, vectors, np.array([state.tokens]))
        state.tokens += vectors.shape[1]
        return logits[0, 0]

    def _embedded(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors (1, tokens, hidden)."""
        return _run(self._embed, ids[None])

    def _image_vectors(
        self, ids: NDArray[np.int64], pixel_values: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Vectors (image tokens, hidden) for the image positions of `ids`, in order."""
        if not check_pictures(ids, pixel_values, self.config) or pixel_values is None:
            return np.empty((0, self.config.hidden_size), np.float32)
        if self._vision is None:
            self._vision = self._load("vision_encoder", self._file)
        return np.concatenate([_run(self._vision, tile[None])[0] for tile in pixel_values])

    def _load(self, method: str, file: Path) -> Any:
        try:
            return self._program.load_method(method)
        except Exception as error:  # its exceptions share no base class
            raise UserError(f"{file}: ExecuTorch cannot load {method} ({error})") from error


def _run(method: Any, *inputs: NDArray[Any]) -> NDArray[Any]:
    """A method's output, which is the caller's.

    NumPy copies it. ExecuTorch's binding would let torch do that, which takes OpenMP's threads for
    32,768 numbers and more; these then wait for work in a loop, on XNNPACK's cores, and a step
    takes half as long again.
    """
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
    return method._method(tensors, clone_outputs=False)[0].numpy().copy()


def buffer_name(name: str) -> str:
    """The decoder's buffer for a tensor of the neutral layout: "3.ssm" -> its name in the file."""
    layer, _, kind = name.partition(".")
    return f"layers.{layer}.attention.{kind}"


def check_whole(file: Path) -> None:
    """UserError unless `file` is a .pte, and as long as its header says.

    ExecuTorch reads beyond the end of a shorter one. The header (schema/extended_header.h there):
    8 bytes of flatbuffer, "eh00", its length, the program's size, where segments begin and, in
    newer files, their size.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a .pte")
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(40)
    if len(head) < 32 or not head[4:8].startswith(b"ET"):
        raise UserError(f"{file}: not an ExecuTorch program; expected a .pte")
    if head[8:12] != b"eh00":
        return  # a program without segments, which ours has
    (length,) = struct.unpack("<I", head[12:16])
    program, segments = struct.unpack("<QQ", head[16:32])
    data = struct.unpack("<Q", head[32:40])[0] if length >= 32 and len(head) >= 40 else 0
    expected = segments + data if segments else program
    if size < max(expected, segments):
        raise UserError(
            f"{file}: truncated, {size:,} bytes of {max(expected, segments):,}; copy or export it "
            "again"
        )


def _tokenizer(folder: Path, manifest: Manifest) -> Path | None:
    """The folder beside the file, if it holds the tokenizer that the model was exported with."""
    wanted = manifest.settings.get("tokenizer_sha256")
    if not wanted or not folder.is_dir():
        return None
    for name, digest in wanted.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != digest:
            raise UserError(
                f"{file}: {'missing' if not file.is_file() else 'another tokenizer'}; this model "
                f"was exported with one of sha256 {digest}"
            )
    return folder


def _runtime(threads: int | None) -> Any:
    try:
        with quietly():
            import executorch.kernels.quantized  # noqa: F401  (registers the operators)
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            portable_lib._threadpool_get_thread_count()  # makes the pool
            if threads:
                portable_lib._unsafe_reset_threadpool(threads)
            return Runtime.get()
    except ModuleNotFoundError as error:
        raise UserError(
            "this needs executorch, which is not installed: pip install 'mmmamba-edge[executorch]'"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without what executorch and torchao have to say of themselves while they load.

    Warnings of theirs, and lines that their C++ writes to stderr about files under /sys.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    levels = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

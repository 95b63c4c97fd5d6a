"""The ONNX Runtime runtime: a bundle behind the runtimes' protocol, its state bound in place.

Every buffer is made once. A step writes a token id into one, runs two graphs, and reads logits from
another; the decoder writes each state tensor over the one it read, where the kernels allow it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.bundle import read_manifest, verify_files
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
from mmmamba_edge.runtimes.onnx_state import OnnxState, Tensor

if TYPE_CHECKING:
    import onnxruntime as ort

# Tokens a prefill reads at a time. At full size (int4, 2 threads) 64 to 512 are equally fast within
# the noise of 3 %; memory grows with it.
PREFILL_CHUNK = 128

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}

# Providers whose memory is not the CPU's, by ONNX Runtime's name of it: states stay there.
DEVICES = {"cuda": "cuda", "tensorrt": "cuda"}

# Dialects whose kernels write `present_state` over `past_state` exactly. Plain ONNX is expanded to
# a Scan, which promises nothing of the kind: such states hold two copies and take turns.
IN_PLACE = frozenset({"com.microsoft"})


class OnnxRuntimeRunner:
    """A bundle on ONNX Runtime.

    Args:
        bundle: the folder.
        threads: for one operator; None: as many as ONNX Runtime likes (physical cores).
        provider: where it runs: "cpu", or another that the installed onnxruntime was built with.
        verify: hash the files first (see `bundle.verify_files`).

    Raises:
        UserError: not a bundle, a damaged one, or a provider that is not there.
    """

    def __init__(
        self, bundle: str | Path, threads: int | None = None, provider: str = "cpu", *,
        verify: bool | None = None,
    ):  # fmt: skip
        self.folder = Path(bundle)
        self.manifest: Manifest = read_manifest(self.folder)
        self._options = threads, _provider_names(provider)
        verify_files(self.folder, self.manifest, hashes=verify)
        self.config = self.manifest.model
        self.model_id = self.manifest.model_id
        self.quant = self.manifest.quant
        self.max_context = self.manifest.max_context
        self.tokenizer_dir = self.folder / TOKENIZER if self.manifest.tokenizer else None
        self._device = DEVICES.get(provider)
        self.in_place = provider == "cpu" and self.manifest.ops in IN_PLACE

        self._decoder = self._session("decoder", threads)
        # A look-up is over before a second thread would wake, and idle ones would spin.
        self._embed = self._session("embed", 1)
        self._vision: ort.InferenceSession | None = None

        self._keep = self._tensor(np.ones(1, np.int64))
        self._past_length = self._tensor(np.zeros(1, np.int64))
        self._has_cache = any(is_cache(t.name) for t in self.manifest.state)
        self._logits = self._tensor(np.zeros((1, 1, self.config.vocab_size), np.float32))
        self._step_id = self._tensor(np.zeros((1, 1), np.int64))
        self._step_vector = self._tensor(np.zeros((1, 1, self.config.hidden_size), np.float32))
        self._step_embed = self._bind_embed(self._step_id, self._step_vector)

    # --- the protocol ---------------------------------------------------------------------------

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float32], OnnxState]:
        """Read a prompt in chunks; see `runtimes.base.Runner.prefill`.

        The logits lie in a buffer that the next call writes over.
        """
        own = self.new_state() if state is None else self._own(state)
        ids = check_ids(input_ids, self.config, own.tokens, self.max_context)
        for part, vectors in self._chunks(ids, pixel_values):
            self._run(own, self._bind_decoder(own, vectors, self._keep, self._logits), part)
            if progress:
                progress(part.stop, len(ids))
        return self._logits.pull()[0, 0], own

    def step(self, token_id: int, state: State) -> tuple[NDArray[np.float32], OnnxState]:
        """Read one token; see `runtimes.base.Runner.step`.

        The logits lie in a buffer that the next call writes over.
        """
        own = self._own(state)
        check_ids(np.array([token_id]), self.config, own.tokens, self.max_context)
        self._step_id.array[0, 0] = token_id
        self._step_id.push()
        self._embed.run_with_iobinding(self._step_embed)
        binding = own.bindings[own.now]
        if binding is None:
            binding = self._bind_decoder(own, self._step_vector, self._keep, self._logits)
            own.bindings[own.now] = binding
        self._run(own, binding, slice(0, 1))
        return self._logits.pull()[0, 0], own

    def new_state(self) -> OnnxState:
        """A state that has read nothing."""
        return OnnxState(self.manifest.state, 1 if self.in_place else 2, self, self._device)

    def load_state(self, arrays: Arrays, tokens: int) -> OnnxState:
        """A state from the neutral layout."""
        new = self.new_state()
        check_room(tokens, self.max_context)
        targets = {
            name: tensor.array[0, :, :tokens] if is_cache(name) else tensor.array[0]
            for name, tensor in new.past.items()
        }
        check_state(arrays, {name: target.shape for name, target in targets.items()})
        for name, target in targets.items():
            target[:] = arrays[name]
            new.past[name].push()
        new.tokens = tokens
        return new

    # --- beyond the protocol --------------------------------------------------------------------

    def read_all(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
    ) -> tuple[NDArray[np.float32], OnnxState]:
        """`prefill` with the logits of every position: (tokens, vocab_size), the caller's own."""
        own = self.new_state() if state is None else self._own(state)
        ids = check_ids(input_ids, self.config, own.tokens, self.max_context)
        every = np.empty((len(ids), self.config.vocab_size), np.float32)
        keep = self._tensor(np.zeros(1, np.int64))
        for part, vectors in self._chunks(ids, pixel_values):
            logits = self._tensor(every[None, part])
            self._run(own, self._bind_decoder(own, vectors, keep, logits), part)
            logits.pull()
        return every, own

    def vectors(
        self, input_ids: NDArray[np.int64], pixel_values: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """What the decoder is given for a prompt: (1, tokens, hidden)."""
        chunks = self._chunks(input_ids, pixel_values)
        return np.concatenate([vectors.pull() for _, vectors in chunks], axis=1)

    def image_vectors(
        self, ids: NDArray[np.int64], pixel_values: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Vectors (image tokens, hidden) for the image positions of `ids`, in order."""
        if not check_pictures(ids, pixel_values, self.config) or pixel_values is None:
            return np.empty((0, self.config.hidden_size), np.float32)
        if self._vision is None:
            self._vision = self._session("vision", self._options[0])
        vision = self._vision  # one tile at a time bounds its memory, and costs no time
        parts = [np.asarray(vision.run(None, {"pixel_values": t[None]})[0]) for t in pixel_values]
        return np.concatenate(parts, axis=1)[0]

    def drop_vision(self) -> None:
        """Give back the memory of the vision graph; the next picture loads it again."""
        self._vision = None

    # --- reading --------------------------------------------------------------------------------

    def _chunks(
        self, ids: NDArray[np.int64], pixel_values: NDArray[np.float32] | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The prompt in pieces: which positions, and their vectors (1, tokens, hidden)."""
        images = self.image_vectors(ids, pixel_values)
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = slice(start, min(start + PREFILL_CHUNK, len(ids)))
            own = self._tensor(np.ascontiguousarray(ids[None, part]))
            shape = (*own.array.shape, self.config.hidden_size)
            vectors = self._tensor(np.empty(shape, np.float32))
            self._embed.run_with_iobinding(self._bind_embed(own, vectors))
            places = np.flatnonzero(ids[part] == self.config.img_context_token_id)
            if len(places):
                vectors.pull()[0, places], images = images[: len(places)], images[len(places) :]
                vectors.push()
            yield part, vectors

    def _run(self, state: OnnxState, binding: "ort.IOBinding", part: slice) -> None:
        if self._has_cache:
            self._past_length.array[0] = state.tokens
            self._past_length.push()
        self._decoder.run_with_iobinding(binding)
        state.advance(part.stop - part.start)

    def _bind_decoder(
        self, state: OnnxState, vectors: Tensor, keep: Tensor, logits: Tensor
    ) -> "ort.IOBinding":
        binding = self._decoder.io_binding()
        binding.bind_ortvalue_input("inputs_embeds", vectors.value)
        binding.bind_ortvalue_input("logits_to_keep", keep.value)
        if self._has_cache:
            binding.bind_ortvalue_input("past_length", self._past_length.value)
        binding.bind_ortvalue_output("logits", logits.value)
        for name, tensor in state.past.items():
            binding.bind_ortvalue_input(f"past_state.{name}", tensor.value)
        for name, tensor in state.present.items():
            binding.bind_ortvalue_output(f"present_state.{name}", tensor.value)
        return binding

    def _bind_embed(self, ids: Tensor, vectors: Tensor) -> "ort.IOBinding":
        binding = self._embed.io_binding()
        binding.bind_ortvalue_input("input_ids", ids.value)
        binding.bind_ortvalue_output("inputs_embeds", vectors.value)
        return binding

    # --- checks ---------------------------------------------------------------------------------

    def _own(self, state: State) -> OnnxState:
        return check_own(state, OnnxState, self)

    def _tensor(self, array: NDArray) -> Tensor:
        return Tensor(array, self._device)

    # --- sessions -------------------------------------------------------------------------------

    def _session(self, graph: str, threads: int | None) -> "ort.InferenceSession":
        """Open one graph. Its weights are memory-mapped from the file beside it."""
        import onnxruntime as ort

        options = session_options(self.manifest, threads)
        file = self.folder / self.manifest.graphs[graph]
        try:
            return ort.InferenceSession(str(file), options, providers=self._options[1])
        except Exception as error:  # its exceptions share no base class
            raise UserError(f"{file}: ONNX Runtime cannot open it ({error})") from error


def session_options(manifest: Manifest, threads: int | None) -> "ort.SessionOptions":
    """How ONNX Runtime is to run a bundle's graphs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings are about its own choices
    # It would plan one block of memory for each length of text it meets, and keep them all: tens of
    # MiB, more with every new length, and no faster (docs/performance.md).
    options.enable_mem_pattern = False
    if manifest.ops == "standard":
        # Plain ONNX says DequantizeLinear, then MatMul; do that, and do not make the activations
        # int8 as well, which ONNX Runtime would.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _provider_names(provider: str) -> list[str]:
    """What ONNX Runtime calls a provider, the CPU behind it for what it cannot run."""
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise UserError(
            "this needs onnxruntime, which is not installed: pip install "
            "'mmmamba-edge[onnxruntime]' (or [onnxruntime-gpu])"
        ) from error
    available = [name for name, full in PROVIDERS.items() if full in ort.get_available_providers()]
    if provider not in available:
        raise UserError(
            f"provider {provider!r}: this onnxruntime has {', '.join(available)}"
            + ("; install 'mmmamba-edge[onnxruntime-gpu]'" if provider == "cuda" else "")
        )
    names = [PROVIDERS[provider]]
    return names if provider == "cpu" else [*names, PROVIDERS["cpu"]]

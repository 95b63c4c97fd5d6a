"""The PyTorch runtime: what exported bundles are verified against, and `--runtime torch`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.bnb_layers import quantize_layers
from mmmamba_edge.model.checkpoints import Checkpoint, load_model, open_checkpoint
from mmmamba_edge.model.decoder import DEFAULT_CONTEXT, DecoderState, MMMamba
from mmmamba_edge.model.fused_step import FusedStep, why_not_fused
from mmmamba_edge.model.layers import AttentionState
from mmmamba_edge.model.recorded_step import RecordedStep
from mmmamba_edge.runtimes.base import Arrays, Progress, State
from mmmamba_edge.runtimes.checks import check_ids, check_pictures, check_room, check_state

Kernels = Literal["auto", "fused", "plain"]
PREFILL_CHUNK = 512  # tokens a prefill reads at a time: bounds its memory, costs nothing measurable


@dataclass
class TorchState:
    """A `DecoderState` of batch 1, and the step recorded for it once it has decoded on CUDA."""

    inner: DecoderState
    recorded: RecordedStep | None = field(default=None, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return int(self.inner.length[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' state."""
        return self.inner.nbytes

    def copy(self) -> "TorchState":
        """An independent copy."""
        return TorchState(self.inner.copy())

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The neutral layout of runtimes/base.py."""
        out = {}
        for i, layer in enumerate(self.inner.layers):
            for name, tensor in layer.tensors().items():
                array = tensor[0].float().cpu().numpy()
                out[f"{i}.{name}"] = (
                    array[:, : self.tokens].copy()
                    if isinstance(layer, AttentionState)
                    else array.copy()
                )
        return out


class TorchRunner:
    """A model in PyTorch behind the runtimes' protocol."""

    quant: str = "none"

    def __init__(
        self, model: MMMamba, *, model_id: str, tokenizer_dir: Path | None = None,
        max_context: int = DEFAULT_CONTEXT, kernels: Kernels = "auto",
    ):  # fmt: skip
        """A runner of `model`.

        Args:
            model: on any device, in any floating type.
            model_id, tokenizer_dir, max_context: as in `runtimes.base.Runner`.
            kernels: of single steps: "fused" (model/fused_step.py), "plain" PyTorch, or "auto":
                fused on CUDA wherever they can run.

        Raises:
            UserError: "fused" cannot run here.
        """
        if model.config.pixel_shuffle_loc == "post":
            raise UserError(
                "pixel_shuffle_loc 'post' reads two sequences at once; use load_model(...) with "
                "hd_input_ids instead of a runner"
            )
        self.model = model
        self.config: Config = model.config
        self.model_id = model_id
        self.tokenizer_dir = tokenizer_dir
        self.max_context = None if model.config.variant == "linear" else max_context
        cuda = model.language_model.output.weight.is_cuda
        fused = kernels == "fused" or (kernels == "auto" and cuda and not why_not_fused(model))
        self._fused = FusedStep(model) if fused else None

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path | Checkpoint, *, device: str = "cpu",
        dtype: torch.dtype | None = torch.float32, max_context: int = DEFAULT_CONTEXT,
        bits: int = 0,
    ) -> "TorchRunner":  # fmt: skip
        """Open a checkpoint folder, with the tokenizer files in it if there are any.

        Args:
            checkpoint: the folder, or an open one.
            device, dtype: of the weights.
            max_context: tokens that attention layers keep.
            bits: 8 or 4: layers rounded to bitsandbytes' int8 or NF4; 0: as they are.
        """
        source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        files = ("tokenizer.json", "tokenizer.model")
        has_tokenizer = any((source.folder / name).is_file() for name in files)
        model = load_model(source, "cpu" if bits else device, dtype)
        if bits:
            quantize_layers(model, bits)
            model = model.to(device)
        runner = cls(
            model,
            model_id=source.weights_id(),
            tokenizer_dir=source.folder if has_tokenizer else None,
            max_context=max_context,
        )
        runner.quant = {0: "none", 8: "bnb-int8", 4: "bnb-nf4"}[bits]
        return runner

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float32], TorchState]:
        """Read a prompt in chunks; see `runtimes.base.Runner.prefill`."""
        own = self.new_state() if state is None else _own(state)
        ids = self._ids(input_ids, own)
        logits, done = torch.empty(0), 0
        for part, images in self._chunks(ids, pixel_values):
            logits = self.model.read_on(self._embedded(part, images, own.inner), None, own.inner)
            done += part.shape[1]
            if progress:
                progress(done, len(ids))
        return logits[0].float().cpu().numpy(), own

    @torch.inference_mode()
    def step(self, token_id: int, state: State) -> tuple[NDArray[np.float32], TorchState]:
        """Read one token; see `runtimes.base.Runner.step`."""
        own = _own(state)
        ids = self._ids(np.array([token_id]), own)
        # A lone image token has no picture: the plain step says so.
        if self._fused is None or token_id == self.config.img_context_token_id:
            logits, _ = self.model.step(ids, own.inner)
            return logits[0].float().cpu().numpy(), own
        if own.recorded is None or own.recorded.fused is not self._fused:
            own.recorded = RecordedStep(self._fused, own.inner)
        logits = own.recorded.step(token_id, own.inner)
        return logits.to("cpu", copy=True).numpy(), own

    @torch.inference_mode()
    def read_all(
        self,
        input_ids: NDArray[np.int64],
        pixel_values: NDArray[np.float32] | None = None,
        state: State | None = None,
    ) -> tuple[NDArray[np.float32], TorchState]:
        """`prefill` with the logits of every position: (tokens, vocab_size)."""
        own = self.new_state() if state is None else _own(state)
        ids = self._ids(input_ids, own)
        language, every = self.model.language_model, []
        for part, images in self._chunks(ids, pixel_values):
            x = self._embedded(part, images, own.inner)
            x = language.model.norm(self.model.read_layers(x, None, own.inner))
            every.append(language.output(x)[0].float().cpu().numpy())
        return np.concatenate(every), own

    def new_state(self) -> TorchState:
        """A state that has read nothing."""
        with torch.inference_mode():
            return TorchState(self.model.new_state(1, max_context=self.max_context))

    @torch.inference_mode()
    def load_state(self, arrays: Arrays, tokens: int) -> TorchState:
        """A state from the neutral layout."""
        new = self.new_state()
        check_room(tokens, self.max_context)
        targets = {
            f"{i}.{name}": tensor[0, :, :tokens] if isinstance(layer, AttentionState) else tensor[0]
            for i, layer in enumerate(new.inner.layers)
            for name, tensor in layer.tensors().items()
        }
        check_state(arrays, {name: tuple(target.shape) for name, target in targets.items()})
        for name, target in targets.items():
            target.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))
        for layer in new.inner.layers:
            if isinstance(layer, AttentionState):
                layer.length.fill_(tokens)
        new.inner.length.fill_(tokens)
        return new

    def _ids(self, input_ids: NDArray[np.int64], state: TorchState) -> torch.Tensor:
        ids = check_ids(input_ids, self.config, state.tokens, self.max_context)
        return torch.from_numpy(ids).to(self.model.language_model.output.weight.device)

    def _chunks(
        self, ids: torch.Tensor, pixel_values: NDArray[np.float32] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The prompt in pieces: ids (1, tokens), and the image vectors they hold."""
        images = None
        if check_pictures(ids.cpu().numpy(), pixel_values, self.config):
            images = self.model.image_vectors(torch.from_numpy(pixel_values).to(ids.device))
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = ids[start : start + PREFILL_CHUNK]
            count = int((part == self.config.img_context_token_id).sum())
            mine, images = (None, images) if images is None else (images[:count], images[count:])
            yield part[None], mine if count else None

    def _embedded(
        self, ids: torch.Tensor, images: torch.Tensor | None, state: DecoderState
    ) -> torch.Tensor:
        """The embedding half over one chunk: (1, tokens, hidden)."""
        model = self.model
        return model.normalize(model.encode(model.embed_tokens(ids, None, images), None, state))


def _own(state: State) -> TorchState:
    if not isinstance(state, TorchState):
        raise UserError(
            f"a {type(state).__name__} of another runtime; convert it with "
            "runner.load_state(state.arrays(), state.tokens)"
        )
    return state

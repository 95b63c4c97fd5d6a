"""What PyTorch says of some prompts, with one layer in memory at a time, however large the model.

All prompts pass a layer before the next one is loaded; their hidden states are small. The weights
are those of the checkpoint in float32, or the numbers that a scheme's codes stand for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmmamba_edge.config import Config
from mmmamba_edge.export.weights import EMBEDDING, HEAD, PROJECTOR, STEM, Weights
from mmmamba_edge.model.checkpoints import assign
from mmmamba_edge.model.decoder import DecoderLayer, DecoderState
from mmmamba_edge.model.layers import Attention, AttentionState, RMSNorm
from mmmamba_edge.model.mixer import MixerState
from mmmamba_edge.model.vision import VisionEmbeddings, pixel_shuffle, pixel_shuffle_proj
from mmmamba_edge.runtimes.torch_runner import TorchState

Floats = NDArray[np.float32]
HEAD_ROWS = 8192  # of the vocabulary, in memory at a time


@dataclass(frozen=True)
class Reading:
    """What a model says of a prompt."""

    logits: Floats  # (tokens, vocab_size)
    state: dict[str, Floats]  # after it, in the neutral layout


@torch.inference_mode()
def read_streamed(
    weights: Weights, prompts: Sequence[tuple[NDArray[np.int64], Floats | None]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Reading]:  # fmt: skip
    """Read prompts whole.

    Args:
        weights: where tensors come from, and as what they are seen.
        prompts: ids (tokens,) and tiles (tiles, 3, height, width) of each.
        progress: told layers done, and how many there are.
    """
    config = weights.config
    hidden = embedded(weights, prompts)
    kept: list[list[Any]] = [[] for _ in prompts]
    total = len(config.layer_types)
    for index, kind in enumerate(config.layer_types):
        if index == len(config.embedding.layer_types) and config.normalize_encoder_output:
            hidden = [normalised(x) for x in hidden]
        layer = load_layer(weights, index, kind)
        for i, x in enumerate(hidden):
            state = new_state(layer, x)
            hidden[i] = layer(x, None, state)
            kept[i].append(state)
        if progress:
            progress(index + 1, total)
    return [
        Reading(logits, TorchState(DecoderState(states, torch.tensor([len(logits)]))).arrays())
        for logits, states in zip(_logits(weights, hidden), kept, strict=True)
    ]


def normalised(x: Tensor) -> Tensor:
    """(..., hidden) of length 1: the first half's output, where `normalize_encoder_output`."""
    return nn.functional.normalize(x, dim=-1, eps=0.0)


def new_state(layer: DecoderLayer, x: Tensor) -> AttentionState | MixerState:
    """A state of one layer that has read nothing, with room for `x` (1, tokens, hidden)."""
    mix = layer.attention
    if isinstance(mix, Attention):
        return mix.new_state(1, x.shape[1], x.device, x.dtype)
    return mix.new_state(1, x.device, x.dtype)  # pyright: ignore[reportCallIssue]


def embedded(
    weights: Weights, prompts: Sequence[tuple[NDArray[np.int64], Floats | None]]
) -> list[Tensor]:
    """(1, tokens, hidden) of each prompt: rows of the table, vectors of its tiles."""
    config = weights.config
    image = config.img_context_token_id
    wanted = sorted({int(i) for ids, _ in prompts for i in ids})
    table = {i: weights.seen(EMBEDDING, slice(i, i + 1))[0] for i in wanted}
    see = _vision(weights) if any(tiles is not None for _, tiles in prompts) else None
    out = []
    for ids, tiles in prompts:
        x = torch.from_numpy(np.stack([table[int(i)] for i in ids]))
        if tiles is not None and see is not None:
            x[torch.from_numpy(ids == image)] = see(torch.from_numpy(tiles))
        out.append(x[None])
    return out


def _vision(weights: Weights) -> Callable[[Tensor], Tensor]:
    """Tiles (tiles, 3, height, width) -> (image tokens, hidden)."""
    config = weights.config
    with torch.device("meta"):
        stem, projector = VisionEmbeddings(config), pixel_shuffle_proj(config)
    fill(stem, STEM, weights)
    fill(projector, PROJECTOR, weights)
    return lambda tiles: projector(pixel_shuffle(stem(tiles), config.shuffle)).flatten(0, 1)


def load_layer(weights: Weights, index: int, kind: str) -> DecoderLayer:
    """Layer `index` of the whole stack, as the weights are seen."""
    with torch.device("meta"):
        layer = DecoderLayer(weights.config.stack_of(index), kind)
    return fill(layer, weights.prefix(index), weights)


M = TypeVar("M", bound=nn.Module)


def fill(module: M, prefix: str, weights: Weights) -> M:
    """The module with its tensors, whose names begin with `prefix`."""
    for name in module.state_dict():
        assign(module, name, torch.from_numpy(weights.seen(prefix + name)))
    return module


def final_norm(weights: Weights) -> RMSNorm:
    """What the last layer's output passes before the head."""
    config = weights.config
    norm = RMSNorm(config.hidden_size, config.llm.rms_norm_eps)
    return fill(norm, "language_model.model.norm.", weights)


def _logits(weights: Weights, hidden: list[Tensor]) -> list[Floats]:
    """(tokens, vocab_size) of each prompt, the head a few rows at a time."""
    config: Config = weights.config
    norm = final_norm(weights)
    normed = [norm(x[0]) for x in hidden]
    out = [np.empty((len(x), config.vocab_size), np.float32) for x in normed]
    for start in range(0, config.vocab_size, HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, config.vocab_size))
        head = torch.from_numpy(weights.seen(HEAD, rows))
        for logits, x in zip(out, normed, strict=True):
            logits[:, rows] = (x @ head.T).numpy()
    return out

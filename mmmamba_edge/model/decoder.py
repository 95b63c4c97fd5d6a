"""The whole model: one decoder for teacher, mmMamba-linear and mmMamba-hybrid.

Module names are those of the checkpoints, so `state_dict()` is the training layout (spec 2, 3.1).
Only `language_model.model.tok_embeddings` is not here: every released file carries it and nothing
reads it; `checkpoints.py` keeps it on conversion.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.layers import Attention, AttentionState, FeedForward, RMSNorm
from mmmamba_edge.model.mixer import Mamba2Mixer, MixerState
from mmmamba_edge.model.recompute import Frugal, Recompute
from mmmamba_edge.model.vision import VisionEmbeddings, pixel_shuffle, pixel_shuffle_proj

DEFAULT_CONTEXT = 4096  # tokens a hybrid's or teacher's cache is made for when nobody says


@dataclass
class DecoderState:
    """What the model remembers of a batch of sequences."""

    layers: list[AttentionState | MixerState]
    length: Tensor  # (batch,) int64: tokens read

    def copy(self) -> "DecoderState":
        """An independent copy."""
        return DecoderState([layer.copy() for layer in self.layers], self.length.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors().values())


class DecoderLayer(Frugal):
    """Pre-norm block: x += mix(norm(x)); x += ffn(norm(x)), mix being attention or Mamba-2."""

    def __init__(self, config: StackConfig, kind: str):
        super().__init__()
        self.attention = Attention(config) if kind == "attention" else Mamba2Mixer(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, lengths: Tensor | None, state=None) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden); a given state is updated."""
        return self.again(self._block, x, lengths, state)

    def _block(self, x: Tensor, lengths: Tensor | None, state) -> Tensor:
        return self.fed(x, self.attention(self.attention_norm(x), lengths, state))

    def fed(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block from the mixer's output on: both (batch, seq, hidden)."""
        x = x + mixed
        return x + self.feed_forward(self.ffn_norm(x))


class EmbeddingModel(nn.Module):
    """The holistic embedding: text table, vision stem, and the first layers of the decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.llm_text_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embeddings = VisionEmbeddings(config)
        self.pixel_shuffle_proj = pixel_shuffle_proj(config)
        self.encoder = nn.ModuleList(
            DecoderLayer(config.embedding, kind) for kind in config.embedding.layer_types
        )


class LanguageStack(nn.Module):
    """The language half's layers and final norm (`language_model.model` in the checkpoints)."""

    def __init__(self, config: Config):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config.llm, kind) for kind in config.llm.layer_types
        )
        self.norm = RMSNorm(config.hidden_size, config.llm.rms_norm_eps)


class LanguageModel(nn.Module):
    """The language half with its vocabulary head."""

    def __init__(self, config: Config):
        super().__init__()
        self.model = LanguageStack(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class MMMamba(nn.Module):
    """Ids and pixels to logits: `forward` reads whole sequences, `prefill` and `step` go on."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding_model = EmbeddingModel(config)
        self.language_model = LanguageModel(config)

    def recompute(self, what: Recompute) -> None:
        """What a backward pass computes again rather than keeps; nothing, from the start."""
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.frugal = what == "layers"
            elif isinstance(module, Frugal):
                module.frugal = what != "nothing"

    # --- whole sequences ------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        hd_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hd_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: (batch, seq); image positions hold `config.img_context_token_id`.
            pixel_values: (tiles, 3, height, width), tiles of the whole batch in reading order.
            image_flags: (tiles,), 0 drops a tile (the dummy tiles of text-only rows).
            hd_input_ids: (batch, hd_seq), only for pixel_shuffle_loc 'post': the same text with
                every patch as a token, for the embedding half.
            attention_mask: (batch, seq), 0 at padding on either side; None: no padding.
            hd_attention_mask: likewise for hd_input_ids.

        Returns:
            (batch, seq, vocab_size); rows of padding hold zeros.
        """
        ids, lengths, order = _compact(input_ids, attention_mask)
        x = self.embed(ids, lengths, pixel_values, image_flags, hd_input_ids, hd_attention_mask)
        logits = self.language_model.output(self.read(x, lengths))
        if order is None or lengths is None:
            return logits
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = logits * real[..., None]
        return torch.zeros_like(logits).scatter(1, order[..., None].expand_as(logits), logits)

    def embed(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        hd_input_ids: Tensor | None = None,
        hd_attention_mask: Tensor | None = None,
        state: DecoderState | None = None,
    ) -> Tensor:
        """The embedding half: right-padded ids -> input of the other half (batch, seq, hidden)."""
        if pixel_values is not None and image_flags is not None:
            pixel_values = pixel_values[image_flags.flatten() == 1]
        if self.config.pixel_shuffle_loc == "pre":
            x = self.embed_tokens(ids, lengths, self.image_vectors(pixel_values))
            x = self.encode(x, lengths, state)
        else:
            if hd_input_ids is None:
                if pixel_values is not None and len(pixel_values):
                    raise UserError("pixel_shuffle_loc 'post': images need hd_input_ids")
                hd_input_ids, hd_attention_mask = ids, None  # text is the same in both sequences
                hd_lengths = lengths
            else:
                hd_input_ids, hd_lengths, _ = _compact(hd_input_ids, hd_attention_mask)
            patches = self.patch_vectors(pixel_values)
            hidden = self.encode(
                self.embed_tokens(hd_input_ids, hd_lengths, patches), hd_lengths, state
            )
            x = self._assemble(ids, lengths, hd_input_ids, hd_lengths, hidden)
        return self.normalize(x)

    def read(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The language half over `embed`'s output, final norm included: what the head is given.

        (batch, seq, hidden) -> (batch, seq, hidden), right-padded.
        """
        for layer in self.language_model.model.layers:
            x = layer(x, lengths)
        return self.language_model.model.norm(x)

    # --- with a state ---------------------------------------------------------------------------

    def new_state(self, batch: int = 1, *, max_context: int | None = None) -> DecoderState:
        """A state that has read nothing; attention layers get a cache for `max_context` tokens."""
        weight = self.language_model.output.weight
        capacity = max_context or DEFAULT_CONTEXT
        layers = []
        for layer in self.layers:
            mix = layer.attention
            if isinstance(mix, Attention):
                layers.append(mix.new_state(batch, capacity, weight.device, weight.dtype))
            else:
                layers.append(mix.new_state(batch, weight.device, weight.dtype))
        return DecoderState(layers, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def prefill(
        self,
        input_ids: Tensor,
        state: DecoderState | None = None,
        pixel_values: Tensor | None = None,
        image_flags: Tensor | None = None,
        hd_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hd_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Read tokens; arguments as in `forward`.

        Returns:
            Logits of each row's last real token, (batch, vocab_size), and the state (the one given,
            updated, or a new one). Padding leaves no trace in it.
        """
        ids, lengths, _ = _compact(input_ids, attention_mask)
        state = self.new_state(len(ids)) if state is None else state
        x = self.embed(
            ids, lengths, pixel_values, image_flags, hd_input_ids, hd_attention_mask, state
        )
        return self.read_on(x, lengths, state), state

    def step(self, token_ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one token a row: (batch,) ids -> logits (batch, vocab_size), and the state."""
        return self.prefill(token_ids[:, None], state)

    # --- parts ----------------------------------------------------------------------------------

    @property
    def layers(self) -> list[DecoderLayer]:
        """All layers, numbered 0..N-1 over the whole stack, embedding layers first."""
        return [*self.embedding_model.encoder, *self.language_model.model.layers]  # pyright: ignore

    def patch_vectors(self, pixel_values: Tensor | None) -> Tensor | None:
        """(tiles, 3, height, width) -> (tiles * patches, hidden), before pixel shuffle."""
        if pixel_values is None or not len(pixel_values):
            return None
        stem = self.embedding_model.vision_embeddings
        return stem(pixel_values.to(stem.patch_embedding.weight.dtype)).flatten(0, 1)

    def image_vectors(self, pixel_values: Tensor | None) -> Tensor | None:
        """(tiles, 3, height, width) -> (tiles * tokens_per_tile, hidden), shuffled ('pre')."""
        patches = self.patch_vectors(pixel_values)
        if patches is None or pixel_values is None:
            return None
        return self._shuffle(patches.unflatten(0, (len(pixel_values), -1))).flatten(0, 1)

    def embed_tokens(self, ids: Tensor, lengths: Tensor | None, images: Tensor | None) -> Tensor:
        """(batch, seq, hidden): text from the table, image rows from `images` in reading order."""
        x = self.embedding_model.llm_text_embeddings(ids)
        places = self._image_places(ids, lengths)
        found = 0 if images is None else len(images)
        if images is None:
            if bool(places.any()):
                raise UserError(
                    f"the ids hold {int(places.sum())} image tokens, but no pixels came"
                )
            return x
        if int(places.sum()) != found:
            raise UserError(
                f"the ids hold {int(places.sum())} image tokens, the pixels make {found}"
            )
        return x.masked_scatter(places[..., None], images.to(x.dtype))

    def normalize(self, x: Tensor) -> Tensor:
        """Divide each token vector by its L2 norm where `normalize_encoder_output` asks for it."""
        return F.normalize(x, dim=-1, eps=0.0) if self.config.normalize_encoder_output else x

    def read_on(self, x: Tensor, lengths: Tensor | None, state: DecoderState) -> Tensor:
        """The language half over `embed`'s output: logits of each row's last real token."""
        x = self.read_layers(x, lengths, state)
        last = x[:, -1] if lengths is None else x[torch.arange(len(x)), lengths - 1]
        return self.language_model.output(self.language_model.model.norm(last))

    def read_layers(self, x: Tensor, lengths: Tensor | None, state: DecoderState) -> Tensor:
        """The language half's layers, the final norm not included; the state has then read `x`."""
        first = len(self.embedding_model.encoder)
        layers = self.language_model.model.layers
        for layer, memory in zip(layers, state.layers[first:], strict=True):
            x = layer(x, lengths, memory)
        state.length = state.length + (x.shape[1] if lengths is None else lengths)
        return x

    def encode(self, x: Tensor, lengths: Tensor | None, state: DecoderState | None) -> Tensor:
        """The embedding layers: (batch, seq, hidden) -> (batch, seq, hidden)."""
        for i, layer in enumerate(self.embedding_model.encoder):
            x = layer(x, lengths, None if state is None else state.layers[i])
        return x

    def _shuffle(self, patches: Tensor) -> Tensor:
        """(tiles, patches, hidden) -> (tiles, tokens_per_tile, hidden)."""
        return self.embedding_model.pixel_shuffle_proj(pixel_shuffle(patches, self.config.shuffle))

    def _assemble(
        self, ids: Tensor, lengths: Tensor | None, hd_ids: Tensor, hd_lengths: Tensor | None,
        hidden: Tensor,
    ) -> Tensor:  # fmt: skip
        """'post': merge each tile's patches after the embedding half, lay all out as in `ids`."""
        places, hd_places = self._image_places(ids, lengths), self._image_places(hd_ids, hd_lengths)
        text, hd_text = _real(ids, lengths) & ~places, _real(hd_ids, hd_lengths) & ~hd_places
        if not torch.equal(text.sum(1), hd_text.sum(1)):
            raise UserError(
                f"input_ids have {text.sum(1).tolist()} text tokens a row, hd_input_ids "
                f"{hd_text.sum(1).tolist()}; the two must hold the same text"
            )
        x = hidden.new_zeros(*ids.shape, hidden.shape[-1])
        x = x.masked_scatter(text[..., None], hidden[hd_text])
        if bool(hd_places.any()):
            tiles = hidden[hd_places].unflatten(0, (-1, self.config.patches_per_tile))
            x = x.masked_scatter(places[..., None], self._shuffle(tiles))
        return x

    def _image_places(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """(batch, seq) bool: real positions that hold an image token."""
        return (ids == self.config.img_context_token_id) & _real(ids, lengths)


def _real(ids: Tensor, lengths: Tensor | None) -> Tensor:
    """(batch, seq) bool: positions that are not padding."""
    if lengths is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def _compact(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Move padding to the right, wherever it was, so that the layers know one form only.

    Returns:
        ids (batch, seq), lengths (batch,) or None without padding, and `order`, whose row b lists
        the original position of each new one.
    """
    if mask is None or bool(mask.all()):
        return ids, None, None
    real = mask.bool()
    if not bool(real.any(dim=1).all()):
        raise UserError("attention_mask: a row has no real token; give each row at least one")
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    return ids.gather(1, order), real.sum(dim=1), order

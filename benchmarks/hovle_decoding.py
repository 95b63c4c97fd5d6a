"""HoVLE's decoding in two ways, for `long_context.py` to compare with.

`Growing` does what the original code does at batch 1: every operation launched by itself, each
layer's cache grown by concatenation at every token, tables of cosines and sines in every layer,
which are made anew for every token beyond max_position_embeddings. Its attention is one of the
original's two: "flash" over the cache as it is, or "repeat", which repeats keys and values for
every query head and takes the softmax in float32. The second, unused embedding table that its
checkpoint fills is in memory too. Prompts are read by flash attention in either case, and no
attention mask is made: both are kind to it.

`StaticStep` is what a good engineer would write from PyTorch's own operations: a preallocated
cache, fused norms, flash attention over grouped heads, one CUDA graph. It decodes at one position,
the position it was recorded for; a step of a growing context costs the same.
"""

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from mmmamba_edge.model.decoder import DecoderState, MMMamba
from mmmamba_edge.model.layers import Attention, AttentionState, RMSNorm, rope_tables, rotate
from mmmamba_edge.model.recorded_step import record

GrowingAttention = Literal["flash", "repeat"]


class Growing:
    """A teacher read and decoded as the original does it.

    Args:
        model: all layers attention.
    """

    def __init__(self, model: MMMamba):
        self.model, self.attention = model, "flash"
        self.past: list[tuple[Tensor, Tensor]] = []
        self.unused = torch.zeros_like(model.embedding_model.llm_text_embeddings.weight)
        self._rope: list[tuple[Tensor, Tensor] | None] = [None] * len(model.layers)

    def _tables(self, i: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Layer i's cosines and sines, (positions, head_dim) each, for at least `tokens`."""
        kept, c = self._rope[i], self.model.config.stack_of(i)
        if kept is None or len(kept[0]) < tokens:
            self._rope[i] = None
            places = torch.arange(max(tokens, c.max_position_embeddings), device=self.unused.device)
            cos, sin = rope_tables(places[None], c, None, self.unused.dtype)
            kept = self._rope[i] = cos[0, 0], sin[0, 0]
        return kept

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.past[0][0].shape[2] if self.past else 0

    def read(self, ids: Tensor) -> Tensor:
        """ids (1, seq) -> logits of the last position (1, vocab_size) in float32."""
        model, new = self.model, []
        after = self.tokens + ids.shape[1]
        positions = torch.arange(self.tokens, after, device=ids.device)[None]
        x = model.embedding_model.llm_text_embeddings(ids)
        first = len(model.embedding_model.encoder)
        for i, layer in enumerate(model.layers):
            if i == first:
                x = model.normalize(x)
            past = self.past[i] if self.past else None
            tables = self._tables(i, after)
            mixed, kept = self._attend(
                layer.attention, layer.attention_norm(x), positions, past, tables
            )
            new.append(kept)
            if self.past:
                self.past[i] = kept  # the old one goes now, not after the last layer
            x = x + mixed
            x = x + layer.feed_forward(layer.ffn_norm(x))
        self.past = new
        head = model.language_model
        return head.output(head.model.norm(x[:, -1])).float()

    def _attend(
        self, attention, u: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        q, k, v = _heads(attention, u)
        cos, sin = (table[positions][:, None] for table in tables)  # (1, 1, seq, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        kept, seq = (k, v), q.shape[2]
        if seq > 1:
            mask = causal_lower_right(seq, k.shape[2]) if q.is_cuda else _mask(seq, k)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        elif self.attention == "flash":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = _repeated(k, groups), _repeated(v, groups)
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            y = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        return attention.wo(y.transpose(1, 2).flatten(2)), kept


class StaticStep:
    """One step of a teacher over a static cache, recorded at the position the state stands at."""

    def __init__(self, model: MMMamba, state: DecoderState):
        self._model, self._state = model, state
        self._at = int(state.length[0])
        weight = model.language_model.output.weight
        self._cuda = weight.is_cuda
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        place = torch.full((1, 1), self._at, device=weight.device)
        self._tables = [
            rope_tables(place, half, None, weight.dtype)
            for half in (model.config.embedding, model.config.llm)
        ]
        if self._cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.launch()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = record(self.launch)

    def replay(self) -> Tensor:
        """Logits (vocab_size,) after `self.token`; the state's new row is overwritten each time."""
        if not self._cuda:
            return self.launch()
        self._graph.replay()
        return self.logits

    def launch(self) -> Tensor:
        """The step's operations, enqueued."""
        model, flash = self._model, SDPBackend.FLASH_ATTENTION
        x = model.embedding_model.llm_text_embeddings(self.token)
        first, used = len(model.embedding_model.encoder), slice(0, self._at + 1)
        for i, (layer, memory) in enumerate(zip(model.layers, self._state.layers, strict=True)):
            assert isinstance(layer.attention, Attention) and isinstance(memory, AttentionState)
            if i == first:
                x = model.normalize(x)
            q, k, v = _heads(layer.attention, _norm(layer.attention_norm, x))
            cos, sin = self._tables[i >= first]
            memory.key[:, :, self._at] = rotate(k, cos, sin)[:, :, 0]
            memory.value[:, :, self._at] = v[:, :, 0]
            with sdpa_kernel(flash) if self._cuda else nullcontext():
                y = F.scaled_dot_product_attention(
                    rotate(q, cos, sin), memory.key[:, :, used], memory.value[:, :, used],
                    enable_gqa=True,
                )  # fmt: skip
            x = x + layer.attention.wo(y.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(_norm(layer.ffn_norm, x))
        head = model.language_model
        self.logits = head.output(_norm(head.model.norm, x))[0, 0]
        return self.logits


def _heads(attention: Attention, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, heads or kv_heads, seq, head_dim), not rotated."""
    c = attention.config
    groups = c.num_attention_heads // c.num_key_value_heads
    packed = attention.wqkv(u).unflatten(-1, (c.num_key_value_heads, groups + 2, c.head_dim))
    q = packed[..., :groups, :].flatten(2, 3).transpose(1, 2)
    return q, packed[..., -2, :].transpose(1, 2), packed[..., -1, :].transpose(1, 2)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _repeated(x: Tensor, groups: int) -> Tensor:
    batch, heads, seq, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, seq, dim).reshape(batch, -1, seq, dim)


def _mask(seq: int, k: Tensor) -> Tensor:
    places = torch.arange(k.shape[2], device=k.device)
    return places <= places[-seq:, None]

"""An attention layer of a .pte: RoPE, and keys and values that stay where they are."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmmamba_edge.config import StackConfig
from mmmamba_edge.export.decoder_graph import unpacked_rows
from mmmamba_edge.export.pte_memory import cache_rows
from mmmamba_edge.export.pte_weights import linear, linear_of
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.model.layers import rope_tables
from mmmamba_edge.quant.codes import take_rows

HIDDEN = -1e9  # added to a log weight or a score that must not count: exp of it is 0


class CachedAttention(nn.Module):
    """Causal attention with RoPE over a cache for `max_context` tokens.

    XNNPACK's part ends once a layer, where new rows are written into the cache. Each kv head's rows
    in use are one piece of memory, which is read where it lies: hence one head after the other.
    What depends on positions alone is computed once for all layers (`Places`).
    """

    key: Tensor
    value: Tensor

    def __init__(self, weights: Weights, prefix: str, stack: StackConfig, max_context: int):
        super().__init__()
        self.stack = stack
        rows = unpacked_rows(stack)
        packed = weights.matrix(f"{prefix}wqkv.weight")
        self.q, self.k, self.v = (linear_of(take_rows(packed, part)) for part in rows)
        self.o = linear(weights, f"{prefix}wo.weight")
        shape = (stack.num_key_value_heads, max_context, stack.head_dim)
        self.register_buffer("key", torch.zeros(shape))
        self.register_buffer("value", torch.zeros(shape))

    def forward(self, u: Tensor, places: "Places") -> Tensor:
        """(1, tokens, hidden) -> the same; keys and values are kept."""
        stack = self.stack
        heads, kv_heads, dim = stack.num_attention_heads, stack.num_key_value_heads, stack.head_dim
        groups = heads // kv_heads
        q = _rotate(self.q(u).view(-1, heads, dim), places) * dim**-0.5
        k = _rotate(self.k(u).view(-1, kv_heads, dim), places).transpose(0, 1)
        v = self.v(u).view(-1, kv_heads, dim).transpose(0, 1)
        self.key[:, places.where] = k
        self.value[:, places.where] = v
        # All queries of a kv head are rows of one matrix: its keys are read once for them.
        q = q.view(-1, kv_heads, groups, dim).transpose(0, 1).contiguous()
        q = q.view(kv_heads, -1, dim)
        heads_of = [self._head(q_head, head, places) for head, q_head in enumerate(q.split(1))]
        y = torch.cat(heads_of).view(kv_heads, -1, groups, dim).transpose(0, 1).contiguous()
        return self.o(y.view(1, -1, heads * dim))

    def _head(self, q: Tensor, head: int, places: "Places") -> Tensor:
        """(1, tokens * groups, dim) -> the same, of one kv head."""
        key, value = (cache_rows(x, head, places.end) for x in (self.key, self.value))
        scores = torch.bmm(q, key.transpose(1, 2)) + places.hidden
        return torch.bmm(torch.softmax(scores, dim=-1), value)


class Places(NamedTuple):
    """What attention layers ask of the positions that are read."""

    where: Tensor  # (tokens,): rows of the cache
    cos: Tensor  # (tokens, 1, dim)
    sin: Tensor  # (tokens, 1, dim)
    end: int  # tokens so far, the new ones too: no more of a cache is looked at
    hidden: Tensor  # (tokens * groups, end): HIDDEN where a key is later than the query
    turn: Tensor  # (dim, dim): it times [a, b] is [-b, a]


class Positions(nn.Module):
    """`Places` of a half's attention layers."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    turn: Tensor

    def __init__(self, stack: StackConfig, max_context: int):
        super().__init__()
        self.groups = stack.num_attention_heads // stack.num_key_value_heads
        positions = torch.arange(max_context)
        cos, sin = rope_tables(positions[None], stack, None, torch.float32)
        self.register_buffer("cos", cos[0, 0, :, None], persistent=False)
        self.register_buffer("sin", sin[0, 0, :, None], persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        one = torch.eye(stack.head_dim)
        half = stack.head_dim // 2
        turn = torch.cat([-one[half:], one[:half]])
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, tokens: int, start_pos: Tensor) -> Places:
        """The next `tokens` positions from `start_pos` (1,)."""
        first: Any = start_pos.item()  # int() would fix it
        end = first + tokens
        torch._check(first >= 0)
        torch._check(end <= len(self.positions))
        keys = self.positions[:end]
        where = keys[first:]  # (tokens,)
        later = (keys > where[:, None, None]).float() * HIDDEN  # (tokens, 1, end)
        hidden = later.repeat(1, self.groups, 1).reshape(-1, end)
        return Places(where, self.cos[first:end], self.sin[first:end], end, hidden, self.turn)


def _rotate(x: Tensor, places: Places) -> Tensor:
    """RoPE of (tokens, heads, dim); its half turn is a product, which XNNPACK takes."""
    return x * places.cos + nn.functional.linear(x, places.turn) * places.sin

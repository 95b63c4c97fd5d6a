"""The model as ExecuTorch is to run it: three modules, which become the methods of one .pte.

    token_embedding (1, tokens) int64                 -> (1, tokens, hidden)
    vision_encoder  (1, 3, height, width)             -> (1, tokens per tile, hidden)
    text_decoder    (1, tokens, hidden), start_pos (1,) int64
                                                      -> (1, 1, vocab_size), of the last position

One method reads prompts and single tokens, so that weights are packed once; its state are buffers
that it writes over. `start_pos` 0 begins anew: the state is multiplied by nothing, so no method to
reset it is needed. Everything here is written for XNNPACK: matrix products, and element-wise
operators that it takes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.export.pte_attention import HIDDEN, CachedAttention, Places, Positions
from mmmamba_edge.export.pte_weights import float_parameter, linear, parameter
from mmmamba_edge.export.weights import EMBEDDING, HEAD, PROJECTOR, STEM, Weights
from mmmamba_edge.model.mixer import G_NORM_EPS


def chunk_of(config: Config) -> int:
    """Tokens that text_decoder reads at once, at most.

    A tile's at least: ExecuTorch's own runner hands over all vectors of a picture together.
    """
    return max(128, config.tokens_per_tile)


class TokenEmbedding(nn.Module):
    """Rows of the table."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.table = nn.Embedding(weights.config.vocab_size, weights.config.hidden_size)
        self.table.weight = parameter(weights.matrix(EMBEDDING), activations=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, tokens) -> (1, tokens, hidden)."""
        return self.table(tokens)


class VisionEncoder(nn.Module):
    """A tile to its vectors (spec 1.3, 'pre'): patches, positions, pixel shuffle, MLP."""

    def __init__(self, weights: Weights):
        super().__init__()
        c = self.config = weights.config
        self.patch = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size)
        self.patch.weight = float_parameter(weights.tensor(f"{STEM}patch_embedding.weight"))
        self.patch.bias = float_parameter(weights.tensor(f"{STEM}patch_embedding.bias"))
        positions = weights.tensor(f"{STEM}position_embedding")[0, 1:].T  # (hidden, patches)
        self.positions = float_parameter(positions.reshape(1, c.hidden_size, c.grid, c.grid))
        self.first = linear(weights, f"{PROJECTOR}0.weight", bias=f"{PROJECTOR}0.bias")
        self.second = linear(weights, f"{PROJECTOR}2.weight", bias=f"{PROJECTOR}2.bias")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(1, 3, height, width) -> (1, tokens per tile, hidden)."""
        c = self.config
        merge, blocks = c.shuffle, c.grid // c.shuffle
        x = self.patch(pixel_values) + self.positions
        x = x.reshape(c.hidden_size, blocks, merge, blocks, merge).permute(1, 3, 2, 4, 0)
        x = x.reshape(1, c.tokens_per_tile, c.hidden_size * merge**2)
        return self.second(nn.functional.gelu(self.first(x)))


class Tables(NamedTuple):
    """Constant matrices, cut to the number of tokens once for all layers.

    XNNPACK slices at fixed places only: what depends on the number of tokens is a product instead.
    """

    sums: Tensor  # (1, tokens, tokens): x times it sums x up to each token
    future: Tensor  # (1, tokens, tokens): HIDDEN above the diagonal
    shift: Tensor  # (1, tokens, tokens): it times x is x one token later
    first: Tensor  # (1, tokens, 1): 1 at the first token
    last: Tensor  # (1, 1, tokens): it times x is x of the last token
    ones: Tensor  # (1, tokens, 1)


class TextDecoder(nn.Module):
    """All layers, their state in buffers, and the head for the last position."""

    sums: Tensor
    future: Tensor
    shift: Tensor
    first: Tensor
    ones: Tensor

    def __init__(self, weights: Weights, max_context: int | None):
        super().__init__()
        config = self.config = weights.config
        layers = [Layer(weights, i, kind, max_context) for i, kind in enumerate(config.layer_types)]
        self.layers = nn.ModuleList(layers)
        halves = {"embedding": config.embedding, "llm": config.llm}
        self.positions = nn.ModuleDict(
            {
                name: Positions(half, max_context)
                for name, half in halves.items()
                if max_context and "attention" in half.layer_types
            }
        )
        self.norm = Norm(weights, "language_model.model.norm.weight", config.llm.rms_norm_eps)
        self.head = linear(weights, HEAD)
        side = chunk_of(config) + 1  # one more: a slice of all would be no slice, and be refused
        tables = {
            "sums": torch.ones(side, side).triu(),
            "future": torch.full((side, side), HIDDEN).triu(1),
            "shift": torch.ones(side, side).tril(-1).triu(-1),
            "first": torch.eye(side, 1),
            "ones": torch.ones(side, 1),
        }
        for name, table in tables.items():
            self.register_buffer(name, table[None], persistent=False)

    def forward(self, inputs_embeds: Tensor, start_pos: Tensor) -> Tensor:
        """(1, tokens, hidden), (1,) -> (1, 1, vocab_size)."""
        x, config = inputs_embeds, self.config
        tokens = x.shape[1]
        keep = (start_pos > 0).to(x.dtype)  # (1,)
        first = self.first[:, :tokens]
        square = [table[:, :tokens, :tokens] for table in (self.sums, self.future, self.shift)]
        last = torch.flip(first, [1]).transpose(1, 2)
        tables = Tables(square[0], square[1], square[2], first, last, self.ones[:, :tokens])
        places = {name: half(tokens, start_pos) for name, half in self.positions.items()}
        end, first_llm = len(self.layers) - 1, len(config.embedding.layer_types)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if i == first_llm and config.normalize_encoder_output:
                x = x / torch.sqrt((x * x).sum(-1, keepdim=True))
            half = "embedding" if i < first_llm else "llm"
            x = x + layer.mix(x, keep, tables, places.get(half))
            if i == end:  # nothing below mixes positions
                x = torch.bmm(tables.last, x)
            x = x + layer.feed_forward(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Norm and mixer or attention, norm and MLP; the caller adds."""

    attention: "Mixer | CachedAttention"

    def __init__(self, weights: Weights, index: int, kind: str, max_context: int | None):
        super().__init__()
        prefix, stack = weights.prefix(index), weights.config.stack_of(index)
        self.attention_norm = Norm(weights, f"{prefix}attention_norm.weight", stack.rms_norm_eps)
        self.ffn_norm = Norm(weights, f"{prefix}ffn_norm.weight", stack.rms_norm_eps)
        if kind == "mamba2":
            self.attention = Mixer(weights, f"{prefix}attention.", stack)
        else:
            assert max_context is not None
            self.attention = CachedAttention(weights, f"{prefix}attention.", stack, max_context)
        self.w1, self.w2, self.w3 = (
            linear(weights, f"{prefix}feed_forward.{name}.weight") for name in ("w1", "w2", "w3")
        )

    def mix(self, x: Tensor, keep: Tensor, tables: Tables, places: Places | None) -> Tensor:
        """(1, tokens, hidden) -> the same."""
        u = self.attention_norm(x)
        if places is not None and isinstance(self.attention, CachedAttention):
            return self.attention(u, places)
        return self.attention(u, keep, tables)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(1, tokens, hidden) -> the same."""
        x = self.ffn_norm(x)
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Mixer(nn.Module):
    """Mamba-2 (spec 3.2) for any number of tokens, as attention within them and a state before."""

    conv: Tensor
    ssm: Tensor
    repeat: Tensor

    def __init__(self, weights: Weights, prefix: str, stack: StackConfig):
        super().__init__()
        self.stack = stack
        self.v, self.k, self.q, self.g, self.o = (
            linear(weights, f"{prefix}{name}_proj.weight") for name in "vkqgo"
        )
        self.dt = linear(weights, f"{prefix}in_proj.weight")
        self.sizes = [stack.key_value_dim, stack.key_value_dim, stack.hidden_size]  # v, k, q
        taps = weights.tensor(f"{prefix}conv1d.weight")[:, 0].T  # (2, channels)
        rows = np.stack([*taps, weights.tensor(f"{prefix}conv1d.bias")])
        parts = np.split(rows, np.cumsum(self.sizes)[:2], axis=1)
        self.conv_rows = nn.ParameterList(
            float_parameter(row) for part in parts for row in part
        )  # first tap, second tap, bias of v, of k, of q
        self.dt_bias = float_parameter(weights.tensor(f"{prefix}dt_bias"))
        self.a = float_parameter(-np.exp(weights.tensor(f"{prefix}A_log_bias")))
        self.norm = Norm(weights, f"{prefix}g_norm.weight", G_NORM_EPS)
        heads, dim = stack.num_attention_heads, stack.head_dim
        self.register_buffer("conv", torch.zeros(1, 1, stack.conv_dim))
        self.register_buffer("ssm", torch.zeros(heads, dim, dim))
        repeat = torch.ones(1, 1, heads // stack.num_key_value_heads, 1)
        self.register_buffer("repeat", repeat, persistent=False)

    def forward(self, u: Tensor, keep: Tensor, tables: Tables) -> Tensor:
        """(1, tokens, hidden) -> the same; the state goes on."""
        heads, kv_heads = self.stack.num_attention_heads, self.stack.num_key_value_heads
        dim, groups = self.stack.head_dim, heads // kv_heads
        products = self.v(u), self.k(u), self.q(u)
        before = torch.split(self.conv * keep, self.sizes, dim=-1)
        v, k, q = (
            silu((torch.bmm(tables.shift, z) + tables.first * old) * tap0 + z * tap1 + bias)
            for z, old, (tap0, tap1, bias) in zip(products, before, self._conv(), strict=True)
        )
        self.conv.copy_(torch.cat([torch.bmm(tables.last, z) for z in products], dim=-1))

        dt = softplus(self.dt(u) + self.dt_bias)  # (1, tokens, heads)
        steps = (dt * self.a).permute(0, 2, 1)
        fade = torch.bmm(steps, tables.sums)  # (1, heads, tokens): log decay from the beginning
        whole = torch.bmm(steps, tables.ones).permute(1, 2, 0)  # (heads, 1, 1)
        to_query, to_key = fade.permute(1, 2, 0), fade.permute(1, 0, 2)

        # (heads, tokens, dim) each; keys and values are repeated for their queries' heads
        q = q.view(-1, heads, dim).permute(1, 0, 2)
        k = k.view(-1, kv_heads, 1, dim) * self.repeat
        v = v.view(-1, kv_heads, 1, dim) * dt.view(-1, kv_heads, groups, 1)
        k, v = (x.view(-1, heads, dim).permute(1, 0, 2) for x in (k, v))

        weight = torch.exp(to_query - to_key + tables.future)
        scores = torch.bmm(q, k.transpose(1, 2)) * weight
        # What is kept of the state goes into factors of few numbers: passes over it cost memory.
        y = torch.bmm(scores, v) + torch.bmm(q, self.ssm) * (torch.exp(to_query) * keep)
        late = k * torch.exp(whole - to_query)
        kept = self.ssm * (torch.exp(whole) * keep)
        self.ssm.copy_(kept + torch.bmm(late.transpose(1, 2), v))

        y = self.norm(y.permute(1, 0, 2).contiguous()).view(1, -1, heads * dim)
        return self.o(y * silu(self.g(u)))

    def _conv(self) -> Iterator[tuple[Tensor, ...]]:
        """First tap, second tap and bias, of v, k and q."""
        rows = list(self.conv_rows)
        return (tuple(rows[i : i + 3]) for i in range(0, len(rows), 3))


class Norm(nn.Module):
    """RMS norm over the last axis; the mean is a product, which XNNPACK takes, eps its bias."""

    mean: Tensor
    eps: Tensor

    def __init__(self, weights: Weights, name: str, eps: float):
        super().__init__()
        self.weight = float_parameter(weights.tensor(name))
        width = self.weight.shape[-1]  # a fold may have given each head a weight of its own
        self.register_buffer("mean", torch.full((1, width), 1 / width), persistent=False)
        self.register_buffer("eps", torch.tensor([eps]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        return x * torch.rsqrt(nn.functional.linear(x * x, self.mean, self.eps)) * self.weight


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), as XNNPACK has it."""
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to full precision, also where dt is 0.001.

    XNNPACK has no log1p, and its log of 1.001 is wrong in the fourth digit. log(1 + e) is
    2 artanh(e / (2 + e)): a series in at most 1/9, of which eight terms reach float32.
    """
    e = torch.exp(-torch.abs(x))
    s = e / (2 + e)
    square = s * s
    total = square / 15 + 1 / 13
    for n in range(11, 0, -2):
        total = total * square + 1 / n
    return torch.relu(x) + 2 * s * total

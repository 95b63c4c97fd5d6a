"""The decoder as tracers can follow it: tensors in, tensors out, one form for any number of tokens.

    x (batch, tokens, hidden), state -> logits (batch, tokens, vocab_size), state

`MMMamba` itself reads in chunks whose number is a Python integer, and writes to its caches in
place; a tracer would burn in the one and lose the other. Here the recurrence is one masked product
over all tokens (`quadratic`), and caches grow. All else is the model's own modules.

The state is a list of tensors, in the order of `state_names`; `empty_state` begins it. Every row of
a batch holds the same number of tokens: there is no padding. As in all reading with a state, RoPE
has its plain base, without dynamic NTK.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_edge.config import Config
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.layers import Attention
from mmmamba_edge.model.mixer import Mamba2Mixer, causal_conv

State = list[Tensor]


def state_names(config: Config) -> list[str]:
    """`{layer}.conv`, `.ssm`, `.key`, `.value` of all layers, as FORMAT.md has them."""
    return [
        f"{layer}.{name}"
        for layer in range(len(config.layer_types))
        for name in config.state_shapes(layer)
    ]


def empty_state(config: Config, batch: int = 1, dtype: torch.dtype = torch.float32) -> State:
    """A state that has read nothing: zeros, and caches without rows."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.zeros(batch, *shape, dtype=wide if name == "ssm" else dtype)
        for layer in range(len(config.layer_types))
        for name, shape in config.state_shapes(layer, tokens=0).items()
    ]


def read(model: MMMamba, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Read on from a state; what is given is left as it is.

    Args:
        model: of any variant.
        x: (batch, tokens, hidden): rows of the table, vectors of pictures in their places.
        state: of `empty_state`'s shapes; caches (batch, kv_heads, past, head_dim).

    Returns:
        Logits of every position (batch, tokens, vocab_size), and the new state.
    """
    first_llm = len(model.embedding_model.encoder)
    after: State = []
    for i, layer in enumerate(model.layers):
        if i == first_llm:
            x = model.normalize(x)
        before = state[2 * i], state[2 * i + 1]  # every kind of layer has two tensors
        mix, u = layer.attention, layer.attention_norm(x)
        if isinstance(mix, Attention):
            y, *new = _attend(mix, u, *before)
        else:
            assert isinstance(mix, Mamba2Mixer)
            y, *new = _mix(mix, u, *before)
        after += new
        x = x + y
        x = x + layer.feed_forward(layer.ffn_norm(x))
    language = model.language_model
    return language.output(language.model.norm(x)), after


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The map of `mmmamba_edge.model.ssd` as attention whose scores fade with distance.

    Work and memory grow with the square of seq: long prompts are to be read in pieces.

    Args:
        q, k, v: (batch, seq, heads, key_dim or value_dim).
        dt: (batch, seq, heads), after softplus.
        a: (heads,), negative.
        state: (batch, heads, key_dim, value_dim).

    Returns:
        y (batch, seq, heads, value_dim) in q's dtype and the state after the last position.
    """
    wide = state.dtype
    dt = dt.to(wide)
    fade = torch.cumsum(dt * a.to(wide), dim=1).transpose(1, 2)  # (batch, heads, seq): log decay
    input_ = (v.to(wide) * dt[..., None]).transpose(1, 2)  # (batch, heads, seq, value_dim)
    q_, k_ = (x.to(wide).transpose(1, 2) for x in (q, k))

    # Masked before exp: above the diagonal distances are positive and may overflow.
    distance = fade[..., :, None] - fade[..., None, :]  # (batch, heads, query, key)
    # dt's length, not q's: the TorchScript exporter takes what comes out of a split for constant.
    position = torch.arange(dt.shape[1], device=q.device)
    later = position[:, None] < position
    weight = torch.exp(distance.masked_fill(later, float("-inf")))
    y = (q_ @ k_.transpose(2, 3) * weight) @ input_
    y = y + torch.exp(fade)[..., None] * (q_ @ state)

    whole = fade[..., -1:]  # (batch, heads, 1)
    late = k_ * torch.exp(whole - fade)[..., None]
    new = torch.exp(whole)[..., None] * state + late.transpose(2, 3) @ input_
    return y.transpose(1, 2).to(q.dtype), new


def _mix(mixer: Mamba2Mixer, u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, ...]:
    """`Mamba2Mixer.forward` from a state: the output, the new `conv` and `ssm`."""
    c = mixer.config
    dt = F.softplus(mixer.in_proj(u).to(ssm.dtype) + mixer.dt_bias.to(ssm.dtype))
    z = torch.cat([mixer.v_proj(u), mixer.k_proj(u), mixer.q_proj(u)], dim=-1)
    z, conv = causal_conv(z, mixer.conv1d.weight, mixer.conv1d.bias, conv, None)
    v, k, q = z.split([c.key_value_dim, c.key_value_dim, c.hidden_size], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in (q, k, v))
    k, v = (_repeated(x, c.num_attention_heads // c.num_key_value_heads) for x in (k, v))
    y, ssm = quadratic(q, k, v, dt, -torch.exp(mixer.A_log_bias.float()), ssm)
    y = mixer.g_norm(y) * F.silu(mixer.g_proj(u).unflatten(-1, (-1, c.head_dim)))
    return mixer.o_proj(y.flatten(2)), conv, ssm


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each head `groups` times: (batch, seq, kv_heads, dim) -> (batch, seq, heads, dim).

    As `repeat_interleave`, which the TorchScript exporter writes with the traced sizes in it.
    """
    return x[:, :, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3)


def _attend(attention: Attention, u: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """`Attention.forward` with caches (batch, kv_heads, past, head_dim) that come back longer."""
    config, past = attention.config, key.shape[2]
    positions = torch.arange(past + u.shape[1], device=u.device)
    own = positions[past:]  # of the queries
    q, k, v = attention.project(u, own[None], None)
    key, value = torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)

    # Each kv head serves `groups` heads, which go beside it as rows of one product.
    groups = config.num_attention_heads // config.num_key_value_heads
    q = q.unflatten(1, (config.num_key_value_heads, groups))
    scores = q @ key[:, :, None].transpose(3, 4) * config.head_dim**-0.5
    scores = scores.masked_fill(positions > own[:, None], float("-inf"))
    y = torch.softmax(scores, dim=-1) @ value[:, :, None]  # (batch, kv_heads, groups, seq, dim)
    return attention.wo(y.flatten(1, 2).transpose(1, 2).flatten(2)), key, value

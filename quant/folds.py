"""Folds: scales that wander from a tensor into its neighbour, so that the neighbour rounds better.

Each changes no answer and costs no operator on any runtime: a norm's weight (or the rows of the
projection before) is divided by s, the columns of the matrices that read it are multiplied by s.
Columns with large inputs become larger and lose less (AWQ, arXiv 2306.00978); inputs become even,
which is what 8-bit activations want (SmoothQuant, arXiv 2211.10438). Sites: quant.md section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_edge.config import StackConfig
from mmmamba_edge.quant.rounding import nearest

STRENGTHS = (0.0, 0.25, 0.5, 0.75)  # exponents tried; 0: no fold
WIDEST = 8.0  # no column is scaled by more: its neighbours in a group would vanish
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Site:
    """A place in a layer where scales can move.

    Attributes:
        name: of the site; Hessians are kept under it.
        writer: the tensor that is divided.
        readers: matrices whose columns are multiplied.
        coded: those of them that become codes.
        probe: the module whose input is the site's.
    """

    name: str
    writer: str
    readers: tuple[str, ...]
    coded: tuple[str, ...]
    probe: str


def sites(kind: str) -> tuple[Site, ...]:
    """Of a layer: attention or mamba2. Names are relative to the layer."""
    f = "feed_forward."
    shared = (
        Site("w1w3", "ffn_norm.weight", _weights(f, "w1", "w3"), _weights(f, "w1", "w3"), f"{f}w1"),
        Site("w2", f"{f}w3.weight", _weights(f, "w2"), _weights(f, "w2"), f"{f}w2"),
    )
    a = "attention."
    if kind == "attention":
        packed, out = _weights(a, "wqkv"), _weights(a, "wo")
        return (
            Site("wqkv", "attention_norm.weight", packed, packed, f"{a}wqkv"),
            Site("wo", f"{a}wqkv.weight", out, out, f"{a}wo"),
            *shared,
        )
    read = _weights(a, "q_proj", "k_proj", "v_proj", "g_proj")
    out = _weights(a, "o_proj")
    return (
        Site(
            "vkqg", "attention_norm.weight", (*read, f"{a}in_proj.weight"), read, f"{a}q_proj"
        ),
        Site("o_proj", f"{a}g_norm.weight", out, out, f"{a}o_proj"),
        *shared,
    )  # fmt: skip


def choose(
    site: Site, tensors: Tensors, hessian: Tensor, stack: StackConfig, bits: int, group: int | None
) -> tuple[float, Tensor]:
    """The strength that loses least under plain rounding, and its scales (columns,).

    Args:
        site: where.
        tensors: of the layer, float32.
        hessian: (columns, columns), mean of x x^T of the site's input.
        stack: sizes.
        bits, group: of the codes to come.
    """
    size = hessian.diagonal().clamp(min=0).sqrt()
    size = size.clamp(min=float(size.max()) * 1e-4 or 1.0)
    best, chosen = torch.inf, (0.0, torch.ones_like(size))
    for strength in STRENGTHS:
        scales = _shared(site, _even(size**strength), stack)
        loss = sum(_lost(tensors[name], scales, hessian, bits, group) for name in site.coded)
        if loss < best * (1 - 1e-3):  # ties go to the weaker fold
            best, chosen = loss, (strength, scales)
    return chosen


def apply(site: Site, tensors: Tensors, scales: Tensor, stack: StackConfig) -> None:
    """Move scales (columns,) into the layer's tensors, in place."""
    for name in site.readers:
        tensors[name] = tensors[name] * scales
    writer = tensors[site.writer]
    if site.name == "o_proj":  # g_norm's weight serves all heads until scales tell them apart
        heads = scales.view(stack.num_attention_heads, stack.head_dim)
        tensors[site.writer] = writer / heads
    elif site.name == "wo":  # the value rows of wqkv, packed per kv head (spec 2.3)
        groups = stack.num_attention_heads // stack.num_key_value_heads
        packed = writer.clone().unflatten(0, (stack.num_key_value_heads, groups + 2, -1))
        values = scales.view(stack.num_key_value_heads, groups, stack.head_dim)[:, 0]
        packed[:, -1] /= values[..., None]
        tensors[site.writer] = packed.flatten(0, 2)
    else:  # a norm's weight, or the rows of w3
        tensors[site.writer] = writer / (scales if writer.ndim == 1 else scales[:, None])


def rows_divided_by(site: Site, scales: Tensor, stack: StackConfig, rows: int) -> Tensor:
    """(rows,): what `apply` divides each row of the writer, a matrix, by."""
    empty = {name: scales.new_zeros(1, len(scales)) for name in site.readers}
    one = {**empty, site.writer: scales.new_ones(rows, 1)}
    apply(site, one, scales, stack)
    return 1 / one[site.writer][:, 0]


def _weights(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}.weight" for name in names)


def _even(scales: Tensor) -> Tensor:
    """Scales of geometric mean 1, none extreme."""
    return (scales / scales.log().mean().exp()).clamp(1 / WIDEST, WIDEST)


def _shared(site: Site, scales: Tensor, stack: StackConfig) -> Tensor:
    """One scale for a value channel, whichever of its query heads reads it."""
    if site.name != "wo":
        return scales
    groups = stack.num_attention_heads // stack.num_key_value_heads
    heads = scales.view(stack.num_key_value_heads, groups, stack.head_dim)
    mean = heads.log().mean(1, keepdim=True).exp()
    return mean.expand_as(heads).reshape(-1)


def _lost(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group: int | None) -> float:
    """Mean |Wx - Qx|^2 with columns scaled by `scales`, under rounding to nearest."""
    four = bits == 4 and group is not None
    lost = weight - nearest(weight * scales, bits if four else 8, group if four else None) / scales
    return float((lost @ hessian).mul_(lost).sum())

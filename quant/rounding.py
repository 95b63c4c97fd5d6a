"""Scales and rounding: to nearest, or with the scale that loses least when outliers are clipped.

All of it keeps the rules of codes.py: scales positive, exact in bfloat16, at least 2**-14; codes
made with the stored scale.
"""

import torch
from torch import Tensor

from mmmamba_edge.quant.codes import LIMIT, MIN_SCALE, Codes

LOWEST = {8: -127, 4: -8}  # clipped codes may use -8; -127 keeps 8 bits symmetric on all runtimes
SHRINK = {8: 0.7, 4: 0.45}  # smallest share of the unclipped scale that is tried
TRIED = 24  # scales tried between there and the unclipped one
ROWS = 2048  # of a matrix at a time: the search holds one copy of them


def grouped(weight: Tensor, group: int) -> Tensor:
    """(rows, columns) -> (rows, groups, group)."""
    return weight.reshape(len(weight), -1, group)


def search_scale(weight: Tensor, group: int, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each group with the least squared error of its rounded weights.

    Args:
        weight: (rows, columns) float32, finite.
        group: columns that share a scale.
        bits: 8 or 4.
        importance: (columns,) mean square of each column's input; None: all alike.

    Returns:
        (rows, columns / group) float32.
    """
    out = []
    shares = torch.linspace(SHRINK[bits], 1.0, TRIED)
    per_group = None if importance is None else importance.reshape(-1, group)
    for part in weight.split(ROWS):
        w = grouped(part, group)
        largest = w.abs().amax(-1) / LIMIT[bits]
        best = torch.full_like(largest, torch.inf)
        chosen = as_scale(largest)
        for share in shares:
            scale = as_scale(largest * share)
            error = (w - rounded(w, scale[..., None], bits) * scale[..., None]).square_()
            loss = (error if per_group is None else error * per_group).sum(-1)
            better = loss < best
            best = torch.where(better, loss, best)
            chosen = torch.where(better, scale, chosen)
        out.append(chosen)
    return torch.cat(out)


def nearest(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """What a matrix's codes stand for when nothing is clipped: `quantize_int4` or `quantize_int8`,
    dequantised, wherever the matrix is.
    """
    w = grouped(weight, group or weight.shape[1])
    scale = (w.abs().amax(-1, keepdim=True) / LIMIT[bits]).clamp(min=MIN_SCALE)
    scale = (scale.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)  # up, to bfloat16
    return ((w / scale).round_() * scale).reshape(weight.shape)


def as_scale(x: Tensor) -> Tensor:
    """The nearest number that may be a scale: of bfloat16, not below the floor."""
    return x.clamp(min=MIN_SCALE).bfloat16().float()


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes as floats, broadcast over `scale`."""
    return (weight / scale).round_().clamp_(LOWEST[bits], LIMIT[bits])


def quantize_clipped(
    weight: Tensor, bits: int, group: int | None = None, importance: Tensor | None = None
) -> Codes:
    """Round to nearest under `search_scale`'s scales; `group` None: one a row."""
    group = group or weight.shape[1]
    scale = search_scale(weight, group, bits, importance)
    codes = rounded(grouped(weight, group), scale[..., None], bits)
    return to_codes(codes.reshape(weight.shape), scale, bits)


def to_codes(codes: Tensor, scale: Tensor, bits: int) -> Codes:
    """Tensors (rows, columns), (rows, groups) as `Codes`."""
    return Codes(codes.to(torch.int8).cpu().numpy(), scale.float().cpu().numpy(), bits)

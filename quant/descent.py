"""Coordinate descent: codes and scales that GPTQ found, made better in turns.

GPTQ rounds a column once, and can make up for it in the columns behind alone. Here every column is
rounded again, given all others as they are (QuantEase, arXiv 2309.01885), and every scale is set to
what its codes want (least squares). A row that would lose by it, as scales are rounded to bfloat16,
stays as it was.
"""

import torch
from torch import Tensor

from mmmamba_edge.quant.codes import MIN_SCALE
from mmmamba_edge.quant.rounding import as_scale, rounded

BLOCK = 128  # columns whose changes are gathered before they reach the others
ROWS = 512  # whose systems, of groups x groups numbers each, are solved at a time


def descend(
    target: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows with less of (W - Q) H (W - Q)^T.

    Args:
        target: (rows, columns) float32, W.
        codes: (rows, columns) floats, whole numbers.
        scale: (rows, groups).
        hessian: (columns, columns), H, damped.
        bits: 8 or 4.
        passes: over scales and columns.

    Returns:
        New codes and scales.
    """
    group = codes.shape[1] // scale.shape[1]
    seen = target @ hessian
    error = target - codes * scale.repeat_interleave(group, dim=1)
    least = ((error @ hessian) * error).sum(1, keepdim=True)
    for _ in range(passes):
        new, new_scale = codes.clone(), fitted_scales(seen, codes, scale, hessian)
        spread = new_scale.repeat_interleave(group, dim=1)
        pull = _round_again(target, new, spread, hessian, bits)
        loss = ((target - new * spread) * pull).sum(1, keepdim=True)
        better = loss < least  # a scale of bfloat16 is not quite the fitted one
        least = torch.where(better, loss, least)
        codes, scale = torch.where(better, new, codes), torch.where(better, new_scale, scale)
    return codes, scale


def _round_again(
    target: Tensor, codes: Tensor, spread: Tensor, hessian: Tensor, bits: int
) -> Tensor:
    """One pass over the columns; `codes` change in place. Gives (W - Q) H of the new ones."""
    pull = (target - codes * spread) @ hessian
    size = hessian.diagonal()
    for start in range(0, codes.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, codes.shape[1]))
        own, here = hessian[part, part], pull[:, part].clone()
        moved = torch.empty_like(here)
        for i in range(here.shape[1]):
            at, step = start + i, spread[:, start + i]
            old = codes[:, at] * step
            code = rounded(old + here[:, i] / size[at], step, bits)
            moved[:, i] = code * step - old
            codes[:, at] = code
            here[:, i + 1 :].addr_(moved[:, i], own[i, i + 1 :], alpha=-1)
        pull.addmm_(moved, hessian[part], alpha=-1)
    return pull


def fitted_scales(seen: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """The scales (rows, groups) with the least error for these codes; the old ones of rows that
    would get one that no scale may be. `seen` is W H.
    """
    parts = zip(seen.split(ROWS), codes.split(ROWS), scale.split(ROWS), strict=True)
    return torch.cat([_fitted(s, c, old, hessian) for s, c, old in parts])


def _fitted(seen: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    rows, columns = codes.shape
    groups = scale.shape[1]
    blocks = codes.view(rows, groups, -1)
    wanted = (seen * codes).view(rows, groups, -1).sum(-1)
    normal = codes.new_empty(rows, groups, groups)
    for g in range(groups):
        part = slice(g * columns // groups, (g + 1) * columns // groups)
        normal[:, g] = ((codes[:, part] @ hessian[part]).view_as(blocks) * blocks).sum(-1)
    # A group of zeros has no scale of its own: its row of the system is the old one.
    empty = normal.diagonal(dim1=1, dim2=2) <= 0
    normal += torch.diag_embed(empty.to(normal.dtype))
    wanted = torch.where(empty, scale, wanted)
    found, _ = torch.linalg.solve_ex(normal, wanted[..., None])
    found = found[..., 0]
    good = (torch.isfinite(found) & (found >= MIN_SCALE)).all(-1, keepdim=True)
    return torch.where(good, as_scale(found), scale)

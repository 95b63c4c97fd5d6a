"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what each
loses is made up for by those that are not rounded yet, as far as the inputs allow it. Rows can do
the same for each other, where it is known how answers depend on them (quantize_sensitivity.py).

Scales are of codes.py's kind: symmetric, positive, exact in bfloat16. Groups stay runs of
neighbouring columns whatever the order of rounding, so that no runtime needs a permutation.
"""

import torch
from torch import Tensor

from mmmamba_edge.quant.codes import Codes
from mmmamba_edge.quant.descent import descend
from mmmamba_edge.quant.rounding import rounded, search_scale, to_codes

BLOCK = 128  # columns whose errors are gathered before they reach the columns behind
ROWS = 32  # rounded together when rows make up for rows
# Of the mean diagonal, added to it: the inverse of a flat direction means nothing.
DAMPING = 0.01
PASSES = 4  # of coordinate descent behind it
ROW_DAMPING = 0.1  # of `outputs`, gradients of drawn tokens, which are noisier than inputs


class Hessian:
    """Sum over inputs x of weight * x x^T: what the squared error of a product depends on.

    Args:
        columns: width of x.
        device: where inputs are.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(columns, columns, device=device)
        self.mass = 0.0

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Inputs (tokens, columns), each counted `weight` (tokens,) times."""
        scaled = x if weight is None else x * weight[:, None]
        self.sum.addmm_(x.T, scaled)
        self.mass += len(x) if weight is None else float(weight.sum())

    @property
    def mean(self) -> Tensor:
        """(columns, columns), of one input."""
        return self.sum / max(self.mass, 1e-12)


def quantize_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group: int | None = None, *, by_size: bool = True,
    outputs: Tensor | None = None, passes: int = PASSES,
) -> Codes:  # fmt: skip
    """Codes of a matrix whose products with typical inputs are as near as can be.

    Args:
        weight: (rows, columns) float32.
        hessian: (columns, columns), mean of x x^T.
        bits: 8 or 4.
        group: columns that share a scale; None: one scale a row.
        by_size: round the columns with the largest inputs first ("act-order").
        outputs: (rows, rows), mean of g g^T (quantize_sensitivity.py): rows are then rounded
            `ROWS` at a time, those that matter most first, and the rows behind make up for them
            as well (arXiv 2505.22988). None: each row by itself.
        passes: of coordinate descent behind it (descent.py).

    Raises:
        ValueError: weights or inputs that are not finite.
    """
    for matrix in (weight, hessian, *([] if outputs is None else [outputs])):
        if not torch.isfinite(matrix).all():
            raise ValueError("weights or their calibration inputs hold NaN or infinity")
    columns = weight.shape[1]
    group = group or columns
    size = hessian.diagonal()
    order = size.argsort(descending=True) if by_size else torch.arange(columns, device=size.device)
    inverse = _upper_of_inverse(hessian[order][:, order])

    def by_columns(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _by_columns(rows, size, order, inverse, bits, group)

    damped = _damped(hessian)
    if outputs is None:
        codes, scale = by_columns(weight)
        return to_codes(*descend(weight, codes, scale, damped, bits, passes), bits)
    codes = torch.empty_like(weight)
    scale = weight.new_empty(len(weight), columns // group)
    first = outputs.diagonal().argsort(descending=True)
    work = weight[first].clone()
    across = _upper_of_inverse(outputs[first][:, first], ROW_DAMPING)
    for start in range(0, len(work), ROWS):
        part = slice(start, min(start + ROWS, len(work)))
        block, own = work[part], across[part, part]
        here, step = by_columns(block)
        codes[first[part]], scale[first[part]] = here, step
        lost = block - here * step.repeat_interleave(group, dim=1)
        lost = torch.linalg.solve_triangular(own.T, lost, upper=False)
        work[part.stop :].addmm_(across[part, part.stop :].T, lost, alpha=-1)
    outputs = _damped(outputs, ROW_DAMPING)
    for _ in range(passes):
        _rows_again(weight, codes, scale, damped, outputs, first, bits)
    return to_codes(codes, scale, bits)


def _rows_again(
    weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, outputs: Tensor, order: Tensor,
    bits: int,
) -> None:  # fmt: skip
    """One pass of descent, `ROWS` rows at a time given all others; `codes`, `scale` in place."""
    group = codes.shape[1] // scale.shape[1]
    error = weight - codes * scale.repeat_interleave(group, dim=1)
    for part in order.split(ROWS):
        own, old = outputs[part][:, part], error[part]
        # The error of these rows that would suit all others best, could it be any number.
        best = old - torch.linalg.solve(own, outputs[part] @ error)
        target = weight[part] - best
        new_codes, new_scale = descend(target, codes[part], scale[part], hessian, bits, 1)
        new = weight[part] - new_codes * new_scale.repeat_interleave(group, dim=1)
        before, after = (
            float(((own @ (e - best) @ hessian) * (e - best)).sum()) for e in (old, new)
        )
        if after < before:  # rows of a block are moved as if they knew nothing of each other
            codes[part], scale[part], error[part] = new_codes, new_scale, new


def _damped(matrix: Tensor, damping: float = DAMPING) -> Tensor:
    mean = float(matrix.diagonal().mean()) or 1.0
    return matrix + damping * mean * torch.eye(len(matrix), device=matrix.device)


def _by_columns(
    weight: Tensor, size: Tensor, order: Tensor, inverse: Tensor, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """GPTQ of rows that know nothing of each other: codes (rows, columns), scales (rows, groups).

    Args:
        size: (columns,) mean square of inputs.
        order: of the columns; `inverse` has them in it.
    """
    columns = weight.shape[1]
    scale = search_scale(weight, group, bits, size)
    work = weight[:, order].clone()
    spread = scale.repeat_interleave(group, dim=1)[:, order]  # (rows, columns)
    codes = torch.empty_like(work)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        block, own = work[:, part], inverse[part, part]
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            column, step = block[:, i], spread[:, start + i]
            code = rounded(column, step, bits)
            codes[:, start + i] = code
            error = (column - code * step) / own[i, i]
            errors[:, i] = error
            block[:, i + 1 :].addr_(error, own[i, i + 1 :], alpha=-1)
        work[:, part.stop :].addmm_(errors, inverse[part, part.stop :], alpha=-1)
    return codes[:, order.argsort()], scale


def _upper_of_inverse(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; damped more until there is one."""
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10


def product_error(weight: Tensor, codes: Codes, hessian: Tensor) -> float:
    """Mean over inputs of |W x - Q x|^2 / |W x|^2, from the Hessian alone."""
    lost = weight - torch.from_numpy(codes.dequantized()).to(weight.device)
    return _power(lost, hessian) / max(_power(weight, hessian), 1e-30)


def _power(matrix: Tensor, hessian: Tensor) -> float:
    return float((matrix @ hessian).mul_(matrix).sum())

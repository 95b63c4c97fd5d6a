"""Weights as the parameters of a .pte's modules: torchao's tensors of our codes, or float32."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mmmamba_edge.export.weights import Matrix, Weights
from mmmamba_edge.quant.codes import Codes
from mmmamba_edge.runtimes.executorch_runner import quietly


def linear(weights: Weights, name: str, bias: str | None = None) -> nn.Linear:
    """A product with a matrix as the scheme stores it, or in float32 where it keeps that."""
    layer = linear_of(weights.either(name))
    if bias is not None:
        layer.bias = float_parameter(weights.tensor(bias))
    return layer


def linear_of(matrix: Matrix) -> nn.Linear:
    """x -> x times the matrix (rows, columns) transposed."""
    with torch.device("meta"):
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = parameter(matrix, activations=True)
    return layer


def parameter(matrix: Matrix, *, activations: bool) -> nn.Parameter:
    """A weight; codes become torchao's tensor of the same codes and scales.

    Args:
        matrix: float32, or codes.
        activations: whether they are quantised too, to 8 bits a token (8da4w, 8da8w).
    """
    if not isinstance(matrix, Codes):
        return float_parameter(matrix)
    with quietly():
        from torchao.quantization import IntxUnpackedToInt8Tensor

    scale = torch.from_numpy(matrix.scale)
    return nn.Parameter(
        IntxUnpackedToInt8Tensor(
            torch.from_numpy(matrix.codes), scale, torch.zeros_like(scale, dtype=torch.int8),
            getattr(torch, f"int{matrix.bits}"), (1, matrix.group), torch.float32,
            "int8_asym_per_token" if activations else None,
        ),
        requires_grad=False,
    )  # fmt: skip


def float_parameter(array: NDArray[np.generic]) -> nn.Parameter:
    """A frozen float32 parameter."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    return nn.Parameter(tensor, requires_grad=False)

"""The weights of one ONNX graph by name, memory-mapped from the file beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


class Initializers:
    """Read-only arrays of a graph's initialisers.

    Args:
        file: the graph; its external data lies beside it.
    """

    def __init__(self, file: Path) -> None:
        self._folder = file.parent
        graph = onnx.load(file, load_external_data=False).graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._readers = {name: node for node in graph.node for name in node.input}

    def get(self, name: str) -> NDArray[Any] | None:
        """The array, or None; of INT4 the packed bytes, uint8, two codes each."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        shape = tuple(tensor.dims)
        if tensor.data_type == TensorProto.INT4:
            kind, shape = np.dtype(np.uint8), (*shape[:-1], shape[-1] // 2)
        else:
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self._folder / where["location"], kind, "r", int(where["offset"]), shape)

    def is_int4(self, name: str) -> bool:
        """Whether it is of ONNX's INT4."""
        return self._tensors[name].data_type == TensorProto.INT4

    def attributes(self, name: str) -> dict[str, int]:
        """Integer attributes of the operator that reads it."""
        node = self._readers.get(name)
        return {a.name: a.i for a in node.attribute} if node is not None else {}

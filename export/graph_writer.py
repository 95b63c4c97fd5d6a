"""Writes one ONNX graph node by node, its weights straight to a file beside it.

A weight is on disk before the next one is read, so an export needs the memory of its largest
tensor. The data file is laid out for memory-mapping: large tensors begin on a page.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

IR_VERSION = 10  # read by ONNX Runtime 1.18 and later; graphs of opset 27 need 13
INLINE = 1024  # bytes; smaller tensors live in the graph, so that shapes can be read off it
ALIGN = 64  # bytes, of every tensor in the data file
PAGE = 4096  # bytes, of tensors from LARGE on
LARGE = 1 << 20

FLOAT, FLOAT16, INT64, INT32, UINT8, INT8 = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32,
    TensorProto.UINT8, TensorProto.INT8,
)  # fmt: skip

Dim = int | str  # a number, or the name of a size that only the caller knows


class GraphWriter:
    """A graph in the making. Values are their names; equal calls give equal bytes."""

    def __init__(self, folder: Path, name: str, opset: dict[str, int]):
        self.file = f"{name}.onnx"
        self.data_file = f"{name}.bin"
        self._folder = folder
        self._graph = onnx.GraphProto(name=name)
        self._opset = opset
        self._data = open(folder / self.data_file, "wb")
        self._constants: dict[tuple[str, str, bytes], str] = {}
        self._count = 0

    def __enter__(self) -> "GraphWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        empty = self._data.tell() == 0
        self._data.close()
        if empty:
            (self._folder / self.data_file).unlink()
        if kind is None:
            model = helper.make_model(
                self._graph,
                producer_name="mmmamba-edge",
                opset_imports=[helper.make_opsetid(d, v) for d, v in sorted(self._opset.items())],
                ir_version=13 if self._opset[""] >= 27 else IR_VERSION,
            )
            (self._folder / self.file).write_bytes(model.SerializeToString(deterministic=True))

    def input(self, name: str, kind: int, shape: list[Dim]) -> str:
        """Declare a graph input."""
        self._graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: list[Dim]) -> str:
        """Declare a graph output; some node must make the value `name`."""
        self._graph.output.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def node(
        self, op: str, inputs: list[str], outputs: int | list[str] = 1, *, domain: str = "",
        label: str = "", **attributes: Any,
    ) -> list[str]:  # fmt: skip
        """Append a node.

        Args:
            op: operator.
            inputs: value names; "" for an optional input that is absent.
            outputs: how many, or their names ("" for one that nobody wants).
            domain: "" or "com.microsoft".
            label: what a profile shows beside the operator.
            attributes: of the operator.

        Returns:
            The outputs' names.
        """
        self._count += 1
        name = f"{self._count}.{label or op}"
        if isinstance(outputs, int):
            outputs = [f"{name}:{i}" for i in range(outputs)]
        self._graph.node.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def one(self, op: str, *inputs: str, **options: Any) -> str:
        """`node` with one output."""
        return self.node(op, list(inputs), **options)[0]

    def rename(self, value: str, name: str) -> None:
        """Call the output of the last node `name`."""
        outputs = self._graph.node[-1].output
        assert outputs[0] == value
        outputs[0] = name

    def ints(self, *values: int) -> str:
        """A constant int64 vector, for shapes and axes."""
        return self.constant(np.array(values, np.int64))

    def constant(self, array: NDArray[Any]) -> str:
        """A small constant; equal ones are stored once."""
        key = (array.dtype.str, str(array.shape), array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant.{len(self._constants)}"
            self._graph.initializer.append(
                onnx.numpy_helper.from_array(array, self._constants[key])
            )
        return self._constants[key]

    def weight(self, name: str, array: NDArray[Any], int4: bool = False) -> str:
        """A weight, written to the data file now (or into the graph if it is tiny).

        `int4`: the bytes of `array` hold two signed numbers each, neighbours on the last axis, the
        first in the low half.
        """
        array = np.ascontiguousarray(array)
        shape = (*array.shape[:-1], 2 * array.shape[-1]) if int4 else array.shape
        if array.nbytes < INLINE and not int4:
            self._graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            return name
        align = PAGE if array.nbytes >= LARGE else ALIGN
        self._data.write(bytes(-self._data.tell() % align))
        tensor = self._graph.initializer.add(
            name=name,
            data_type=TensorProto.INT4 if int4 else helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self.data_file), ("offset", self._data.tell()), ("length", array.nbytes),
        ):  # fmt: skip
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(array.data)
        return name

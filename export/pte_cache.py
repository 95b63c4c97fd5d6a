"""Rows of a cache that a .pte reads where they lie.

ExecuTorch has no views of a part: a slice is a copy, in one thread, of all rows in use for every
token. But its memory planner can lay one tensor over another. So `cache_rows` is an operator of
ours while the program is traced and lowered, and in the file it is `aten::empty`, which gives its
output a shape and touches nothing, with that output planned into the cache's own memory: any
ExecuTorch has the operator, and none of it knows the difference.
"""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("mmmamba_edge", "DEF")
_library.define("cache_rows(Tensor cache, int head, SymInt end) -> Tensor")
_library.define(
    "cache_rows.out(Tensor cache, int head, SymInt end, *, Tensor(a!) out) -> Tensor(a!)"
)


def cache_rows(cache: Tensor, head: int, end: int) -> Tensor:
    """The first `end` rows of one head: (heads, rows, dim) -> (1, end, dim)."""
    return torch.ops.mmmamba_edge.cache_rows(cache, head, end)


def _rows(cache: Tensor, head: int, end: int) -> Tensor:
    return cache[head : head + 1, :end].clone()


def _rows_shape(cache: Tensor, head: int, end: int) -> Tensor:
    return cache.new_empty(1, end, cache.shape[2])


def _rows_out(cache: Tensor, head: int, end: int, *, out: Tensor) -> Tensor:
    return out.copy_(_rows(cache, head, end))


_library.impl("cache_rows", _rows, "CompositeExplicitAutograd")
_library.impl("cache_rows.out", _rows_out, "CompositeExplicitAutograd")
torch.library.register_fake("mmmamba_edge::cache_rows", _rows_shape, lib=_library)


def memory_planning() -> Any:
    """ExecuTorch's memory planning, with rows of caches in their caches."""
    from executorch.exir.passes import MemoryPlanningPass

    class Planning(MemoryPlanningPass):
        def run(self, graph_module: Any, graph_signature: Any = None) -> Any:
            for node in graph_module.graph.nodes:
                if node.target is torch.ops.mmmamba_edge.cache_rows.out:
                    _lay_over(node)
            return super().run(graph_module, graph_signature)

    return Planning()


def _lay_over(node: Any) -> None:
    """Turn `cache_rows` into `empty` in the cache's memory."""
    cache, head, end = node.args
    while cache.op != "placeholder":  # rows that were written into it
        assert cache.target is torch.ops.aten.index_put_.default, f"{cache}: not in place"
        cache = cache.args[0]
    base = cache.meta["spec"]
    _, rows, dim = base.shape
    node.meta["spec"].storage_base = base
    node.meta["spec"].storage_base_offset = head * rows * dim * base.dtype.itemsize
    node.target, node.args = torch.ops.aten.empty.out, ([1, end, dim],)

"""State that a .pte reads and writes where it lies, instead of ExecuTorch's copies.

ExecuTorch has no views of a part, and a delegate has outputs of its own. So a slice of a cache is a
copy, in one thread, of all rows in use for every token, and a new state is copied into its buffer.
But its memory planner can lay one tensor over another:

- `cache_rows` is an operator of ours while the program is traced and lowered. In the file it is
  `aten::empty`, which gives its output a shape and touches nothing, laid over the cache: every
  ExecuTorch has that operator, and none knows the difference.
- A new state that its delegate computes when it needs the old one no more is laid over the old one.
"""

import operator
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
    """ExecuTorch's memory planning, with state in its place."""
    from executorch.exir.passes import MemoryPlanningPass

    class Planning(MemoryPlanningPass):
        def run(self, graph_module: Any, graph_signature: Any = None) -> Any:
            for node in list(graph_module.graph.nodes):
                if _operator(node) is torch.ops.mmmamba_edge.cache_rows.out:
                    _read_in_place(node)
                elif _operator(node) is torch.ops.aten.copy_.default:
                    _write_in_place(graph_module, node)
            return super().run(graph_module, graph_signature)

    return Planning()


def _operator(node: Any) -> Any:
    """What a node calls, without the wrapper of ExecuTorch's edge dialect."""
    target = node.target
    return target if isinstance(target, torch._ops.OpOverload) else getattr(target, "_op", target)


def _read_in_place(node: Any) -> None:
    """Turn `cache_rows` into `empty` in the cache's memory."""
    cache, head, end = node.args
    while cache.op != "placeholder":  # rows that were written into it
        assert _operator(cache) is torch.ops.aten.index_put_.default, f"{cache}: not in place"
        cache = cache.args[0]
    base, spec = cache.meta["spec"], node.meta["spec"]
    _, rows, dim = base.shape
    spec.shape = [1, rows, dim]  # at most; it adds the bounds of `end`'s parts
    spec.storage_base = base
    spec.storage_base_offset = head * rows * dim * base.dtype.itemsize
    node.target, node.args = torch.ops.aten.empty.out, ([1, end, dim],)


def _write_in_place(graph_module: Any, copy: Any) -> None:
    """Leave out the copy of a delegate's output into a buffer, where nothing reads that later."""
    buffer, new = copy.args
    if buffer.op != "placeholder" or new.target is not operator.getitem:
        return
    call, index = new.args
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    users = [node for node in buffer.users if node is not copy]
    if len(new.users) > 1 or any(order[user] > order[call] for user in users):
        return
    if call in users and not _last_use(graph_module, call, buffer, index):
        return
    new.meta["spec"].storage_base = buffer.meta["spec"]
    copy.replace_all_uses_with(new)
    graph_module.graph.erase_node(copy)


def _last_use(graph_module: Any, call: Any, buffer: Any, index: int) -> bool:
    """Whether a delegate computes output `index` after its last use of `buffer`."""
    program = getattr(graph_module, call.args[0].target).original_module
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    by_name = {node.name: node for node in order}
    read = by_name[program.graph_signature.user_inputs[call.args.index(buffer) - 1]]
    written = program.graph.output_node().args[0][index]
    return all(order[user] <= order[written] for user in read.users)

"""What a .pte's methods can be lowered to, and which operators a backend took."""

from importlib import import_module
from typing import Any

from mmmamba_edge.errors import UserError

# name -> module and class of the partitioner, its options, and what its compiler needs beside
# executorch's wheel. States stay in buffers that sessions can read and write: no backend owns them.
BACKENDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "xnnpack": (
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "XnnpackPartitioner", {}, "",
    ),
    "vulkan": (
        "executorch.backends.vulkan.partitioner.vulkan_partitioner", "VulkanPartitioner", {}, "",
    ),
    "coreml": (
        "executorch.backends.apple.coreml.partition", "CoreMLPartitioner",
        {"take_over_mutable_buffer": False}, "coremltools",
    ),
}  # fmt: skip


def check_backend(name: str) -> None:
    """UserError where there is no such backend."""
    if name not in BACKENDS:
        raise UserError(f"--backend {name}: known are {', '.join(BACKENDS)}")


def partitioners(name: str) -> list[Any]:
    """The partitioners of a backend, in order."""
    module, kind, options, needs = BACKENDS[name]
    try:
        loaded = import_module(module)
        if name == "vulkan":  # it has no option for this, and fails over buffers that it took
            loaded.tag_mutated_buffer = lambda program: None  # pyright: ignore
        return [getattr(loaded, kind)(**options)]
    except ImportError as error:
        raise UserError(
            f"--backend {name}: its compiler does not load ({error})"
            + (f"; pip install {needs}" if needs else "")
        ) from error


def partition(graph: Any) -> dict[str, Any]:
    """How a lowered method is divided: number of delegates, and operators on either side."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(graph)
    counts = sorted(info.delegation_by_operator.items())
    return {
        "delegates": info.num_delegated_subgraphs,
        "delegated": {name: count.delegated for name, count in counts if count.delegated},
        "on_cpu": {name: count.non_delegated for name, count in counts if count.non_delegated},
    }

"""What a .pte's methods can be lowered to, and which operators a backend took."""

from importlib import import_module
from typing import Any

from mmmamba_edge.config import Config
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


def check_backend(name: str, config: Config, quantised: bool) -> None:
    """UserError where there is no such backend, or its compiler has no words for such a model."""
    if name not in BACKENDS:
        raise UserError(f"--backend {name}: known are {', '.join(BACKENDS)}")
    if name != "coreml":
        return
    # coremltools 9: KeyError over activations in int8; over the rows that a cache is given, too.
    if quantised:
        raise UserError("--backend coreml: takes no codes in 8 or 4 bits; use --quant none")
    if "attention" in config.layer_types:
        raise UserError(
            "--backend coreml: takes models without attention; this one keeps some: use xnnpack or "
            "vulkan"
        )


def partitioners(name: str) -> list[Any]:
    """The partitioners of a backend, in order."""
    module, kind, options, needs = BACKENDS[name]
    try:
        loaded = import_module(module)
        if name == "xnnpack":
            _fit_xnnpack()
        if name == "vulkan":  # it has no option for this, and fails over buffers that it took
            loaded.tag_mutated_buffer = lambda program: None  # pyright: ignore
        return [getattr(loaded, kind)(**options)]
    except ImportError as error:
        raise UserError(
            f"--backend {name}: its compiler does not load ({error})"
            + (f"; pip install {needs}" if needs else "")
        ) from error


# Passes over XNNPACK's parts that look for operators which no decoder has. Each traces every part
# anew whether it finds one or not: with 30 layers a quarter of an export's time.
NOT_NEEDED = {
    "ConvertToUpsampleBilinear2d", "ConvertToSDPAPass", "PropagateCustomMetaPass",
    "FuseBatchNormPass", "DecomposeBatchNorm", "Conv1dUnsqueezePass", "PReLUReshapePass",
}  # fmt: skip


def _fit_xnnpack() -> None:
    """What XNNPACK's partitioner has no options for.

    It leaves whatever has a length that is known only from a tensor's value, as the part of a cache
    that is in use has: "conservatively", for such tensors might be empty. Ours never are.
    """
    config = import_module("executorch.backends.xnnpack.partition.config.xnnpack_config")
    config.has_free_unbacked_symbols = lambda tensor: False  # pyright: ignore
    backend = import_module("executorch.backends.xnnpack.xnnpack_preprocess")
    every = import_module("executorch.backends.xnnpack._passes").XNNPACKPassManager

    class Fewer(every):
        def __init__(self, program: Any, passes: Any = None) -> None:
            super().__init__(program, passes)
            self.passes = [p for p in self.passes if p.__name__ not in NOT_NEEDED]

    backend.XNNPACKPassManager = Fewer  # pyright: ignore


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

"""The runtimes: one protocol (base.py), and `open_bundle`, which opens a model on one of them."""

import importlib.util
from importlib import import_module
from pathlib import Path

from mmmamba_edge.bundle import DEFAULT_BUNDLE, read_manifest
from mmmamba_edge.errors import UserError
from mmmamba_edge.runtimes.base import Runner

# name -> what opens a bundle, called as f(path, threads, provider, verify=...)
RUNTIMES = {
    "onnxruntime": "mmmamba_edge.runtimes.onnxruntime_runner:OnnxRuntimeRunner",
    "executorch": "mmmamba_edge.runtimes.executorch_runner:ExecuTorchRunner",
}

# PyTorch on checkpoints: as they are, or with layers rounded to so many bits while loading
TORCH_BITS = {"torch": 0, "torch-int8": 8, "torch-nf4": 4}
RUNTIME_NAMES = ("auto", *RUNTIMES, *TORCH_BITS)


def open_bundle(
    path: str | Path | None = None,
    runtime: str = "auto",
    threads: int | None = None,
    provider: str = "cpu",
    *,
    verify: bool | None = None,
) -> Runner:
    """Open an exported model.

    Args:
        path: a bundle folder, or a .pte; with runtime "torch" a checkpoint folder; None: the model
            that comes with the package.
        runtime: "auto" goes by the bundle; or "onnxruntime", "executorch", "torch"; or
            "torch-int8", "torch-nf4": a checkpoint with its layers rounded by bitsandbytes.
        threads: for one operator; None: the runtime's own choice.
        provider: where it runs: "cpu", "cuda", ... as far as the runtime was built for it.
        verify: True compares the SHA-256 of every file; False only sizes; None: hashes bundles
            below 64 MiB.

    Raises:
        UserError: no bundle there, a damaged one, or a runtime that does not serve it.

    Example:
        runner = open_bundle("build/linear-int8")
        logits, state = runner.prefill(ids)
    """
    path = DEFAULT_BUNDLE if path is None else path
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}; expected a whole number above 0")
    if runtime in TORCH_BITS:
        return _open_checkpoint(path, threads, provider, TORCH_BITS[runtime])
    if runtime not in RUNTIME_NAMES:
        raise UserError(f"runtime {runtime!r}: known are {', '.join(RUNTIME_NAMES)}")
    name = _runtime_of(Path(path))
    if runtime not in ("auto", name):
        raise UserError(
            f"{path}: made for {name}, not for {runtime}; export the checkpoint with --to "
            f"{'onnx' if runtime == 'onnxruntime' else runtime}"
        )
    module, _, opener = RUNTIMES[name].partition(":")
    return getattr(import_module(module), opener)(path, threads, provider, verify=verify)


def _runtime_of(path: Path) -> str:
    """The runtime that a bundle is for."""
    if path.suffix == ".pte":
        return "executorch"
    graph = read_manifest(path).graphs["decoder"]
    return "executorch" if graph.endswith(".pte") else "onnxruntime"


def _open_checkpoint(path: str | Path, threads: int | None, provider: str, bits: int) -> Runner:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            "runtime 'torch' needs torch, which is not installed: pip install 'mmmamba-edge[torch]'"
        ) from error
    from mmmamba_edge.runtimes.torch_runner import TorchRunner

    try:
        torch.empty(1, device=provider)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"provider {provider!r}: this torch has no such device ({str(error).splitlines()[0]}); "
            "use cpu"
        ) from error
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"runtime torch-{'int8' if bits == 8 else 'nf4'} needs bitsandbytes, which is not "
            "installed: pip install bitsandbytes"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchRunner.from_checkpoint(path, device=provider, bits=bits)

"""Graphs in ONNX Runtime's own format, for phones whose runtime is built for one model.

An .ort file holds graph and weights, already optimised, and is read by builds of ONNX Runtime that
know no ONNX. `required_operators.config` lists the operators and types that the bundle needs:
`build.py --minimal_build --include_ops_by_config` makes a smaller runtime of it.
"""

import logging
import warnings
from dataclasses import replace
from pathlib import Path

from mmmamba_edge.bundle import write_manifest
from mmmamba_edge.errors import CheckFailed, UserError
from mmmamba_edge.export.verify import EXACT_DB, make_prompts, sqnr_db
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner, session_options

OPERATORS = "required_operators.config"
LIMIT = 2**31 - 1  # bytes of an .ort file


def replace_by_ort(folder: Path, manifest: Manifest) -> Manifest:
    """Replace a bundle's graphs, once the new ones are seen to answer as the old ones.

    Args:
        folder: a whole bundle of .onnx graphs, its manifest written.
        manifest: the same.

    Returns:
        The new manifest, without records of files.

    Raises:
        UserError: a graph is too large for the format.
        CheckFailed: the new graphs answer otherwise.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models

    before = OnnxRuntimeRunner(folder, verify=False)
    onnx = [folder / graph for graph in manifest.graphs.values()]
    graphs = {name: _convert(folder, file, manifest) for name, file in manifest.graphs.items()}
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with warnings.catch_warnings():  # it leaves files to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        files = [folder / file for file in graphs.values()]
        create_config_from_models(files, folder / OPERATORS, True)
    listed = (folder / OPERATORS).read_text().replace(f"{folder}/", "")
    (folder / OPERATORS).write_text(listed)

    manifest = replace(manifest, graphs=graphs, files={})
    write_manifest(folder, manifest)
    _check_same(before, OnnxRuntimeRunner(folder, verify=False))
    for file in onnx:
        file.unlink()
        file.with_suffix(".bin").unlink(missing_ok=True)
    return manifest


def _convert(folder: Path, file: str, manifest: Manifest) -> str:
    """Write one graph's .ort file."""
    import onnxruntime as ort

    graph, weights = folder / file, (folder / file).with_suffix(".bin")
    size = graph.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)
    if size > LIMIT:
        raise UserError(
            f"--ort: {file} has {size:,} bytes with its weights; the format ends at 2 GiB"
        )
    target = graph.with_suffix(".ort")
    options = session_options(manifest, threads=1)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"],
        # A layout for the vectors of this machine's processor; a phone's may have none such.
        disabled_optimizers=["NchwcTransformer"],
    )  # fmt: skip
    return target.name


def _check_same(before: OnnxRuntimeRunner, after: OnnxRuntimeRunner) -> None:
    """Text through to logits and state, pictures to their vectors.

    Not pictures to logits: the two vision graphs sum in another order, and where activations become
    int8 one rounding that falls otherwise moves all that follow, as far as quantising itself does.
    """
    pairs = []
    for prompt in make_prompts(before.config, before.max_context):
        if prompt.pixels is not None:
            vectors = [r.image_vectors(prompt.ids, prompt.pixels) for r in (after, before)]
            pairs.append((vectors[0], vectors[1]))
            continue
        want, state = before.read_all(prompt.ids)
        got, twin = after.read_all(prompt.ids)
        arrays = twin.arrays()
        pairs += [(got, want), *((arrays[name], array) for name, array in state.arrays().items())]
    worst = min(sqnr_db(got, want) for got, want in pairs)
    if not worst >= EXACT_DB:
        raise CheckFailed(
            f"verification failed: the .ort graphs are {worst:.1f} dB from the .onnx graphs, below "
            f"{EXACT_DB:g}. Nothing was written"
        )

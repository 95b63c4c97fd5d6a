"""Whether two bundles of one model hold the same codes and scales (one set for all runtimes)."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba_edge.config import Config
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.codes import Codes, pack_blocks
from mmmamba_edge.quant.held_matrices import Matrix, held_matrix
from mmmamba_edge.quant.initializers import Initializers

SEARCHED = 64 << 20  # bytes of a .pte in which every matrix is looked for; of a larger one, some
SOME = 8


def compare_codes(
    folder: Path, manifest: Manifest | None, other: Path, theirs: Manifest | None
) -> dict[str, Any]:
    """Compare the decoders' matrices of codes.

    A .pte has no table of them: the very bytes of each matrix are looked for in the file. Scales
    are compared between ONNX bundles.

    Returns:
        equal: how many matrices; different: names of those that are not the same; note: what was
        not compared.
    """
    if manifest is None or theirs is None:
        return _nothing("one of the two is no bundle")
    if manifest.quant != theirs.quant or manifest.quant not in ("int8", "int4"):
        return _nothing(f"codes: {manifest.quant} against {theirs.quant}")
    ours = manifest.graphs["decoder"].endswith(".onnx"), theirs.graphs["decoder"].endswith(".onnx")
    if all(ours):
        return _two_graphs(folder, manifest, other, theirs)
    if not any(ours):
        return _nothing("two files that hide their weights")
    graph, known = (folder, manifest) if ours[0] else (other, theirs)
    hidden, name = (other, theirs) if ours[0] else (folder, manifest)
    file = hidden if hidden.is_file() else hidden / name.graphs["decoder"]
    return _graph_and_file(graph, known, file)


def _nothing(why: str) -> dict[str, Any]:
    return {"equal": 0, "different": [], "note": f"not compared: {why}"}


def _two_graphs(folder: Path, manifest: Manifest, other: Path, theirs: Manifest) -> dict[str, Any]:
    a = Initializers(folder / manifest.graphs["decoder"])
    b = Initializers(other / theirs.graphs["decoder"])
    equal, different = 0, []
    for name, _ in _products(manifest.model):
        ours, other_one = held_matrix(a, name), held_matrix(b, name)
        if ours is None or other_one is None:
            continue
        same = (ours.bits, ours.group) == (other_one.bits, other_one.group) and all(
            _alike(x, y) for (_, x), (_, y) in zip(ours.blocks(), other_one.blocks(), strict=True)
        )
        equal += same
        different += [] if same else [name]
    return {"equal": equal, "different": different, "note": ""}


def _alike(a: Codes | Any, b: Codes | Any) -> bool:
    if isinstance(a, Codes) and isinstance(b, Codes):
        return np.array_equal(a.codes, b.codes) and np.array_equal(a.scale, b.scale)
    return False


def _graph_and_file(folder: Path, manifest: Manifest, file: Path) -> dict[str, Any]:
    held = Initializers(folder / manifest.graphs["decoder"])
    names = list(_products(manifest.model))
    note = "scales are not compared: the .pte keeps them in a form of its own"
    if file.stat().st_size > SEARCHED:
        names = names[:: max(1, len(names) // SOME)]
        note += f"; {len(names)} matrices only, of a large file"
    equal, different = 0, []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, sizes in names:
            whole = held_matrix(held, name)
            if whole is None:
                continue
            start, found = 0, True
            for size in sizes or [whole.count]:
                part = whole.rows(start, start + size)
                found = found and data.find(_bytes(part)) >= 0
                start += size
            equal += found
            different += [] if found else [name]
    return {"equal": equal, "different": different, "note": note}


def _bytes(part: Matrix) -> bytes:
    """The matrix as XNNPACK holds it: int8 rows, or pairs of code + 8, the first one low."""
    out = []
    for _, block in part.blocks():
        assert isinstance(block, Codes)
        out.append(
            pack_blocks(block, block.group)[0].tobytes()
            if block.bits == 4
            else np.ascontiguousarray(block.codes).tobytes()
        )
    return b"".join(out)


def _products(config: Config) -> Iterator[tuple[str, list[int]]]:
    """Names of the decoder's matrices in ONNX, and the rows of those that are apart in a .pte."""
    for index, kind in enumerate(config.layer_types):
        stack, prefix = config.stack_of(index), layer_prefix(config, index)
        kv, hidden, inner = stack.key_value_dim, stack.hidden_size, stack.intermediate_size
        if kind == "mamba2":
            yield f"{prefix}attention.vkqg", [kv, kv, hidden, hidden]
            yield f"{prefix}attention.o_proj", []
        else:
            yield f"{prefix}attention.qkv", [hidden, kv, kv]
            yield f"{prefix}attention.wo", []
        yield f"{prefix}feed_forward.w1w3", [inner, inner]
        yield f"{prefix}feed_forward.w2", []
    yield "head", []

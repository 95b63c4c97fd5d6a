"""The short report that every quantised bundle carries: `accuracy.json`, made by its export.

A few thousand positions on the runtime that will run it: enough to see what a scheme costs, not to
judge it; `mmmamba-edge check` does that. It holds neither times nor paths, so that the same export
gives the same bytes.
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmmamba_edge.errors import UserError
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.model.checkpoints import Checkpoint, open_checkpoint
from mmmamba_edge.quant.check_data import collect
from mmmamba_edge.quant.check_read import Artefact, read
from mmmamba_edge.quant.check_reference import Reference
from mmmamba_edge.quant.check_run import FORMAT, measured, plain
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.quant.stored import QuantizedCheckpoint
from mmmamba_edge.quant.thresholds import limits, scheme_of
from mmmamba_edge.resting import SETTING
from mmmamba_edge.status import Report, silent

FILE = "accuracy.json"
TOKENS = 2000
LARGE = 256 << 20  # bytes of a bundle from which on a quarter is read: an export must not double
KEPT = ("figures", "by_kind", "by_position", "answers")
DIGITS = 3  # of a figure: the file must not change with the last bits of a sum


def attach_report(
    folder: Path, reference: str | Path | Checkpoint, manifest: Manifest,
    opener: Callable[[], Artefact], say: Report = silent,
) -> Manifest:  # fmt: skip
    """Write `accuracy.json` into a bundle in the making.

    A quantised checkpoint is no reference: the numbers of its codes are all that it has.

    Args:
        folder: the bundle, its graphs and manifest in place.
        reference: the checkpoint in floating point.
        manifest: its manifest, which is not written here.
        opener: opens the bundle.
        say: told how far it is.

    Returns:
        The manifest, with the file and its main figures named under verification.accuracy, and
        how long its heads remember under settings.head_memory.

    Raises:
        UserError: the reference is another model.
    """
    source = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    if isinstance(source, QuantizedCheckpoint):
        say("no accuracy.json: give the checkpoint that was quantised with --reference")
        return manifest
    if source.weights_id() != manifest.model_id:
        raise UserError(
            f"--reference {source.folder}: model {source.weights_id()}, and the bundle is made of "
            f"{manifest.model_id}; give the checkpoint that was quantised"
        )
    report = quick_report(folder, source, manifest, opener(), say)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    figures = report["figures"]
    short = {"file": FILE, "positions": figures["positions"]}
    names = ("mean_kld", "top1", "ppl_ratio")
    short |= {name: figures[name]["value"] for name in names if name in figures}
    settings = manifest.settings
    if report["head_memory"]:
        settings = {**settings, SETTING: report["head_memory"]}
    verification = {**manifest.verification, "accuracy": short}
    return replace(manifest, verification=verification, settings=settings)


def quick_report(
    folder: Path, source: Checkpoint, manifest: Manifest, runner: Artefact, say: Report = silent
) -> dict[str, Any]:
    """The contents of `accuracy.json`, of an open bundle."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tokens = TOKENS // 4 if size > LARGE else TOKENS
    with tempfile.TemporaryDirectory(prefix="mmmamba-edge-") as scratch:
        # Without the scenes' artwork: what a file says must not depend on the current folder.
        nowhere = Path(scratch) / "none"
        data = collect(
            "builtin", source.config, runner.tokenizer_dir, tokens, manifest.max_context,
            Path(scratch), nowhere,
        )  # fmt: skip
        reference = Reference(Weights(source, SCHEMES["none"]), data.items, say)
        readings = read(runner, reference, data.items, say=say)
    found = measured(readings, data)
    notes = [note for note in data.notes if str(nowhere) not in note]
    return _short(
        plain(
            {
                "format": FORMAT, "producer": manifest.producer, "scheme": scheme_of(manifest),
                "reference": {"model_id": manifest.model_id, "dtype": "float32"},
                "data": {"sources": data.sources, "notes": notes},
                **{key: found[key] for key in KEPT}, "head_memory": reference.head_memory,
                "limits": limits(manifest, {})[0],
            }
        )
    )  # fmt: skip


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    if not isinstance(value, float) or not value:
        return value
    # Of what is near 1, the distance from 1 is what counts.
    if 0.5 < abs(value) < 2:
        return round(value, 5)
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))

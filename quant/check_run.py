"""`check`: the shipped artefact, on its own runtime, against the float32 reference.

Everything the report says is gathered here, as one JSON-ready object; check_report.py and
check_page.py show it.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

import mmmamba_edge
from mmmamba_edge.bundle import MANIFEST, file_sha256
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.verify import exact_twin
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.model.checkpoints import Checkpoint, open_checkpoint
from mmmamba_edge.quant import accuracy, check_state
from mmmamba_edge.quant.accuracy import ANSWER, KINDS, TEXT, Scores, Table
from mmmamba_edge.quant.check_codes import compare_codes
from mmmamba_edge.quant.check_cost import cost
from mmmamba_edge.quant.check_data import ART, Data, collect
from mmmamba_edge.quant.check_faults import Finding
from mmmamba_edge.quant.check_layers import Probe, probes
from mmmamba_edge.quant.check_read import Artefact, Readings, facts, read
from mmmamba_edge.quant.check_reference import Reference
from mmmamba_edge.quant.check_tensors import check_tensors
from mmmamba_edge.quant.check_verdict import judgements, told
from mmmamba_edge.quant.head_memory import histogram
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.quant.thresholds import limits, scheme_of
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.status import Report, silent

FORMAT = 1  # of the report
TOKENS = 20_000  # positions that are scored when nobody says
CONTEXT = 24  # tokens before a worst position that are shown

Open = Callable[..., Any]


def check(
    bundle: str | Path, reference: str | Path | Checkpoint, *, data: str = "builtin",
    tokens: int = TOKENS, runtime: str = "auto", other: str | Path | None = None,
    thresholds: Mapping[str, float] | None = None, state: str | None = None, timed: bool = True,
    art: Path = ART, say: Report = silent, opener: Open = open_bundle,
) -> dict[str, Any]:  # fmt: skip
    """Compare a bundle with the checkpoint that it was made of.

    Args:
        bundle: the artefact (a folder or a .pte; a checkpoint for runtime "torch").
        reference: the checkpoint.
        data: "builtin", or a .txt or .jsonl file.
        tokens: positions to score, those amid pictures not counted.
        runtime: what runs the artefact, as in `open_bundle`.
        other: another bundle of the same model, to be compared with this one.
        thresholds: limits that win over the scheme's and the bundle's own.
        state: also measure the drift of an SSD state that is kept as "float16", "int16" (a scale
            a row) or "bfloat16".
        timed: also measure memory and speed, in a process of its own.
        art: the scenes' artwork, for the embedded model.
        say: told what is being done, and how far.
        opener: opens the artefact.

    Returns:
        The report: docs/accuracy.md says what each figure means. Its `verdict` is "passed" or
        "failed", and `failures` names what did.

    Raises:
        UserError: files that are not what they should be, or another model's reference.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: expected a whole number above 0")
    if state is not None and state not in check_state.FORMATS:
        raise UserError(f"--state {state}: known are {', '.join(check_state.FORMATS)}")
    source = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    say("opening the bundle")
    runner: Artefact = opener(bundle, runtime)
    manifest: Manifest | None = getattr(runner, "manifest", None)
    second: Artefact | None = None
    allowed, origins = limits(manifest, thresholds or {}, str(bundle), runner.quant)
    say("hashing the reference")
    model_id = source.weights_id()
    _same_model(runner, bundle, model_id, source)
    if other is not None:
        second = cast(Artefact, open_bundle(other))
        _same_model(second, other, model_id, source)

    with tempfile.TemporaryDirectory(prefix="mmmamba-edge-") as scratch:
        most = [r.max_context for r in (runner, second) if r and r.max_context]
        room = min(most, default=None)
        gathered = collect(
            data, source.config, runner.tokenizer_dir, tokens, room, Path(scratch), art
        )
        probe = Probe(source.config, probes(gathered.items, source.config, room))
        folder = Path(bundle)
        graphs = manifest is not None and manifest.graphs["decoder"].endswith(".onnx")
        if graphs and manifest is not None:
            say("the bundle reads, layer by layer")
            probe.watch_graph(folder, manifest)
        probe.watch_states(runner)
        weights = Weights(source, SCHEMES["none"])
        probe.begin(weights)
        answers = Reference(weights, gathered.items, say, probe.layer)
        readings = read(runner, answers, gathered.items, second, say)
        say("reading whole and step by step")
        split = check_state.split(runner, probe.items)
        tensors: list[Finding] = []
        unseen: list[str] = []
        if graphs and manifest is not None:
            tensors, unseen = check_tensors(folder, manifest, weights, say)
        drift = None
        if state is not None:
            drift = _drift(runner, folder, manifest, gathered, state, say)
    say("working out intervals")
    out: dict[str, Any] = {
        "format": FORMAT,
        "producer": f"mmmamba-edge {mmmamba_edge.__version__}",
        "bundle": _bundle_facts(folder, runner, manifest),
        "reference": {"checkpoint": source.folder.name, "model_id": model_id, "dtype": "float32"},
        "data": {"asked": data, "sources": gathered.sources, "notes": gathered.notes},
        **measured(readings, gathered),
        "layers": _layers(probe, manifest),
        "weights": _weights(tensors, unseen, graphs),
        "state": {
            "precision": check_state.precision(probe.states), "split": asdict(split),
            "drift": drift, "memory": answers.head_memory,
            "memory_histogram": histogram(answers.head_memory),
        },
        "worst": _worst(readings.scores, gathered, runner),
    }  # fmt: skip
    if readings.cross is not None and second is not None and other is not None:
        out["other"] = _cross(readings.cross, folder, manifest, Path(other), second)
    lines = judgements(out, allowed, manifest, gathered.spoken)
    out["limits"] = {
        "scheme": scheme_of(manifest, runner.quant), "values": allowed, "from": origins,
        "note": "the table is for models above 1B parameters",
    }  # fmt: skip
    out["judged"] = [asdict(line) for line in lines]
    out["failures"] = [told(line) for line in lines if line.state == "failed"]
    out["verdict"] = "failed" if out["failures"] else "passed"
    if timed:
        say("measuring memory and speed")
        out["cost"] = cost(folder, runtime)
    return plain(out)


def _same_model(runner: Artefact, bundle: str | Path, model_id: str, source: Checkpoint) -> None:
    if runner.model_id != model_id:
        raise UserError(
            f"{bundle}: made of model {runner.model_id}, and {source.folder} is {model_id}; give "
            "the checkpoint that it was exported from"
        )


# --- figures --------------------------------------------------------------------------------------


def measured(readings: Readings, data: Data) -> dict[str, Any]:
    """figures, by_kind, by_position, histogram, quantiles and answers of a report.

    `figures` are of text and answers together: what a model says amid a picture is never used.
    """
    table = readings.scores.whole()
    spoken = table.of(TEXT, ANSWER)
    judged = spoken if len(spoken) else table
    out: dict[str, Any] = {
        "figures": _figures(judged, data),
        "by_kind": {
            name: _figures(part, data)
            for kind, name in enumerate(KINDS)
            if len(part := table.of(kind))
        },
        "by_position": accuracy.by_position(judged),
        "histogram": accuracy.histogram(judged),
        "quantiles": _quantiles(judged),
        "answers": None,
    }
    if readings.right:
        got, want = zip(*readings.right, strict=True)
        found = accuracy.flips(got, want)
        out["answers"] = {"count": len(got), **{k: v._asdict() for k, v in found.items()}}
    return out


def _figures(table: Table, data: Data) -> dict[str, Any]:
    found = accuracy.figures(table)
    if not data.spoken:
        found.pop("ppl_ratio", None)
    bad = int((~np.isfinite(table.columns.kld)).sum())
    units = accuracy.Draws(table, 0).units
    counted = {"positions": len(table), "units": units, "not_numbers": bad}
    return {**counted, **{name: value._asdict() for name, value in found.items()}}


def _quantiles(table: Table) -> list[list[float]]:
    shares = [*np.arange(0.01, 1, 0.01), 0.995, 0.999]
    kld = table.columns.kld[np.isfinite(table.columns.kld)]
    if not len(kld):
        return []
    return [[float(s), float(x)] for s, x in zip(shares, np.quantile(kld, shares), strict=True)]


def _worst(scores: Scores, data: Data, runner: Artefact) -> list[dict[str, Any]]:
    """The positions that differ most, in words where there is a tokenizer."""
    show: Callable[[Sequence[int]], str] = lambda ids: " ".join(map(str, ids))  # noqa: E731
    if runner.tokenizer_dir is not None:
        from mmmamba_edge.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(runner.tokenizer_dir)
        show = lambda ids: tokenizer.decode(ids, skip_special=False)  # noqa: E731
    image = runner.config.img_context_token_id
    out = []
    for slip in scores.worst():
        item = data.items[slip.sequence]
        start = max(0, slip.position + 1 - CONTEXT)
        before = [int(i) for i in item.ids[start : slip.position + 1] if i != image]
        out.append(
            {
                "kld": slip.kld, "sequence": item.name, "position": slip.position,
                "before": show(before), "follows": show([int(item.ids[slip.position + 1])]),
                "got": [[show([i]), p] for i, p in slip.got],
                "want": [[show([i]), p] for i, p in slip.want],
            }
        )  # fmt: skip
    return out


# --- layers, weights, states ----------------------------------------------------------------------


def _layers(probe: Probe, manifest: Manifest | None) -> dict[str, Any]:
    halves = [asdict(half) for half in probe.halves]
    hidden = "" if halves else "the runtime hides its layers: their states are compared instead"
    return {
        "tokens": sum(len(item.ids) for item in probe.items), "halves": halves,
        "states_db": probe.state_db, "note": hidden,
    }  # fmt: skip


def _weights(found: list[Finding], unseen: list[str], graphs: bool) -> dict[str, Any]:
    note = "" if graphs else "the runtime's file hides its weights: they are not compared"
    faults = [asdict(finding) for finding in found if finding.fault]
    return {
        "compared": len(found), "not_found": unseen, "faults": faults, "note": note,
        "tensors": [asdict(finding) for finding in found],
    }  # fmt: skip


def _drift(
    runner: Artefact, folder: Path, manifest: Manifest | None, data: Data, state: str, say: Report
) -> dict[str, Any]:
    """On activations in float32 where the bundle can: in 8 bits, the smallest change of a state
    moves some activation to the next step, and that noise hides what the format does."""
    fused = manifest is not None and manifest.ops == "com.microsoft"
    if manifest is None or manifest.quant not in ("int8", "int4") or not fused:
        exact = manifest is None or manifest.quant in ("none", "fp16") or manifest.ops == "standard"
        return {**check_state.drift(runner, data.items, state, say), "exact": exact}
    from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner

    with tempfile.TemporaryDirectory(prefix="mmmamba-edge-") as twin:
        exact = OnnxRuntimeRunner(exact_twin(folder, Path(twin)), verify=False)
        return {**check_state.drift(exact, data.items, state, say), "exact": True}


def _cross(
    scores: Scores, folder: Path, manifest: Manifest | None, other: Path, second: Artefact
) -> dict[str, Any]:
    table = scores.whole()
    spoken = table.of(TEXT, ANSWER)
    found = accuracy.figures(spoken if len(spoken) else table)
    found.pop("ppl_ratio", None)
    theirs: Manifest | None = getattr(second, "manifest", None)
    codes = compare_codes(folder, manifest, other, theirs)
    return {
        "bundle": _bundle_facts(other, second, theirs), "positions": len(spoken),
        **{name: value._asdict() for name, value in found.items()}, "codes": codes,
    }  # fmt: skip


# --- facts ----------------------------------------------------------------------------------------


def _bundle_facts(folder: Path, runner: Artefact, manifest: Manifest | None) -> dict[str, Any]:
    out = {
        "name": folder.name, "model_id": runner.model_id, "quant": runner.quant,
        "scheme": scheme_of(manifest, runner.quant), **facts(runner),
        "variant": runner.config.variant,
        "state_bytes": runner.new_state().nbytes, "max_context": runner.max_context,
    }  # fmt: skip
    if manifest is not None:
        out |= {"ops": manifest.ops, "settings": manifest.settings, "producer": manifest.producer}
    note = folder / MANIFEST
    if note.is_file():
        out["manifest_sha256"] = file_sha256(note)
        out["bytes"] = sum(file.bytes for file in (manifest.files if manifest else {}).values())
    elif folder.is_file():
        out |= {"sha256": file_sha256(folder), "bytes": folder.stat().st_size}
    return out


def plain(value: Any) -> Any:
    """JSON-ready: numbers that are none become null, NumPy's become Python's."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value

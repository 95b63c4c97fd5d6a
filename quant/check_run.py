"""`check`: the shipped artefact, on its own runtime, against the float32 reference.

Everything the report says is gathered here, as one JSON-ready object; check_report.py and
check_page.py show it.
"""

import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

import mmmamba_edge
from mmmamba_edge import bench
from mmmamba_edge.bundle import MANIFEST, file_sha256
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.verify import exact_twin
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.model.checkpoints import Checkpoint, open_checkpoint
from mmmamba_edge.quant import accuracy, check_state
from mmmamba_edge.quant.accuracy import ANSWER, KINDS, TEXT, Estimate, Scores, Table
from mmmamba_edge.quant.check_codes import compare_codes
from mmmamba_edge.quant.check_data import ART, Data, collect
from mmmamba_edge.quant.check_layers import HalfLayer, Probe, probes
from mmmamba_edge.quant.check_read import Artefact, Readings, facts, read
from mmmamba_edge.quant.check_reference import Reference
from mmmamba_edge.quant.check_tensors import Finding, check_tensors
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.quant.thresholds import (
    ANSWERS,
    DRIFT,
    POSITIONS_999,
    Line,
    judge,
    limits,
    scheme_of,
)
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
    allowed, origins = limits(manifest, thresholds or {}, str(bundle))
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
            "drift": drift,
        },
        "worst": _worst(readings.scores, gathered, runner),
    }  # fmt: skip
    if readings.cross is not None and second is not None and other is not None:
        out["other"] = _cross(readings.cross, folder, manifest, Path(other), second)
    lines = judgements(out, allowed, manifest, gathered.spoken)
    out["limits"] = {
        "scheme": scheme_of(manifest), "values": allowed, "from": origins,
        "note": "the table is for models above 1B parameters",
    }  # fmt: skip
    out["judged"] = [asdict(line) for line in lines]
    out["failures"] = [told(line) for line in lines if line.state == "failed"]
    out["verdict"] = "failed" if out["failures"] else "passed"
    if timed:
        say("measuring memory and speed")
        out["cost"] = _cost(folder, runtime)
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


# --- judging --------------------------------------------------------------------------------------


def judgements(
    report: dict[str, Any], allowed: dict[str, float], manifest: Manifest | None, spoken: bool
) -> list[Line]:
    """Every line of the verdict, the figures first."""
    figures = report["figures"]

    def estimate(group: dict[str, Any], key: str) -> Estimate:
        return Estimate(**group[key])

    few = ""
    if figures["positions"] < POSITIONS_999:
        few = f"{figures['positions']:,} positions are too few for it ({POSITIONS_999:,})"
    lines = [
        judge("mean_kld", estimate(figures, "mean_kld"), allowed["mean_kld"]),
        judge("p999_kld", estimate(figures, "p999_kld"), allowed["p999_kld"], few),
        judge("top1", estimate(figures, "top1"), allowed["top1"]),
    ]
    if "ppl_ratio" in figures and spoken:
        lines.append(judge("ppl_ratio", estimate(figures, "ppl_ratio"), allowed["ppl_ratio"]))
    if figures["not_numbers"]:
        why = f"{figures['not_numbers']:,} positions have logits that are not numbers"
        lines.append(Line("not_numbers", "logits", "failed", why=why))
    answers = report["answers"]
    if answers:
        few = ""
        if answers["count"] < ANSWERS:
            few = f"{answers['count']:,} answers are too few for it ({ANSWERS})"
        lines.append(judge("flips", estimate(answers, "flips"), allowed["flips"], few))
    lines += _weight_lines(report["weights"])
    lines += _layer_lines(report["layers"], allowed)
    lines += _state_lines(report["state"], allowed, manifest)
    if "other" in report:
        other = report["other"]
        lines += [
            judge("cross_kld", estimate(other, "mean_kld"), allowed["cross_kld"]),
            judge("cross_top1", estimate(other, "top1"), allowed["cross_top1"]),
        ]
        for name in other["codes"]["different"]:
            why = "its codes or scales are not the other bundle's"
            lines.append(Line("codes", "one set of codes", "failed", why=why, place=name))
    return lines


def _weight_lines(weights: dict[str, Any]) -> list[Line]:
    if not weights["compared"]:
        return []
    lines = [
        Line("weights", "weights", "failed", value=f["sqnr_db"], why=f["fault"], place=f["name"])
        for f in weights["faults"]
    ]
    what = f"{weights['compared']} tensors against the checkpoint"
    return lines or [Line("weights", what, "passed")]


def _layer_lines(layers: dict[str, Any], allowed: dict[str, float]) -> list[Line]:
    lines = []
    worst: list[Line] = []
    halves = [HalfLayer(**half) for half in layers["halves"]]
    for kind in ("mix", "feed_forward"):
        same = [half for half in halves if half.half == kind]
        if not same:
            continue
        middle = statistics.median(half.added_db for half in same)
        for half in same:
            place = f"layer {half.layer}, {half.half}"
            found = (
                judge("added_db", half.added_db, allowed["added_db"]),
                judge(
                    "added_below_median_db", max(0.0, middle - half.added_db),
                    allowed["added_below_median_db"],
                ),
            )  # fmt: skip
            lines += [_placed(line, place) for line in found if line.state == "failed"]
            worst.append(_placed(found[0], place))
    if halves and not lines:
        lines.append(min(worst, key=lambda line: line.value or 0.0))
    first = None
    seen: list[float] = []
    for name, db in layers["states_db"].items():
        kind = name.rpartition(".")[2]
        line = judge("state_db", db, allowed["state_db"])
        before = [d for d in seen]
        fell = (
            len(before) >= 2
            and statistics.median(before) - db > allowed["added_below_median_db"]
            and db < EQUAL_DB
        )
        if line.state == "failed" or fell:
            why = "" if line.state == "failed" else "far below the layers before it"
            first = first or _failed(_placed(line, f"layer {name.partition('.')[0]}, {kind}"), why)
        seen.append(db)
    if first:
        return [*lines, first]
    if layers["states_db"]:
        name, db = min(layers["states_db"].items(), key=lambda pair: pair[1])
        layer, _, kind = name.partition(".")
        lines.append(
            _placed(judge("state_db", db, allowed["state_db"]), f"layer {layer}, {kind}")
        )
    return lines


EQUAL_DB = 60.0  # what agrees so well is not judged by the layers before it


def _placed(line: Line, place: str) -> Line:
    return Line(**{**asdict(line), "place": place})


def _failed(line: Line, why: str) -> Line:
    return Line(**{**asdict(line), "state": "failed", "why": why or line.why})


def _state_lines(
    state: dict[str, Any], allowed: dict[str, float], manifest: Manifest | None
) -> list[Line]:
    said = {t.name: t.dtype for t in manifest.state} if manifest else {}
    coarse = [
        Line(
            "precision", "state in float32", "failed", place=f"layer {name.partition('.')[0]}, ssm",
            why=f"every number of it fits {found}: the state is rounded",
        )
        for name, found in state["precision"].items()
        if name.endswith(".ssm") and found != "float32" and said.get(name, "float32") == "float32"
    ]  # fmt: skip
    split = state["split"]
    lines = coarse or [Line("precision", "state in float32", "passed")]
    lines.append(judge("split_db", split["logits_db"], allowed["split_db"]))
    lines.append(
        _placed(
            judge("split_db", split["state_db"], allowed["split_db"]),
            f"state {split['worst_state']}",
        )
    )
    drift = state["drift"]
    if drift:
        kld, error = DRIFT.get(drift["format"], (None, None))
        unjudged = "" if drift["exact"] else "8-bit activations hide what the format does"
        if kld is None:
            unjudged = f"a {drift['format']} state is not offered"
        worst = drift["heads"][0]
        found = Estimate(**drift["mean_kld"])
        lines.append(judge("drift_kld", found, allowed.get("drift_kld", kld), unjudged))
        line = judge(
            "drift_error", worst["relative_error"], allowed.get("drift_error", error), unjudged
        )
        lines.append(_placed(line, f"layer {worst['layer']}, head {worst['head']}"))
    return lines


def told(line: Line) -> str:
    """A judgement in one line."""
    parts = [line.place] if line.place else []
    parts.append(line.what)
    text = ": ".join(parts)
    if line.value is not None and line.limit is not None:
        text += f" is {shown(line.key, line.value)}"
        if line.low is not None and line.high is not None and line.low != line.high:
            text += f" ({shown(line.key, line.low)} to {shown(line.key, line.high)})"
        text += f", at {line.side} {shown(line.key, line.limit)} is allowed"
        if line.side == "least":
            text = text.replace("is allowed", "is asked")
    return f"{text}: {line.why}" if line.why else text


SHARES = frozenset(
    ("top1", "top5", "flips", "cross_top1", "accuracy", "reference_accuracy", "delta")
)


def shown(key: str, value: float | None) -> str:
    """A figure for people, in the form that its kind wants."""
    if value is None or not math.isfinite(value):
        return "not a number"
    if key in SHARES:
        return f"{100 * value:.2f} %"
    if key.endswith("_db"):
        return f"{value:.1f}"
    return f"{value:.5f}" if key == "ppl_ratio" else f"{value:.3g}"


# --- facts ----------------------------------------------------------------------------------------


def _bundle_facts(folder: Path, runner: Artefact, manifest: Manifest | None) -> dict[str, Any]:
    out = {
        "name": folder.name, "model_id": runner.model_id, "quant": runner.quant,
        "scheme": scheme_of(manifest), **facts(runner), "variant": runner.config.variant,
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


def _cost(bundle: Path, runtime: str) -> dict[str, Any] | None:
    """Memory and speed, in a process of its own: this one holds the reference as well."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as apart:
            return apart.submit(_measure, bundle, runtime).result()
    except BrokenProcessPool:  # no memory for a second copy of the model, most likely
        return None


def _measure(bundle: Path, runtime: str) -> dict[str, Any]:
    found = bench.measure(
        bundle, runtime=runtime, prompt_tokens=128, new_tokens=32, contexts=[0], tiles=[], repeat=2
    )
    return {
        "bundle_bytes": found["bundle_bytes"], "state_bytes": found["state_bytes"],
        "peak_rss_bytes": found["peak_rss_bytes"],
        "prefill_tokens_per_s": found["text"]["prefill_tokens_per_s"],
        "decode_tokens_per_s": found["decode"][0]["tokens_per_s"],
        "threads": found["threads"], "machine": found["machine"],
    }  # fmt: skip


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



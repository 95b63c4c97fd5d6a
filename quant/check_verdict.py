"""The verdict of a report: every figure that is judged, and every fault that was found."""

import math
import statistics
from dataclasses import replace
from typing import Any

from mmmamba_edge.manifest import Manifest
from mmmamba_edge.quant.accuracy import Estimate
from mmmamba_edge.quant.check_layers import HALVES, HalfLayer
from mmmamba_edge.quant.thresholds import ANSWERS, DRIFT, POSITIONS_999, Line, judge
from mmmamba_edge.resting import HOLDS, named, stagnating

EQUAL_DB = 60.0  # a state that agrees so well is not compared with the layers before it


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
    """Halves of layers that add too much error, and the first state that is off."""
    lines: list[Line] = []
    worst: list[Line] = []
    halves = [HalfLayer(**half) for half in layers["halves"]]
    for kind in HALVES:
        same = [half for half in halves if half.half == kind]
        middle = statistics.median(half.added_db for half in same) if same else 0.0
        for half in same:
            below = max(0.0, middle - half.added_db)
            found = [
                replace(line, place=f"layer {half.layer}, {half.half}")
                for line in (
                    judge("added_db", half.added_db, allowed["added_db"]),
                    judge("added_below_median_db", below, allowed["added_below_median_db"]),
                )
            ]
            lines += [line for line in found if line.state == "failed"]
            worst.append(found[0])
    if worst and not lines:
        lines.append(min(worst, key=lambda line: line.value or 0.0))
    return [*lines, *_first_state(layers["states_db"], allowed)]


def _first_state(states_db: dict[str, float], allowed: dict[str, float]) -> list[Line]:
    """The first state tensor that is off, or else the one that is worst.

    Off is also what falls far below the layers before it: in a runtime that hides its layers that
    is how a fault shows.
    """
    lines: list[Line] = []
    for name, db in states_db.items():
        layer, _, kind = name.partition(".")
        line = replace(judge("state_db", db, allowed["state_db"]), place=f"layer {layer}, {kind}")
        before = statistics.median(one.value or 0.0 for one in lines) if len(lines) > 1 else db
        floor = before - allowed["added_below_median_db"]
        if line.state == "passed" and db < min(floor, EQUAL_DB):
            why = f"the layers before it reach {before:.1f}"
            line = replace(line, state="failed", limit=floor, why=why)
        if line.state == "failed":
            return [line]
        lines.append(line)
    return [min(lines, key=lambda line: line.value or 0.0)] if lines else []


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
    line = judge("split_db", split["state_db"], allowed["split_db"])
    lines.append(replace(line, place=f"state {split['worst_state']}"))
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
        lines.append(replace(line, place=f"layer {worst['layer']}, head {worst['head']}"))
        lines += _memory_lines(state["memory"], drift["format"], allowed)
    return lines


def _memory_lines(
    memory: dict[str, list[float]], kind: str, allowed: dict[str, float]
) -> list[Line]:
    """Whether some head remembers longer than the format can follow, and which."""
    heads = [(a, b, tokens) for a, row in memory.items() for b, tokens in enumerate(row)]
    if not heads:
        return []
    layer, head, tokens = max(heads, key=lambda one: one[2])
    line = judge("drift_memory", tokens, allowed.get("drift_memory", HOLDS[kind]))
    line = replace(line, place=f"layer {layer}, head {head}")
    slow = stagnating(memory, kind)
    if line.state == "failed" and len(slow) > 1:
        line = replace(line, why=f"so do others: {named(slow)}")
    return [line]


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

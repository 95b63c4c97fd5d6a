"""A report of `check` for a terminal, and its folder: report.json and report.html."""

import json
from pathlib import Path
from typing import Any

from mmmamba_edge.errors import UserError
from mmmamba_edge.quant.check_page import page
from mmmamba_edge.quant.check_verdict import shown
from mmmamba_edge.whole import new_folder

FILES = frozenset(("report.json", "report.html"))
MIB = 2**20


def write(report: dict[str, Any], out: Path) -> None:
    """Write the folder `out` whole or not at all; a report in it is replaced, nothing else."""
    with new_folder(out, _not_a_report) as folder:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page(report), encoding="utf-8")


def check_place(out: Path) -> None:
    """UserError if `out` could not be written: before an hour's work, not after it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: exists and is not a folder")
    reason = _not_a_report(out) if out.is_dir() and any(out.iterdir()) else ""
    if reason:
        raise UserError(f"--out {out}: {reason}; choose another folder or remove it")


def _not_a_report(folder: Path) -> str:
    more = sorted(f.name for f in folder.iterdir() if f.name not in FILES)
    return f"holds {more[0]}, which is no report's" if more else ""


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    bundle, figures = report["bundle"], report["figures"]
    lines = [
        f"{bundle['name']} ({bundle['scheme']}, {bundle['runtime']} {bundle['version']}) against "
        f"{report['reference']['checkpoint']} (float32)",
        f"{figures['positions']:,} positions of text and answers in {figures['units']:,} units; "
        "95 % intervals by a paired bootstrap over units",
        *(f"  {note}" for note in report["data"]["notes"][:5]),
        "",
        *_judged(report),
        "",
        *_kinds(report),
        "",
        *_positions(report),
    ]
    if "other" in report:
        lines += ["", *_other(report["other"])]
    if report["state"]["drift"]:
        lines += ["", *_drift(report["state"]["drift"])]
    if report["state"]["memory"]:
        lines += ["", *_memory(report["state"]["memory_histogram"])]
    cost = report.get("cost")
    if cost:
        rate = "{:,.0f}".format
        lines += [
            "",
            f"size {cost['bundle_bytes'] / MIB:,.1f} MiB, memory at most "
            f"{cost['peak_rss_bytes'] / MIB:,.0f} MiB; {cost['threads']} threads: prefill "
            f"{rate(cost['prefill_tokens_per_s'])}, decoding {rate(cost['decode_tokens_per_s'])} "
            "tokens/s",
        ]
    lines += ["", report["verdict"].upper(), *(f"  {line}" for line in report["failures"])]
    return "\n".join(lines)


def _judged(report: dict[str, Any]) -> list[str]:
    rows = [("", "figure", "95 % interval", "limit", "")]
    for line in report["judged"]:
        key, what = line["key"], line["what"]
        value = interval = limit = ""
        if line["limit"] is not None:
            value = shown(key, line["value"])
            if line["low"] != line["high"]:
                interval = f"{shown(key, line['low'])} to {shown(key, line['high'])}"
            limit = f"{'<=' if line['side'] == 'most' else '>='} {shown(key, line['limit'])}"
        if line["place"]:
            what += f" ({line['place']})"
        rows.append((what, value, interval, limit, line["state"]))
    return _columns(rows, "<>>>>")


def _kinds(report: dict[str, Any]) -> list[str]:
    titles = ("mean KLD", "median", "99 %", "99.9 %", "top-1", "top-5", "perplexity")
    keys = ("mean_kld", "median_kld", "p99_kld", "p999_kld", "top1", "top5", "ppl_ratio")
    rows: list[tuple[str, ...]] = [("", "positions", *titles)]
    for name, found in report["by_kind"].items():
        told = [shown(key, found[key]["value"]) if key in found else "-" for key in keys]
        rows.append((str(name), f"{found['positions']:,}", *told))
    return _columns(rows, "<" + ">" * (len(keys) + 1))


def _positions(report: dict[str, Any]) -> list[str]:
    rows = [("at token", "positions", "mean KLD", "95 % interval", "top-1")]
    for bucket in report["by_position"]:
        rows.append(
            (
                f"{bucket['first']:,} to {bucket['stop']:,}", f"{bucket['count']:,}",
                shown("mean_kld", bucket["mean_kld"]),
                f"{shown('mean_kld', bucket['low'])} to {shown('mean_kld', bucket['high'])}",
                shown("top1", bucket["top1"]),
            )
        )  # fmt: skip
    return _columns(rows, "<>>>>")


def _other(other: dict[str, Any]) -> list[str]:
    codes = other["codes"]
    bundle = other["bundle"]
    return [
        f"beside {bundle['name']} ({bundle['runtime']} {bundle['version']}): mean KLD "
        f"{shown('mean_kld', other['mean_kld']['value'])}, same likeliest token "
        f"{shown('top1', other['top1']['value'])}",
        f"codes: {codes['equal']} matrices equal, {len(codes['different'])} different"
        + (f"; {codes['note']}" if codes["note"] else ""),
    ]


def _drift(drift: dict[str, Any]) -> list[str]:
    worst = drift["heads"][0]
    return [
        f"a state kept as {drift['format']}, over {drift['tokens']:,} steps: mean KLD "
        f"{shown('mean_kld', drift['mean_kld']['value'])}, worst head off by "
        f"{worst['relative_error']:.2g} (layer {worst['layer']}, head {worst['head']})"
        + ("" if drift["exact"] else "; 8-bit activations hide what the format does")
    ]


def _memory(buckets: list[dict[str, Any]]) -> list[str]:
    """The histogram of the heads' memories, empty buckets left out."""
    shown = [
        f"{b['heads']} up to {b['stop']:,}" if b["stop"] else f"{b['heads']} beyond {b['first']:,}"
        for b in buckets
        if b["heads"]
    ]
    return ["heads by the tokens that they remember: " + ", ".join(shown)]


def _columns(rows: list[tuple[str, ...]], sides: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]

"""A report of `check` as one HTML page: no script, nothing loaded, light and dark."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from mmmamba_edge.quant.check_verdict import shown
from mmmamba_edge.quant.svg_chart import Axis, Series, chart
from mmmamba_edge.resting import HOLDS

MIB = 2**20
FIGURES = {
    "mean_kld": "mean KL divergence", "median_kld": "median", "p99_kld": "99 %",
    "p999_kld": "99.9 %", "top1": "top-1", "top5": "top-5", "ppl_ratio": "perplexity ratio",
}  # fmt: skip


def page(report: dict[str, Any]) -> str:
    """The page."""
    style = files("mmmamba_edge.quant").joinpath("check_page.css").read_text(encoding="utf-8")
    bundle = report["bundle"]
    title = f"{bundle['name']}: {report['verdict']}"
    parts = [
        _verdict(report), _judged(report), _charts(report), _kinds(report), _worst(report),
        _weights(report), _other(report), _compared(report),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


# --- parts, from the top --------------------------------------------------------------------------


def _verdict(report: dict[str, Any]) -> str:
    bundle, figures, good = report["bundle"], report["figures"], report["verdict"] == "passed"
    judged = [line for line in report["judged"] if line["state"] != "not judged"]
    if good:
        said = f"<p>All {len(judged)} judged lines are within their limits.</p>"
    else:
        items = "".join(f"<li>{escape(line)}</li>" for line in report["failures"])
        said = f"<ul>{items}</ul>"
    tiles = [
        ("mean KLD, nats", shown("mean_kld", figures["mean_kld"]["value"])),
        ("same top token", shown("top1", figures["top1"]["value"])),
    ]
    if "ppl_ratio" in figures:
        tiles.append(("perplexity ratio", shown("ppl_ratio", figures["ppl_ratio"]["value"])))
    size = bundle.get("bytes")
    if size:
        tiles.append(("size, MiB", f"{size / MIB:,.1f}"))
    cost = report.get("cost")
    if cost:
        tiles += [
            ("peak memory, MiB", f"{cost['peak_rss_bytes'] / MIB:,.0f}"),
            ("decoding, tokens/s", f"{cost['decode_tokens_per_s']:,.0f}"),
            ("prefill, tokens/s", f"{cost['prefill_tokens_per_s']:,.0f}"),
        ]
    cards = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{value}</b></div>'
        for name, value in tiles
    )
    what = f"{bundle['scheme']} on {bundle['runtime']} {bundle['version']}"
    return (
        f'<header class="{"good" if good else "bad"}"><div class="badge">'
        f"{'Passed' if good else 'Failed'}</div><div><h1>{escape(bundle['name'])}</h1>"
        f'<p class="sub">{escape(what)}, against {escape(report["reference"]["checkpoint"])} in '
        f"float32</p>{said}</div></header>"
        f'<section class="tiles">{cards}</section>'
    )


def _judged(report: dict[str, Any]) -> str:
    rows = []
    for line in report["judged"]:
        key, what = line["key"], escape(line["what"])
        if line["place"]:
            what += f' <span class="place">{escape(line["place"])}</span>'
        value = interval = limit = ""
        if line["limit"] is not None:
            value = shown(key, line["value"])
            limit = ("at most " if line["side"] == "most" else "at least ") + shown(
                key, line["limit"]
            )
            if line["low"] != line["high"]:
                interval = f"{shown(key, line['low'])} to {shown(key, line['high'])}"
        state = line["state"].replace(" ", "-")
        why = f'<div class="why">{escape(line["why"])}</div>' if line["why"] else ""
        rows.append(
            (
                f"{what}{why}",
                value,
                interval,
                limit,
                f'<span class="{state}">{line["state"]}</span>',
            )
        )
    figures = report["figures"]
    note = (
        f"{figures['positions']:,} positions of text and answers. The intervals are 95 %, by a "
        f"paired bootstrap over {figures['units']:,} units of up to 128 neighbouring positions, "
        "which share their past; the whole interval must be within the limit."
    )
    return _section("What is judged", note, _table(
        ("", "figure", "95 % interval", "limit", ""), rows, wide=True
    ))  # fmt: skip


def _charts(report: dict[str, Any]) -> str:
    limits = report["limits"]["values"]
    cards = []
    buckets = report["by_position"]
    if buckets:
        points = [(_middle(b), max(b["mean_kld"] or 0, 1e-12)) for b in buckets]
        bands = [(max(b["low"] or 0, 1e-12), max(b["high"] or 0, 1e-12)) for b in buckets]
        titles = [
            f"tokens {b['first']:,} to {b['stop']:,}: {shown('mean_kld', b['mean_kld'])} "
            f"({b['count']:,} positions)" for b in buckets
        ]  # fmt: skip
        one = Series("", points, 1, "both", bands, titles)
        picture = chart(
            [one], Axis("token of the sequence", log=True), Axis("mean KLD (nats)", log=True),
            limit=limits["mean_kld"], alt="mean KL divergence by position",
        )  # fmt: skip
        note = "Does it get worse with length? Band: 95 %; dashed: the limit of the whole."
        cards.append(_card("By position", note, picture))
    edges, counts = report["histogram"]["log10_edges"], report["histogram"]["counts"]
    bars = [((a + b) / 2, float(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    titles = [
        f"10^{a:g} to 10^{b:g}: {n:,}" for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    picture = chart(
        [Series("", bars, 1, "bars", (), titles)], Axis("log10 of the KLD", whole=True),
        Axis("positions", low=0), alt="positions by the size of their divergence",
    )  # fmt: skip
    figures = report["figures"]
    note = (
        f"Most positions hardly change: half are below "
        f"{shown('median_kld', figures['median_kld']['value'])}, 1 % above "
        f"{shown('p99_kld', figures['p99_kld']['value'])}."
    )
    cards.append(_card("How large", note, picture))
    cards += _layer_charts(report)
    drift = report["state"]["drift"]
    if drift and drift["by_position"]:
        points = [(m["position"], max(m["worst_head_error"], 1e-12)) for m in drift["by_position"]]
        picture = chart(
            [Series("", points)], Axis("steps", log=True), Axis("relative error", log=True),
            alt="error of the state over steps",
        )  # fmt: skip
        worst = drift["heads"][0]
        note = (
            f"The worst head of a state kept as {drift['format']}, against the same bundle with a "
            f"float32 state. At the end: layer {worst['layer']}, head {worst['head']}."
        )
        cards.append(_card("Drift of the state", note, picture))
    if report["state"]["memory"]:
        cards.append(_memory_card(report["state"]))
    return f'<section class="charts">{"".join(cards)}</section>'


def _memory_card(state: dict[str, Any]) -> str:
    """Each head's memory, by layer."""
    heads = [
        (int(layer), head, tokens)
        for layer, row in state["memory"].items()
        for head, tokens in enumerate(row)
    ]
    kind = state["drift"]["format"] if state["drift"] else "int16"
    picture = chart(
        [
            Series(
                "", [(layer, tokens) for layer, _, tokens in heads], marks="points",
                titles=[f"layer {a}, head {b}: {tokens:,.0f} tokens" for a, b, tokens in heads],
            )
        ],
        Axis("layer", whole=True), Axis("tokens", log=True), limit=HOLDS[kind],
        alt="how long each head remembers",
    )  # fmt: skip
    note = (
        "After how many tokens what a head was told has faded to 1/e. The dashed line is what a "
        f"state in {kind}, rounded after every token, can follow."
    )
    return _card("Memory of the heads", note, picture)


def _layer_charts(report: dict[str, Any]) -> list[str]:
    halves, states = report["layers"]["halves"], report["layers"]["states_db"]
    limits = report["limits"]["values"]
    cards = []
    if halves:
        series = [
            _half_series(halves, "accumulated", "running_db", 1, "both"),
            _half_series(halves, "added by this half", "added_db", 2, "points"),
        ]
        note = (
            "Higher is better. A fault is one point of the second colour far below the others; "
            "dashed: where it would fail."
        )
        picture = _layer_chart(series, limits["added_db"], "signal to error by layer")
        cards.append(_card("By layer", note, picture))
    if states:
        kinds = sorted({name.partition(".")[2] for name in states})
        series = []
        for number, kind in enumerate(kinds, 1):
            own = [(name, db) for name, db in states.items() if name.endswith(f".{kind}")]
            points = [(float(name.partition(".")[0]), db) for name, db in own]
            titles = [f"{name}: {db:.1f} dB" for name, db in own]
            series.append(Series(kind, points, number, "both", (), titles))
        note = report["layers"]["note"] or "what each layer remembers, after the same texts."
        picture = _layer_chart(series, limits["state_db"], "signal to error of the states by layer")
        cards.append(_card("States by layer", note[0].upper() + note[1:], picture))
    return cards


def _half_series(
    halves: Sequence[dict[str, Any]], name: str, key: str, colour: int, marks: str
) -> Series:
    """A figure of each half of a layer, the second half between two numbers."""
    points = [(half["layer"] + 0.5 * (half["half"] != "mix"), half[key]) for half in halves]
    titles = [f"layer {half['layer']}, {half['half']}: {half[key]:.1f} dB" for half in halves]
    return Series(name, points, colour, marks, (), titles)


def _layer_chart(series: Sequence[Series], limit: float, alt: str) -> str:
    most = max((y for one in series for _, y in one.points), default=10.0)
    high = 10.0 * math.ceil(most / 10 + 0.3)  # room for the legend
    y = Axis("signal to error (dB)", low=0, high=high)
    return chart(series, Axis("layer", whole=True), y, limit=limit, alt=alt)


def _middle(bucket: dict[str, Any]) -> float:
    return math.sqrt(max(bucket["first"], 16) * bucket["stop"])


def _kinds(report: dict[str, Any]) -> str:
    rows = []
    for name, found in report["by_kind"].items():
        cells = [
            f'<span title="{_interval(key, found[key])}">{shown(key, found[key]["value"])}</span>'
            if key in found else "" for key in FIGURES
        ]  # fmt: skip
        rows.append((name, f"{found['positions']:,}", *cells))
    note = (
        "An answer's positions are those from which its tokens are said; a picture's are not "
        "judged, for nothing is said there. Perplexity is of what a model is meant to say: "
        "running text, and answers."
    )
    out = _section("By what is read", note, _table(
        ("", "positions", *FIGURES.values()), rows, wide=True
    ))  # fmt: skip
    answers = report["answers"]
    if answers:
        titles = ("answers", "right", "right in the reference", "difference", "flips")
        cells = [
            f"<span>{shown(key, answers[key]['value'])}"
            f'<div class="why">{_interval(key, answers[key])}</div></span>'
            for key in ("accuracy", "reference_accuracy", "delta", "flips")
        ]
        note = (
            "Whether greedy decoding gives the expected answer, word for word; a flip is right in "
            "one model and wrong in the other."
        )
        table = _table(titles, [(f"{answers['count']:,}", *cells)], wide=True)
        out += _section("Answers", note, table)
    return out


def _interval(key: str, found: dict[str, Any]) -> str:
    return f"{shown(key, found['low'])} to {shown(key, found['high'])}"


def _worst(report: dict[str, Any]) -> str:
    cards = []
    for slip in report["worst"]:
        where = f"{escape(str(slip['sequence']))}, token {slip['position']:,}"
        cards.append(
            f'<article class="slip"><div class="place">{where} '
            f"<b>{shown('mean_kld', slip['kld'])}</b></div>"
            f'<p class="text">{_visible(slip["before"])}'
            f"<mark>{_visible(slip['follows'])}</mark></p>"
            f'<div class="pair">{_said("reference", slip["want"], 1)}'
            f"{_said('bundle', slip['got'], 2)}</div></article>"
        )
    note = "What was read, with the token that really follows marked, and what each model expects."
    return _section("Where they differ most", note, f'<div class="slips">{"".join(cards)}</div>')


def _said(name: str, tokens: Sequence[Sequence[Any]], colour: int) -> str:
    rows = "".join(
        f'<div class="said"><code>{_visible(text)}</code>'
        f'<span class="meter"><i style="width:{100 * p:.1f}%;background:var(--series-{colour})">'
        f"</i></span><small>{100 * p:.1f}</small></div>"
        for text, p in tokens[:4]
    )
    return f'<div><div class="place">{name}, %</div>{rows}</div>'


def _visible(text: str) -> str:
    """Text with what cannot be seen made visible."""
    shown_text = text.replace("\n", "\u21b5\n") if text.strip(" ") else text.replace(" ", "\u2423")
    return escape(shown_text)


def _weights(report: dict[str, Any]) -> str:
    weights = report["weights"]
    if weights["note"]:
        return _section("Weights", weights["note"][0].upper() + weights["note"][1:] + ".", "")
    coded = [t for t in weights["tensors"] if t["bits"] < 16 or t["fault"]]
    coded.sort(key=lambda t: (not t["fault"], t["sqnr_db"] - t["expected_db"], t["sqnr_db"]))
    rows = []
    for t in coded:
        state = "failed" if t["fault"] else "passed"
        said = f'<span class="{state}">{escape(t["fault"]) or "good"}</span>'
        numbers = f"{t['sqnr_db']:.1f}", f"{t['expected_db']:.1f}"
        rows.append((escape(t["name"]), str(t["bits"]), *numbers, said))
    titles = ("tensor", "bits", "signal to error, dB", "rounded to nearest, dB", "")
    first, rest = rows[:8], rows[8:]
    more = ""
    if rest:
        table = _table(titles, rest, wide=True)
        more = f"<details><summary>{len(rest)} more matrices</summary>{table}</details>"
    note = (
        f"{weights['compared']} tensors compared with the checkpoint, folds followed; "
        f"{len(weights['faults'])} with a fault. Matrices of codes, the worst first."
    )
    return _section("Weights", note, (_table(titles, first, wide=True) if first else "") + more)


def _other(report: dict[str, Any]) -> str:
    if "other" not in report:
        return ""
    other = report["other"]
    bundle, codes = other["bundle"], other["codes"]
    rows = [(label, shown(key, other[key]["value"]), _interval(key, other[key]))
            for key, label in FIGURES.items() if key in other]  # fmt: skip
    note = (
        f"{bundle['name']} ({bundle['scheme']}, {bundle['runtime']} {bundle['version']}) over the "
        f"same positions. Matrices of codes: {codes['equal']} equal, {len(codes['different'])} "
        f"different. {codes['note']}"
    )
    return _section("Beside the other bundle", note, _table(("", "figure", "95 % interval"), rows))


def _compared(report: dict[str, Any]) -> str:
    bundle, reference = report["bundle"], report["reference"]
    rows: list[tuple[str, str]] = []
    if report.get("command"):
        rows.append(("command", f"<code>{escape(report['command'])}</code>"))
    rows += [
        ("bundle", _facts(bundle)),
        ("reference", _facts(reference)),
        *(("data", _facts(source)) for source in report["data"]["sources"]),
        *(("note", escape(note)) for note in report["data"]["notes"]),
        ("limits", _facts({"scheme": report["limits"]["scheme"], **report["limits"]["values"]})),
        ("state", _facts(report["state"]["split"])),
        ("program", escape(report["producer"])),
    ]
    if report.get("cost"):
        rows.append(("cost", _facts(report["cost"])))
    body = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows)
    return _section("What was compared", "", f"<dl>{body}</dl>")


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(
        f'<span class="fact"><i>{escape(str(key))}</i> {escape(str(value))}</span>'
        for key, value in facts.items()
        if value is not None and value != {}
    )


# --- pieces ---------------------------------------------------------------------------------------


def _section(title: str, note: str, body: str) -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _card(title: str, note: str, picture: str) -> str:
    return (
        f"<figure><h2>{escape(title)}</h2>{picture}<figcaption>{escape(note)}</figcaption></figure>"
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], wide: bool = False) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{escape(titles[i])}">{cell}</td>' for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    kind = ' class="stack"' if wide else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

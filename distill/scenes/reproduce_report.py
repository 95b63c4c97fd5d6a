"""The report of a table of students: Markdown and plots from `results.json`."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmmamba_edge.distill.scenes.table_plan import Plan
from mmmamba_edge.whole import new_file

TYPES = (
    "existence", "naming", "colour", "count", "relation", "place", "reading", "caption",
    "easy-vqa", "all",
)  # fmt: skip
Line = dict[str, Any]


def write_report(plan: Plan, results: list[Line], out: Path) -> None:
    """Write OUT/table.md, and the plots where matplotlib is installed."""
    groups = dict.fromkeys(["main", *(row.group for row in plan.rows)])
    parts = []
    for group in groups:
        lines = [line for line in results if line["group"] == group]
        if group != "main":
            lines = [line for line in results if line["row"] == "teacher"] + lines
        if lines:
            parts.append(f"### {group}\n\n{markdown(lines)}")
    with new_file(out / "table.md") as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    plot_losses(results, out)
    plot_accuracy(results, out)


def markdown(lines: list[Line]) -> str:
    """One row a variant: mean over seeds, and their standard deviation where there are several."""
    types = [t for t in TYPES if all(t in line["scores"] for line in lines)]
    head = ["student", "seeds", *types, "KL from the teacher"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, group in by_row(lines):
        cells = [name, str(len(group))]
        for kind in types:
            cells.append(_cell([100 * line["scores"][kind]["accuracy"] for line in group], ".1f"))
        cells.append(_cell([line["kl"] for line in group], ".4f"))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def by_row(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    """Lines of the same variant together, in order of first appearance."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["row"]].append(line)
    return list(groups.items())


def _cell(values: list[float], style: str) -> str:
    mean = format(statistics.fmean(values), style)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), style)}"


# --- plots --------------------------------------------------------------------------------------

TITLES = {1: "stage 1: layers, new parts", 2: "stage 2: layers, q k v too", 3: "stage 3: logits"}
UNITS = {1: "1000 x MSE", 2: "1000 x MSE", 3: "KL per token (nats)"}


def plot_losses(results: list[Line], out: Path) -> None:
    """OUT/losses.png: the training loss of each stage, first seed of the main rows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for number, axis in zip(TITLES, axes, strict=True):
        seen = set()
        for line in (x for x in results if x["group"] == "main" and x["seed"] == 0):
            for folder in line.get("stages", ()):
                metrics = out / folder / "metrics.jsonl"
                if not Path(folder).name.startswith(f"{number}-") or folder in seen:
                    continue
                if not metrics.is_file():  # only the scores were kept
                    continue
                seen.add(folder)
                label = line["row"] if number == 3 else "both"
                axis.plot(*_curve(metrics), label=label, linewidth=1.2)
        axis.set(title=TITLES[number], xlabel="step", ylabel=UNITS[number], yscale="log")
        axis.grid(alpha=0.3, which="both")
        if seen:
            axis.legend()
    _save(figure, out / "losses.png")


def plot_accuracy(results: list[Line], out: Path) -> None:
    """OUT/accuracy.png: all test questions by variant, groups apart, seeds as dots."""
    import matplotlib.pyplot as plt

    groups: dict[str, list[Line]] = defaultdict(list)
    for line in results:
        groups[line["group"]].append(line)
    names = [(group, name) for group, lines in groups.items() for name, _ in by_row(lines)]
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.3 * len(names)), layout="constrained")
    colours = plt.colormaps["tab10"]
    for place, (group, name) in enumerate(names):
        values = [
            100 * line["scores"]["all"]["accuracy"] for line in groups[group] if line["row"] == name
        ]
        colour = colours(list(groups).index(group))
        axis.barh(place, statistics.fmean(values), color=colour, alpha=0.75)
        axis.plot(values, [place] * len(values), ".", color="black", markersize=4)
        axis.text(101, place, f"{statistics.fmean(values):.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), [f"{group}: {name}" for group, name in names], fontsize=8)
    axis.set(xlim=(0, 100), xlabel="test questions answered rightly (%)")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    _save(figure, out / "accuracy.png")


def _curve(metrics: Path) -> tuple[list[int], list[float]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
    plt.close(figure)

"""What the benchmarks have in common: pictures with questions, and a score of the answers.

    task = load_task("pope", Path("data/pope"))
    answers = {sample.id: ask(sample) for sample in task.samples}
    for line in task.score(answers): ...

To add a benchmark, add a file with `load` and a row to TASKS.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from mmmamba_edge.errors import UserError

# name -> (module, what --help says of it)
TASKS = {
    "pope": ("mmmamba_edge.evaluation.pope", "POPE, three splits on COCO val2014"),
    "mme": ("mmmamba_edge.evaluation.mme", "MME, perception and cognition"),
    "gqa": ("mmmamba_edge.evaluation.gqa", "GQA testdev balanced"),
    "textvqa": ("mmmamba_edge.evaluation.textvqa", "TextVQA val"),
    "scienceqa": ("mmmamba_edge.evaluation.scienceqa", "ScienceQA test, questions with a picture"),
    "mmvet": ("mmmamba_edge.evaluation.mmvet", "MM-Vet: the answers file that its judge takes"),
}


@dataclass(frozen=True)
class Sample:
    """A picture and what is asked about it.

    Attributes:
        id: unique within its task.
        image: the picture's file.
        prompt: the question with the words that follow it; the picture comes before, on a line of
            its own.
        max_new_tokens: of the answer at most.
        where: file and row it was read from, for errors.
        part: split or subtask it belongs to; "": there is only one.
    """

    id: str
    image: Path
    prompt: str
    max_new_tokens: int
    where: str
    part: str = ""


@dataclass(frozen=True)
class ScoreLine:
    """One figure of a score.

    Attributes:
        part: what it is about: a split, a subtask, "all".
        metric: its name.
        value: in `unit`; None where nothing was there to count.
        unit: "%" or "points".
        n: how many it is taken over.
        low, high: Wilson 95 % interval in `unit`; None where it is no share of n.
    """

    part: str
    metric: str
    value: float | None
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark that has been read.

    Attributes:
        name: as in TASKS.
        samples: in the order of the files.
        score: answers by sample id, of some or all samples -> lines.
        write_for_judge: writes the answers to a file where others do the scoring; `score` has no
            lines then.
    """

    name: str
    samples: tuple[Sample, ...]
    score: Callable[[Mapping[str, str]], list[ScoreLine]]
    write_for_judge: Callable[[Mapping[str, str], Path], None] | None = None

    def first(self, count: int) -> "Task":
        """Only the first `count` samples of each part."""
        seen: Counter[str] = Counter()
        kept = []
        for sample in self.samples:
            seen[sample.part] += 1
            if seen[sample.part] <= count:
                kept.append(sample)
        return replace(self, samples=tuple(kept))

    def fingerprint(self) -> str:
        """SHA-256 over all that is asked: ids, prompts, picture names and token limits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            asked = [sample.id, sample.prompt, sample.image.name, sample.max_new_tokens]
            digest.update(json.dumps(asked).encode())
        return digest.hexdigest()


def load_task(
    name: str, data: Path, images: Path | None = None, *, suffix: str | None = None
) -> Task:
    """Read a benchmark.

    Args:
        name: one of TASKS.
        data: folder with the published files; docs/evaluation.md lists them.
        images: folder of the pictures; None: where the published archives put them under `data`.
        suffix: what follows each question; None: the words the benchmark is usually asked with.

    Raises:
        UserError: a missing or damaged file, row or picture; it names file, row and field.

    Example:
        task = load_task("gqa", Path("data/gqa"))
    """
    if name not in TASKS:
        raise UserError(f"task {name!r}: known are {', '.join(TASKS)}")
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; --data takes the folder of {name}'s files")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder; --images takes the folder of the pictures")
    task: Task = import_module(TASKS[name][0]).load(data, images, suffix)
    if not task.samples:
        raise UserError(f"{data}: no questions in it")
    known: dict[str, str] = {}
    for sample in task.samples:
        if sample.id in known:
            raise UserError(f"{sample.where}: its id {sample.id} is that of {known[sample.id]} too")
        known[sample.id] = sample.where
    return task


def share(part: str, metric: str, hits: float, n: int) -> ScoreLine:
    """The line of a share, in per cent; `hits` may be a sum of fractions."""
    if not n:
        return ScoreLine(part, metric, None, "%", 0)
    low, high = wilson(hits, n)
    return ScoreLine(part, metric, 100 * hits / n, "%", n, 100 * low, 100 * high)


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share; `hits` may be a sum of fractions, which makes it a wide one."""
    z, p = 1.96, hits / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def format_lines(lines: list[ScoreLine]) -> str:
    """The score as a Markdown table."""
    out = ["| | metric | value | 95 % | n |", "|---|---|---|---|---|"]
    for line in lines:
        value = "-" if line.value is None else f"{line.value:.1f}{' %' * (line.unit == '%')}"
        between = "" if line.low is None else f"{line.low:.1f} to {line.high:.1f}"
        out.append(f"| {line.part} | {line.metric} | {value} | {between} | {line.n} |")
    return "\n".join(out)

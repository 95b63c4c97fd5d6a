"""Score answers by question type, beside the best blind guess.

    table = score(answer, samples)          answer(image, question) -> str
    table = score_batch(answer_batch, samples, batch=64)
    print(format_table(table))

`samples` are the pairs that `iter_eval` yields.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mmmamba_edge.distill.scenes.phrasing import COUNT_WORDS, Question, plural
from mmmamba_edge.distill.scenes.vocabulary import COLOURS, KINDS, SHAPES
from mmmamba_edge.evaluation.task import wilson

Answer = Callable[[np.ndarray, str], str]
AnswerBatch = Callable[[list[tuple[np.ndarray, str]]], list[str]]
Sample = tuple[np.ndarray, list[Question]]


@dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes:
        n: questions; accuracy: mean score (F1 for captions, else share of right answers).
        chance: mean over the questions of the accuracy of their form's most frequent answer (for
            captions: of the most frequent caption word for word).
        low, high: Wilson 95 % interval of the accuracy.
    """

    n: int
    accuracy: float
    chance: float
    low: float
    high: float


def score(answer: Answer, samples: Iterable[Sample]) -> dict[str, Score]:
    """Ask one question at a time."""
    return score_batch(lambda batch: [answer(*one) for one in batch], samples, batch=1)


def score_batch(
    answer_batch: AnswerBatch, samples: Iterable[Sample], *, batch: int = 64, by_form: bool = False
) -> dict[str, Score]:
    """Ask in batches.

    Args:
        answer_batch: list of (picture (112, 112, 3) uint8, question) -> answers, in order.
        samples: pictures with questions, as `iter_eval` gives them.
        batch: most questions at a time.
        by_form: one line for each form rather than for each type.

    Returns:
        type (or form) -> its score, and "all".
    """
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for group in _batches(samples, batch):
        answers = answer_batch([(image, question.question) for image, question in group])
        for (_, question), given in zip(group, answers, strict=True):
            entry = (correctness(question, given), question.chance)
            points[question.form if by_form else question.type].append(entry)
            points["all"].append(entry)
    return {name: _summary(entries) for name, entries in sorted(points.items())}


def correctness(question: Question, given: str) -> float:
    """1 for right, 0 for wrong; captions between them."""
    if question.type == "caption":
        return caption_f1(question.answer, given)
    want, got = normalise(question.answer), normalise(given)
    if question.answer in ("yes", "no"):
        return float(got.split(" ")[0] == want)
    return float(want == got)


def normalise(text: str) -> str:
    """Lower case, no punctuation or articles, number words as digits, gray for grey."""
    text = re.sub(r"[^\w\s'-]", " ", text.lower())
    words = [_SAME.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


_SAME = {word: str(n) for n, word in enumerate(COUNT_WORDS) if n} | {"zero": "0", "grey": "gray"}


def caption_f1(want: str, given: str) -> float:
    """F1 of the things named (with their colour and number) and the printed word."""
    truth, found = caption_items(want), caption_items(given)
    if not truth:
        return float(not found)
    hits = len(truth & found)
    return 2 * hits / (len(truth) + len(found))


def caption_items(text: str) -> frozenset[tuple[str, str, str]]:
    """(name, colour, number) of each thing a caption names; ("word", text, "") for the word."""
    items = set()
    words = normalise(re.split(r"\bon an? [a-z]+ background", text)[0]).split()
    number, colour = "1", ""
    for i, word in enumerate(words):
        if word in ("word", "number") and i + 1 < len(words):
            items.add(("word", words[i + 1], ""))
            break
        if word.isdigit():
            number = word
        elif word in COLOURS:
            colour = word
        else:
            if word in _SINGULAR:
                items.add((_SINGULAR[word], colour, number))
            number, colour = "1", ""
    return frozenset(items)


_SINGULAR = {form: name for name in (*KINDS, *SHAPES) for form in (name, plural(name))}


def format_table(table: dict[str, Score]) -> str:
    """The table as Markdown."""
    lines = ["| type | n | accuracy | 95 % | chance |", "|---|---|---|---|---|"]
    for name, line in table.items():
        lines.append(
            f"| {name} | {line.n} | {100 * line.accuracy:.1f} % "
            f"| {100 * line.low:.1f} to {100 * line.high:.1f} | {100 * line.chance:.1f} % |"
        )
    return "\n".join(lines)


def _summary(entries: list[tuple[float, float]]) -> Score:
    n, hits = len(entries), sum(point for point, _ in entries)
    return Score(n, hits / n, sum(chance for _, chance in entries) / n, *wilson(hits, n))


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[tuple[np.ndarray, Question]]]:
    group = []
    for image, questions in samples:
        for question in questions:
            group.append((image, question))
            if len(group) == size:
                yield group
                group = []
    if group:
        yield group

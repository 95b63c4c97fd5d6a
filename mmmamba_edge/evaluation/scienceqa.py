"""ScienceQA: the questions of the test split that come with a picture; several choices, one right.

    FOLDER/problems.json      problem id -> question, choices, answer (index), hint, image
    FOLDER/pid_splits.json    {"test": [problem ids], ...}
    FOLDER/images/test/5/image.png ...         or --images, the folder with `test` in it

The answer is the option whose letter is named. Where no letter or several are, it is the option
whose text is said, if it is only one's; else the answer is wrong. So VLMEvalKit does it without a
judge.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.rows import Row, read_object, read_records
from mmmamba_edge.evaluation.task import Sample, ScoreLine, Task, share

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Truth:
    """The choices, first to last, and the letter of the right one."""

    choices: tuple[str, ...]
    letter: str


def load(data: Path, images: Path | None, suffix: str | None) -> Task:
    """Read the test questions that have a picture; see `load_task`."""
    folder = (data / "images" if images is None else images) / "test"
    problems = read_records(data / "problems.json")
    splits = data / "pid_splits.json"
    samples: list[Sample] = []
    truths: dict[str, Truth] = {}
    for id in read_object(splits).get("test", list):
        if id not in problems:
            raise UserError(f"{splits}: test: {id!r} is not in {data / 'problems.json'}")
        row = problems[id]
        if row.values.get("image") is None:
            continue
        truths[id] = _truth(row)
        question = asked(row.text("question"), str(row.get("hint", str)), truths[id].choices)
        samples.append(
            Sample(
                id=id,
                image=row.picture("image", folder / id, row.text("image")),
                prompt=question + (SUFFIX if suffix is None else suffix),
                max_new_tokens=MAX_NEW_TOKENS,
                where=row.where,
            )
        )
    return Task("scienceqa", tuple(samples), partial(score, truths))


def asked(question: str, hint: str, choices: Sequence[str]) -> str:
    """The hint if there is one, the question, and a line for each choice."""
    lines = [hint] if hint.strip() else []
    options = [f"{letter}. {choice}" for letter, choice in _lettered(choices)]
    return "\n".join([*lines, question, *options])


def score(truths: Mapping[str, Truth], answers: Mapping[str, str]) -> list[ScoreLine]:
    """The accuracy.

    Args:
        truths: problem id -> choices and the right letter.
        answers: of some or all problems.
    """
    right = 0
    for id, answer in answers.items():
        right += chosen(answer, truths[id].choices) == truths[id].letter
    return [share("all", "accuracy", right, len(answers))]


def chosen(answer: str, choices: Sequence[str]) -> str:
    """The letter of the option that an answer names; "" for none or several."""
    words = answer.translate({ord(mark): " " for mark in ".()[],:;!*#{}"}).split()
    named = [letter for letter, _ in _lettered(choices) if letter in words]
    if len(named) == 1:
        return named[0]
    said = [letter for letter, choice in _lettered(choices) if choice.lower() in answer.lower()]
    return said[0] if len(said) == 1 else ""


def _lettered(choices: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(string.ascii_uppercase, choices, strict=False))


def _truth(row: Row) -> Truth:
    choices = row.get("choices", list)
    if not 2 <= len(choices) <= 26 or not all(isinstance(choice, str) for choice in choices):
        raise row.error("choices", "expected a list of 2 to 26 texts")
    answer = row.get("answer", int)
    if not 0 <= answer < len(choices):
        raise row.error("answer", f"expected the index of a choice, 0 to {len(choices) - 1}")
    return Truth(tuple(choices), string.ascii_uppercase[answer])

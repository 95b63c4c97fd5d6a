"""TextVQA val: questions whose answer is written in the picture, with ten people's answers.

    FOLDER/TextVQA_0.5.1_val.json       {"data": [{question_id, question, image_id, answers}]}
    FOLDER/train_images/*.jpg           or --images; the val pictures are in this folder too

No OCR tokens are given to the model. The metric is the VQA accuracy (vqa_words.py).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mmmamba_edge.evaluation.rows import Row, read_object
from mmmamba_edge.evaluation.task import Sample, ScoreLine, Task, share
from mmmamba_edge.evaluation.vqa_words import PEOPLE, vqa_accuracy

SUFFIX = "\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 1024
FILE = "TextVQA_0.5.1_val.json"


def load(data: Path, images: Path | None, suffix: str | None) -> Task:
    """Read the questions; see `load_task`."""
    folder = data / "train_images" if images is None else images
    outer = read_object(data / FILE)
    samples: list[Sample] = []
    truths: dict[str, list[str]] = {}
    for number, values in enumerate(outer.get("data", list), start=1):
        where = f"{data / FILE}: data, row {number}"
        row = Row(where, values if isinstance(values, dict) else {})
        sample = Sample(
            id=str(row.get("question_id", int)),
            image=row.picture("image_id", folder, f"{row.text('image_id')}.jpg"),
            prompt=row.text("question") + (SUFFIX if suffix is None else suffix),
            max_new_tokens=MAX_NEW_TOKENS,
            where=where,
        )
        answers = row.get("answers", list)
        if len(answers) != PEOPLE or not all(isinstance(answer, str) for answer in answers):
            raise row.error("answers", f"expected {PEOPLE} texts")
        truths[sample.id] = answers
        samples.append(sample)
    return Task("textvqa", tuple(samples), partial(score, truths))


def score(truths: Mapping[str, list[str]], answers: Mapping[str, str]) -> list[ScoreLine]:
    """The mean VQA accuracy.

    Args:
        truths: question id -> the ten answers of people.
        answers: of some or all questions.
    """
    points = sum(vqa_accuracy(answer, truths[id]) for id, answer in answers.items())
    return [share("all", "VQA accuracy", points, len(answers))]

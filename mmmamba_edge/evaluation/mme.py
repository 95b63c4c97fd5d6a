"""MME: yes-or-no questions in fourteen subtasks, two about each picture.

    FOLDER/existence/000000006040.jpg, 000000006040.txt ...        beside each other, or
    FOLDER/artwork/images/*.jpg, questions_answers_YN/*.txt        apart; the release has both kinds

A .txt holds two lines, each a question, a tab, and Yes or No. FOLDER may also be the release's
outer folder, with MME_Benchmark in it.

A subtask's points are its accuracy plus its accuracy+, in per cent: the share of right answers, and
of pictures with both answers right; their sums are perception (2000 at most) and cognition (800).
An answer that says neither yes nor no, or both, is wrong, as in VLMEvalKit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.rows import Row, read_text
from mmmamba_edge.evaluation.task import Sample, ScoreLine, Task, share
from mmmamba_edge.evaluation.vqa_words import strip_punctuation

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
# Without a space before it: so mmMamba's published figures were made.
SUFFIX = "Answer the question using a single word or phrase."
MAX_NEW_TOKENS = 1024
PICTURES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class Truth:
    """The right answer to a sample, and which picture of which subtask it is about."""

    subtask: str
    picture: str
    answer: str  # "yes" or "no"


def load(data: Path, images: Path | None, suffix: str | None) -> Task:
    """Read the subtasks that are there; see `load_task`."""
    if (data / "MME_Benchmark").is_dir():
        data = data / "MME_Benchmark"
    samples: list[Sample] = []
    truths: dict[str, Truth] = {}
    for subtask in (*PERCEPTION, *COGNITION):
        questions = _inner(data / subtask, "questions_answers_YN")
        pictures = _inner((data if images is None else images) / subtask, "images")
        for file in sorted(questions.glob("[!.]*.txt")):
            picture = _picture(file, pictures)
            for number, row in enumerate(_rows(file), start=1):
                sample = Sample(
                    id=f"{subtask}/{file.stem}/{number}",
                    image=picture,
                    prompt=row.text("question") + (SUFFIX if suffix is None else suffix),
                    max_new_tokens=MAX_NEW_TOKENS,
                    where=row.where,
                    part=subtask,
                )
                truths[sample.id] = Truth(subtask, file.stem, row.choice("answer", ("yes", "no")))
                samples.append(sample)
    if not samples:
        raise UserError(
            f"{data}: no subtask of MME in it; expected folders with .txt files: "
            f"{', '.join((*PERCEPTION, *COGNITION))}"
        )
    return Task("mme", tuple(samples), partial(score, truths))


def score(truths: Mapping[str, Truth], answers: Mapping[str, str]) -> list[ScoreLine]:
    """Accuracy, accuracy+ and points of each subtask, then the two sums.

    Args:
        truths: by sample id.
        answers: of some or all samples; accuracy+ is over the pictures with both answers.
    """
    lines: list[ScoreLine] = []
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        total, asked, counted = 0.0, 0, 0
        for subtask in subtasks:
            pictures: dict[str, list[bool]] = {}
            for id, answer in answers.items():
                truth = truths[id]
                if truth.subtask == subtask:
                    right = yes_or_no(answer) == truth.answer
                    pictures.setdefault(truth.picture, []).append(right)
            if not pictures:
                continue
            points = [right for pair in pictures.values() for right in pair]
            pairs = [all(pair) for pair in pictures.values() if len(pair) == 2]
            accuracy = share(subtask, "accuracy", sum(points), len(points))
            plus = share(subtask, "accuracy+", sum(pairs), len(pairs))
            both = (accuracy.value or 0.0) + (plus.value or 0.0)
            lines += [accuracy, plus, ScoreLine(subtask, "points", both, "points", len(points))]
            total, asked, counted = total + both, asked + len(points), counted + 1
        if counted:
            part = f"{name}, {counted} of {len(subtasks)} subtasks"
            lines.append(ScoreLine(part, "points", total, "points", asked))
    return lines


def yes_or_no(answer: str) -> str:
    """ "yes", "no", or "" for neither or both."""
    said = {"yes", "no"} & set(strip_punctuation(answer.lower()).split())
    return said.pop() if len(said) == 1 else ""


def _rows(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            question, tab, answer = line.strip().rpartition("\t")
            if not tab:
                raise UserError(f"{file}: line {number}: expected a question, a tab, and Yes or No")
            fields = {"question": question.strip(), "answer": answer}
            rows.append(Row(f"{file}: line {number}", fields))
    if len(rows) != 2:
        raise UserError(f"{file}: expected two questions about its picture, found {len(rows)}")
    return rows


def _picture(file: Path, folder: Path) -> Path:
    for ending in PICTURES:
        path = folder / f"{file.stem}{ending}"
        if path.is_file():
            return path
    raise UserError(
        f"{file}: no picture for it: there is no {folder / file.stem}{{{','.join(PICTURES)}}}; "
        "--images takes the folder that has it"
    )


def _inner(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder

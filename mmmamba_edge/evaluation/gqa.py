"""GQA testdev balanced: questions made from scene graphs, answered in a word or phrase.

    FOLDER/testdev_balanced_questions.json     question id -> question, answer, imageId, types
    FOLDER/images/n161313.jpg ...              or --images

An answer is right if it equals the file's, letter by letter, after the usual conversion (LLaVA's
for the official eval.py): lower case, full stops at the end dropped. As in eval.py, "open" are the
questions whose structural type is "query", all others "binary".
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mmmamba_edge.evaluation.rows import Row, read_records
from mmmamba_edge.evaluation.task import Sample, ScoreLine, Task, share

SUFFIX = " Answer the question using a single word or phrase."
MAX_NEW_TOKENS = 10


def load(data: Path, images: Path | None, suffix: str | None) -> Task:
    """Read the questions; see `load_task`."""
    folder = data / "images" if images is None else images
    samples: list[Sample] = []
    truths: dict[str, tuple[str, bool]] = {}
    for id, row in read_records(data / "testdev_balanced_questions.json").items():
        types = Row(f"{row.where}: types", row.get("types", dict))
        truths[id] = row.text("answer"), types.text("structural") == "query"
        samples.append(
            Sample(
                id=id,
                image=row.picture("imageId", folder, f"{row.text('imageId')}.jpg"),
                prompt=row.text("question") + (SUFFIX if suffix is None else suffix),
                max_new_tokens=MAX_NEW_TOKENS,
                where=row.where,
            )
        )
    return Task("gqa", tuple(samples), partial(score, truths))


def score(truths: Mapping[str, tuple[str, bool]], answers: Mapping[str, str]) -> list[ScoreLine]:
    """Accuracy over all, open and binary questions.

    Args:
        truths: question id -> right answer, and whether the question is open.
        answers: of some or all questions.
    """
    right = {id: converted(answer) == truths[id][0] for id, answer in answers.items()}
    lines = [share("all", "accuracy", sum(right.values()), len(right))]
    for part, is_open in (("open", True), ("binary", False)):
        mine = [hit for id, hit in right.items() if truths[id][1] == is_open]
        lines.append(share(part, "accuracy", sum(mine), len(mine)))
    return lines


def converted(answer: str) -> str:
    """An answer as eval.py takes it."""
    return answer.strip().rstrip(".").lower()

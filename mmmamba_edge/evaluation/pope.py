"""POPE: does a model see what is not there? Yes-or-no questions about COCO's val2014 pictures.

    FOLDER/coco_pope_{adversarial,popular,random}.json     a JSON object on each line
    FOLDER/val2014/COCO_val2014_000000310196.jpg ...       or --images

How an answer is read, and the figures, are those of the authors' evaluate.py; "yes" is the positive
class. The figure that papers quote is the mean F1.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mmmamba_edge.evaluation.rows import read_lines
from mmmamba_edge.evaluation.task import Sample, ScoreLine, Task, share

SPLITS = ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 100


def load(data: Path, images: Path | None, suffix: str | None) -> Task:
    """Read the three splits; see `load_task`."""
    folder = data / "val2014" if images is None else images
    samples: list[Sample] = []
    labels: dict[str, bool] = {}
    for split in SPLITS:
        for row in read_lines(data / f"coco_pope_{split}.json"):
            sample = Sample(
                id=f"{split}/{row.get('question_id', int)}",
                image=row.picture("image", folder, row.text("image")),
                prompt=row.text("text") + (SUFFIX if suffix is None else suffix),
                max_new_tokens=MAX_NEW_TOKENS,
                where=row.where,
                part=split,
            )
            labels[sample.id] = row.choice("label", ("yes", "no")) == "yes"
            samples.append(sample)
    return Task("pope", tuple(samples), partial(score, labels))


def score(labels: Mapping[str, bool], answers: Mapping[str, str]) -> list[ScoreLine]:
    """Five figures a split, and the mean F1.

    Args:
        labels: sample id ("SPLIT/NUMBER") -> whether yes is right.
        answers: of some or all samples.
    """
    lines: list[ScoreLine] = []
    f1s: list[float] = []
    for split in SPLITS:
        pairs = [
            (says_yes(answer), labels[id])
            for id, answer in answers.items()
            if id.startswith(f"{split}/")
        ]
        if not pairs:
            continue
        said, true = sum(said for said, _ in pairs), sum(true for _, true in pairs)
        both = sum(said and true for said, true in pairs)
        right = sum(said == true for said, true in pairs)
        f1 = 100 * 2 * both / (said + true) if said + true else None
        lines += [
            share(split, "accuracy", right, len(pairs)),
            share(split, "precision", both, said),
            share(split, "recall", both, true),
            ScoreLine(split, "F1", f1, "%", len(pairs)),
            share(split, "yes ratio", said, len(pairs)),
        ]
        if f1 is not None:
            f1s.append(f1)
    if f1s:
        part = f"mean of {len(f1s)} splits"
        lines.append(ScoreLine(part, "F1", sum(f1s) / len(f1s), "%", len(answers)))
    return lines


def says_yes(answer: str) -> bool:
    """Whatever does not say no in its first sentence says yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)

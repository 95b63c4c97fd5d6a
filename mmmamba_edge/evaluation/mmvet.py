"""MM-Vet: open questions that a language model judges elsewhere; here its answers file is made.

    FOLDER/mm-vet.json       id -> imagename, question, answer, capability
    FOLDER/images/v1_0.png   or --images

The judge (github.com/yuweihao/MM-Vet, mm-vet_evaluator.py, or its Hugging Face Space) takes a JSON
object {"v1_0": "answer", ...} with every id in it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from mmmamba_edge.evaluation.rows import read_records
from mmmamba_edge.evaluation.task import Sample, Task
from mmmamba_edge.whole import new_file

MAX_NEW_TOKENS = 1024


def load(data: Path, images: Path | None, suffix: str | None) -> Task:
    """Read the questions; see `load_task`."""
    folder = data / "images" if images is None else images
    samples = [
        Sample(
            id=id,
            image=row.picture("imagename", folder, row.text("imagename")),
            prompt=row.text("question") + (suffix or ""),
            max_new_tokens=MAX_NEW_TOKENS,
            where=row.where,
        )
        for id, row in read_records(data / "mm-vet.json").items()
    ]
    return Task("mmvet", tuple(samples), lambda answers: [], write_for_judge)


def write_for_judge(answers: Mapping[str, str], path: Path) -> None:
    """Write the file that the judge takes, whole or not at all."""
    with new_file(path) as part:
        part.write_text(json.dumps(answers, ensure_ascii=False, indent=4), encoding="utf-8")

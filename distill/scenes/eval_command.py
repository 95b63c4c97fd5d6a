"""The tasks scenes and easy-vqa of `mmmamba-edge eval`: a score by question type, beside chance.

Poses, shades, fonts and words are the test split's, none of which training saw. easy-vqa's official
test is the outside yardstick.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from mmmamba_edge.distill.scenes.art import Art, load_art
from mmmamba_edge.distill.scenes.evaluation import easy_vqa_test, iter_eval
from mmmamba_edge.distill.scenes.phrasing import Question
from mmmamba_edge.distill.scenes.questions import with_chance
from mmmamba_edge.distill.scenes.score import Sample, format_table, score
from mmmamba_edge.evaluation.asking import open_model
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.session import Session
from mmmamba_edge.status import StatusLine

ANSWER_TOKENS = 48  # the longest caption takes about 40


def run(args: argparse.Namespace) -> int:
    """The verb, for these tasks."""
    art = load_art(args.data or Path("cache/art"))
    if args.task == "scenes":
        samples = iter_eval(args.split, args.limit or 1000, art)
    else:
        samples = easy_vqa_samples(art, args.limit)
    runner = open_model(args.model, args.runtime, args.threads, args.provider)
    began = time.perf_counter()
    table = score(answerer(runner), _shown(samples))
    seconds = time.perf_counter() - began
    if args.json:
        rows = {name: asdict(row) for name, row in table.items()}
        print(json.dumps({"task": args.task, "seconds": round(seconds, 1), "scores": rows}))
    else:
        print(format_table(table))
    return 0


def answerer(runner: Runner) -> Callable[[np.ndarray, str], str]:
    """answer(picture (height, width, 3) uint8, question): greedy, each in a fresh conversation."""
    seen = PrefixCache()  # the questions about one picture read it once

    def answer(image: np.ndarray, question: str) -> str:
        session = Session(runner, prefix_cache=seen)
        pieces = session.ask(question, [Image.fromarray(image)], max_new_tokens=ANSWER_TOKENS)
        return "".join(pieces)

    return answer


def easy_vqa_samples(art: Art, limit: int | None) -> Iterator[Sample]:
    """The official test's first `limit` questions, each a sample of its own."""
    asked = [
        Question("easy-vqa", "easy-vqa", question, answer)
        for _, question, answer in islice(easy_vqa_test(art), limit)
    ]
    known = with_chance(asked)
    for (image, _, _), question in zip(easy_vqa_test(art), known, strict=False):
        yield image, [question]


def _shown(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The samples, with a line of progress on stderr."""
    status = StatusLine()
    for count, sample in enumerate(samples, start=1):
        yield sample
        status("pictures", more=str(count))
    status.close()

"""`mmmamba-edge eval`: a model's score on new scenes, by question type, beside chance.

Poses, shades, fonts and words are the test split's, none of which training saw. easy-vqa's official
test is the outside yardstick.
"""

import argparse
import json
import sys
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
from mmmamba_edge.errors import UserError
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.session import Session

TASKS = ("scenes", "easy-vqa")
ANSWER_TOKENS = 48  # the longest caption takes about 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("model", metavar="BUNDLE|CHECKPOINT", type=Path, help="what to score")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("cache/art"),
        help="art folder made by `python -m mmmamba_edge.distill.scenes.art` (default cache/art)",
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="of scenes")
    parser.add_argument("--limit", type=int, help="pictures (scenes) or questions (easy-vqa)")
    parser.add_argument("--runtime", default="auto", help="auto, onnxruntime, torch (a checkpoint)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = "example: mmmamba-edge eval build/default --task scenes --limit 500"


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected a whole number above 0")
    art = load_art(args.data)
    if args.task == "scenes":
        samples = iter_eval(args.split, args.limit or 1000, art)
    else:
        samples = easy_vqa_samples(art, args.limit)
    runner = open_bundle(args.model, args.runtime, args.threads)
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
    began = time.perf_counter()
    for count, sample in enumerate(samples, start=1):
        yield sample
        if count % 20 == 0 and sys.stderr.isatty():
            rate = count / (time.perf_counter() - began)
            print(f"\r{count} pictures  {rate:.1f}/s ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)

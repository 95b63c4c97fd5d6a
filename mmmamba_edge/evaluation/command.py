"""`mmmamba-edge eval`: a model's score on a public benchmark, or on new scenes."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmmamba_edge import terminal
from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.answers_file import AnswersFile, Given
from mmmamba_edge.evaluation.asking import ask, open_model, tile_limit, what_is_asked
from mmmamba_edge.evaluation.task import TASKS, Task, format_lines, load_task
from mmmamba_edge.runtimes import RUNTIME_NAMES
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.status import StatusLine

SCENES = ("scenes", "easy-vqa")  # what training without files from elsewhere is measured with


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("model", metavar="BUNDLE|CHECKPOINT", type=Path, help="what to score")
    add("--task", choices=(*SCENES, *TASKS), required=True,
        help="; ".join(f"{name}: {what}" for name, (_, what) in TASKS.items())
        + "; scenes, easy-vqa: the embedded model's own")
    add("--data", type=Path, metavar="FOLDER",
        help="the benchmark's files (docs/evaluation.md); for scenes and easy-vqa the art folder "
        "made by `python -m mmmamba_edge.distill.scenes.art` (default: cache/art)")
    add("--images", type=Path, metavar="FOLDER",
        help="its pictures (default: where the published archives put them under --data)")
    add("--limit", type=int, metavar="N",
        help="only the first N questions of each split or subtask; of scenes, pictures")
    add("--out", type=Path, metavar="FILE",
        help="keep the answers here (JSONL) as they are made, and go on from those that are there")
    add("--suffix", metavar="TEXT",
        help="what follows each question instead of the benchmark's usual words; '': nothing")
    add("--max-tiles", type=int, metavar="N",
        help="tiles of a picture at most (default: 6, or fewer if the model was made for fewer)")
    add("--split", choices=("val", "test"), default="test", help="of scenes (default: %(default)s)")
    add("--runtime", default="auto", choices=RUNTIME_NAMES)
    add("--provider", default="cpu", metavar="NAME", help="where it runs: cpu (default), cuda, ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)")
    add("--json", action="store_true", help="print one JSON object")
    parser.epilog = (
        "example: mmmamba-edge eval build/linear-int4 --task pope --data data/pope "
        "--out linear-pope.jsonl"
    )
# fmt: on


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected a whole number above 0")
    if args.task in SCENES:
        for flag in ("images", "out", "suffix", "max_tiles"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')}: not for --task {args.task}")
        # Here and not above: the core does without the training side.
        from mmmamba_edge.distill.scenes import eval_command

        return eval_command.run(args)
    task = _open_task(args)
    runner = open_model(args.model, args.runtime, args.threads, args.provider)
    began = time.perf_counter()
    asked, given = _answers(args, task, runner)
    texts = {id: one.answer for id, one in given.items()}
    lines = task.score(texts)
    cut = sum(one.end != "stop" for one in given.values())
    judge_file = None
    if task.write_for_judge is not None:
        judge_file = args.out.with_suffix(".json")
        task.write_for_judge(texts, judge_file)
        terminal.say(f"{judge_file}: {len(texts)} answers for the judge; no score is made here")
    if args.json:
        report = {
            **asked,
            "answers": len(given),
            "cut": cut,
            "seconds": round(time.perf_counter() - began, 1),
            "scores": [asdict(line) for line in lines],
            "judge_file": judge_file and str(judge_file),
        }
        print(json.dumps(report))
    elif lines:
        print(format_lines(lines))
    if cut:
        terminal.say(f"{cut} of {len(given)} answers ran into their limit of tokens")
    return 0


def _open_task(args: argparse.Namespace) -> Task:
    if args.data is None:
        raise UserError(
            f"--task {args.task} needs --data, the folder of its files (docs/evaluation.md)"
        )
    task = load_task(args.task, args.data, args.images, suffix=args.suffix)
    if task.write_for_judge is not None and (args.out is None or args.out.suffix == ".json"):
        raise UserError(
            f"--task {args.task} needs --out NAME.jsonl; the judge's file will be NAME.json"
        )
    return task


def _answers(
    args: argparse.Namespace, task: Task, runner: Runner
) -> tuple[dict[str, Any], dict[str, Given]]:
    """What was asked, and the answers, in the order of the samples."""
    tiles = tile_limit(runner, args.max_tiles)
    asked = what_is_asked(task, args.suffix, args.model, runner, tiles)
    ids = frozenset(sample.id for sample in task.samples)
    if args.limit is not None:
        task = task.first(args.limit)
    with AnswersFile(args.out, asked, ids) as answers:
        there = sum(sample.id in answers.given for sample in task.samples)
        if there:
            terminal.say(f"{args.out}: {there} of {len(task.samples)} answers are there")
        status = StatusLine(every=60.0)
        try:
            ask(task, runner, answers, max_tiles=tiles, report=status)
        except KeyboardInterrupt:
            if args.out is not None:
                count = len(answers.given)
                status.note(f"{args.out}: answers kept so far: {count}; the same command goes on")
            raise
        finally:
            status.close()
    return asked, {sample.id: answers.given[sample.id] for sample in task.samples}

"""The paper's tables in small: one teacher, many students, what each answers rightly.

    python -m mmmamba_edge.distill.scenes.reproduce distill/recipes/scenes-table.toml \
        --art cache/art --tokenizer cache/tokenizer.json --out runs/table

    OUT/train, OUT/val        rendered scenes
    OUT/teacher/checkpoint    the all-attention teacher, trained from scratch
    OUT/stages/KEY            a stage of some student; variants that begin alike share it
    OUT/scores/KEY.json       what a model answers
    OUT/results.json, table.md, *.png

A killed table goes on where it was; every stage resumes by itself. Several processes may fill one
table at a time, each with `--only` rows of its own: a stage that two of them need is trained once.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmmamba_edge.distill import pretrain, stage1, stage2, stage3
from mmmamba_edge.distill.distill_recipe import Recipe
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.distill.logit_matching import LogitMatching
from mmmamba_edge.distill.recipe import read_recipe
from mmmamba_edge.distill.run import Run, open_run
from mmmamba_edge.distill.scenes.art import load_art
from mmmamba_edge.distill.scenes.batch_answer import batch_answerer
from mmmamba_edge.distill.scenes.dataset import write_cache
from mmmamba_edge.distill.scenes.eval_command import easy_vqa_samples
from mmmamba_edge.distill.scenes.evaluation import iter_eval
from mmmamba_edge.distill.scenes.reproduce_report import write_report
from mmmamba_edge.distill.scenes.rows import Spec
from mmmamba_edge.distill.scenes.score import Sample, score_batch
from mmmamba_edge.distill.scenes.table_plan import Plan, Row, read_plan
from mmmamba_edge.distill.scenes.vocabulary import Split
from mmmamba_edge.distill.student import assemble
from mmmamba_edge.distill.training import mean_loss
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint, load_model, open_checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.mixer import Mamba2Mixer
from mmmamba_edge.tokenizer import load_tokenizer
from mmmamba_edge.whole import new_file

try:
    import fcntl
except ModuleNotFoundError:  # Windows: one process at a time
    fcntl = None

STAGES = {1: stage1.run_stage, 2: stage2.run_stage, 3: stage3.run_stage}
VALIDATION_STEPS = 4  # batches of held-out scenes that the distance from the teacher is taken over


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.scenes.reproduce",
        description="Train a teacher and the students of a plan, and print their table.",
        epilog="example: python -m mmmamba_edge.distill.scenes.reproduce "
        "distill/recipes/scenes-table.toml --art cache/art --tokenizer cache/tokenizer.json "
        "--out runs/table",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.toml")
    parser.add_argument("--art", type=Path, required=True, help="folder made by scenes.art")
    parser.add_argument("--tokenizer", type=Path, required=True, help="made by scenes.tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="goes on with what is there")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=2, help="processes that render scenes")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows of the plan")
    parser.add_argument("--minutes", type=float, help="start no further student after so long")
    args = parser.parse_args(argv)
    try:
        plan = read_plan(args.plan)
        if unknown := sorted(set(args.only or ()) - {row.name for row in plan.rows}):
            raise UserError(f"--only {unknown[0]}: the plan has no such row")
        table = Table(plan, args.art, args.tokenizer, args.out, args.device)
        table.prepare(args.workers)
        table.fill(args.only, args.minutes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


class Table:
    """A plan being carried out in a folder."""

    def __init__(
        self, plan: Plan, art: Path, tokenizer: Path, out: Path, device: str | None
    ) -> None:
        self.plan, self.art, self.tokenizer, self.out = plan, art, tokenizer, out
        self.teacher = out / "teacher" / "checkpoint"
        self.engine = Engine(device)

    def prepare(self, workers: int) -> None:
        """Scenes and teacher, as far as they are not there."""
        scenes, digest = self.plan.scenes, hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()
        sizes = (scenes.ramp, scenes.length, scenes.image_tokens, digest)

        def render(split: Split, level: int | None, count: int) -> None:
            spec = Spec(split, 0, level, *sizes)
            write_cache(
                spec, self.art, self.tokenizer, self.out / split, count=count, workers=workers
            )

        render("val", 2 if scenes.level is None else scenes.level, scenes.val)
        # The teacher begins with the first scenes while the others are drawn.
        with ThreadPoolExecutor(1) as beside:
            drawn = beside.submit(render, "train", scenes.level, scenes.count)
            self._train_teacher()
            drawn.result()

    def _train_teacher(self) -> None:
        scenes = self.plan.scenes
        asked = self.plan.teacher
        config, data, train = read_recipe(asked.recipe)
        if self.teacher.is_dir():
            found = open_checkpoint(self.teacher).config
            if found != config:
                raise UserError(
                    f"{self.teacher}: another recipe's teacher than {asked.recipe}; choose another "
                    "--out"
                )
            return
        if config.variant != "teacher":
            raise UserError(f"{asked.recipe}: attention_layers must name every layer of a teacher")
        pretrain.run(
            config, replace(data, scenes=scenes.count), train, self.out / "train",
            self.out / "teacher", self.engine.device.type, compile_layers=asked.compile,
            tokenizer=self.tokenizer, val=self.out / "val", minutes=asked.minutes,
        )  # fmt: skip

    def fill(self, only: list[str] | None, minutes: float | None) -> None:
        """Train and score what is missing; the report is written anew after every student."""
        began = time.perf_counter()
        score = Scores(self)
        teacher = {"row": "teacher", "group": "main", "seed": 0, **score.teacher()}
        students = [(row, seed) for row in self.plan.rows for seed in row.seeds]
        results = [teacher]
        for row, seed in students:
            late = minutes is not None and time.perf_counter() - began > 60 * minutes
            wanted = only is None or row.name in only
            results += self._student(score, row, seed, train=wanted and not late)
            self._report(results)
        # Once more: other processes may have trained students that were passed over above.
        results = [teacher]
        for row, seed in students:
            results += self._student(score, row, seed, train=False)
        self._report(results)

    def _student(self, score: "Scores", row: Row, seed: int, *, train: bool) -> list[dict]:
        """A line of results; none where it would have to be trained and must not."""
        recipe = self.plan.recipe(row, seed, self.teacher, self.out / "train", self.out / "val")
        run = self.run(recipe)
        if not (train or score.known(run)):
            return []
        line = {"row": row.name, "group": row.group, "seed": seed}
        folders = [str(run.folder(n).relative_to(self.out)) for n in recipe.stages]
        return [{**line, "stages": folders, **score.student(run)}]

    def run(self, recipe: Recipe) -> "SharedRun":
        """A run that shares the stages of runs that begin alike."""
        self.engine.bf16 = recipe.engine.bf16
        run = open_run(recipe, self.engine, self.out, resume=True)
        return SharedRun(**run.__dict__)

    def _report(self, results: list[dict[str, Any]]) -> None:
        with new_file(self.out / "results.json") as part:
            part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_report(self.plan, results, self.out)


@dataclass
class SharedRun(Run):
    """Stages in folders named by all that they depend on."""

    def folder(self, number: int) -> Path:
        """As in `Run`, for all runs that agree on the stages up to this one."""
        return self.out / "stages" / self.key(number)

    def facts(self, number: int) -> dict[str, Any]:
        """As in `Run`, with the teacher's weights in place of its folder."""
        facts = super().facts(number)
        data = {key: value for key, value in facts["data"].items() if key != "folder"}
        return {**facts, "teacher": self.teacher_id, "data": data, "validation": None}

    @cached_property
    def teacher_id(self) -> str:
        """SHA-256 over the teacher's weights; every key asks for it."""
        return self.file.weights_id()

    def key(self, number: int) -> str:
        """The folder's name: stage number and a digest of its facts."""
        text = json.dumps(self.facts(number), sort_keys=True)
        return f"{number}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def trained(self) -> Checkpoint | None:
        """The last stage's student; None where there are no stages."""
        start = None
        for number in self.recipe.stages:
            with self._alone(number):
                start = self.finished(number) or STAGES[number](self, start)
        return start

    @contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        """While no other process trains this stage; the lock goes with a killed process."""
        folder = self.folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Scores:
    """What models answer, kept in files."""

    def __init__(self, table: Table) -> None:
        self.table, plan = table, table.plan
        art = load_art(table.art)
        self.tokenizer = load_tokenizer(table.tokenizer.parent)
        self.samples: list[Sample] = list(iter_eval("test", plan.score.pictures, art))
        self.outside: list[Sample] = []
        if plan.score.easy_vqa:
            self.outside = list(islice(easy_vqa_samples(art, None), plan.score.easy_vqa))

    def teacher(self) -> dict[str, Any]:
        """The teacher's own scores."""
        file = open_checkpoint(self.table.teacher)
        name = self._name(["teacher", file.weights_id()])
        model = load_model(file, self.table.engine.device, torch.float32)
        return self._kept(name, lambda: {"kl": 0.0, **self._asked(model)})

    def student(self, run: SharedRun) -> dict[str, Any]:
        """Those of a student; trained first, unless its scores are there already."""

        def measure() -> dict[str, Any]:
            file = run.trained()
            layers = sorted(set(range(len(run.teacher.layers))) - run.kept)
            if file is not None:  # after stages 1 and 2 alone, layers to keep are the teacher's
                there = [i for i, kind in enumerate(file.config.layer_types) if kind == "mamba2"]
                layers = [i for i in layers if i in there]
            mixers = run.mixers(layers, file)
            model = assemble(run.teacher, mixers)
            distance = self._distance(run, mixers)
            # Answers are given in float32, as the teacher's are, whatever it was trained in.
            return {"kl": distance, **self._asked(model.float().eval())}

        return self._kept(self._name_of(run), measure)

    def known(self, run: SharedRun) -> bool:
        """Whether nothing is left to train: scores may outlive the weights they are of."""
        stages = run.recipe.stages
        there = (self.table.out / "scores" / f"{self._name_of(run)}.json").is_file()
        return there or not stages or run.finished(stages[-1]) is not None

    def _name_of(self, run: SharedRun) -> str:
        keys = [run.key(n) for n in run.recipe.stages]
        return self._name([run.teacher_id, str(run.recipe.student), *keys])

    def _name(self, facts: list[str]) -> str:
        """Of a file of scores, by all that they depend on."""
        text = "\n".join([*facts, str(self.table.plan.score)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _asked(self, model: MMMamba) -> dict[str, Any]:
        answer, batch = batch_answerer(model, self.tokenizer), self.table.plan.score.batch
        scores = score_batch(answer, self.samples, batch=batch)
        if self.outside:
            scores["easy-vqa"] = score_batch(answer, self.outside, batch=batch)["all"]
        return {"scores": {name: asdict(line) for name, line in scores.items()}}

    def _distance(self, run: SharedRun, mixers: dict[int, Mamba2Mixer]) -> float:
        """Mean KL from the teacher per token of held-out scenes, in nats."""
        stage = LogitMatching(run.teacher, mixers, run.engine)
        assert run.validation is not None
        rows = min(64, self.table.plan.scenes.val)
        share = run.engine.share(rows, rows)
        return mean_loss(stage, run.validation, run.engine, share, VALIDATION_STEPS)

    def _kept(self, name: str, measure) -> dict[str, Any]:
        path = self.table.out / "scores" / f"{name}.json"
        if not path.is_file():
            began = time.perf_counter()
            found = measure()
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as part:
                part.write_text(json.dumps(found) + "\n", encoding="utf-8")
            right = found["scores"]["all"]["accuracy"]
            print(f"{name}: {right:.1%} right, scored in {time.perf_counter() - began:.0f} s",
                  file=sys.stderr)  # fmt: skip
        return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())

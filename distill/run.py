"""A distillation run: what all its stages share, and the folders it leaves.

OUT/stage1/recipe.json            what the stage was asked for; a resumed run must agree
OUT/stage1/progress.safetensors   the running stage's weights, optimiser, data position
OUT/stage1/metrics.jsonl, tensorboard/
OUT/stage1/checkpoint/            the finished stage: a whole student, training layout
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_edge.distill.batches import Source
from mmmamba_edge.distill.conversation_source import ConversationSource
from mmmamba_edge.distill.distill_recipe import (
    ConversationsConfig,
    DataConfig,
    Recipe,
    TextConfig,
)
from mmmamba_edge.distill.engine import Engine, whole
from mmmamba_edge.distill.scene_source import SceneSource
from mmmamba_edge.distill.scenes.dataset import SceneCache
from mmmamba_edge.distill.seed import Seeding
from mmmamba_edge.distill.student import (
    attention_layers,
    freeze,
    loaded_mixers,
    seeded_mixers,
    student_tensors,
)
from mmmamba_edge.distill.text_source import TextSource, open_tokens
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint, load_model, open_checkpoint, save_checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.mixer import Mamba2Mixer
from mmmamba_edge.tokenizer import load_tokenizer, tokenizer_files
from mmmamba_edge.whole import new_file


@dataclass
class Run:
    """What stages are run with.

    Attributes:
        recipe: all that was asked for.
        engine: device and processes.
        file: the teacher's checkpoint, open.
        teacher: the model, frozen, on the device.
        source, validation: training rows, and held-out ones.
        out: the run's folder.
        resume: whether begun stages go on.
        init: a student that the first stage starts from; None: its mixers are seeded.
    """

    recipe: Recipe
    engine: Engine
    file: Checkpoint
    teacher: MMMamba
    source: Source
    validation: Source | None
    out: Path
    resume: bool
    init: Checkpoint | None = None

    def folder(self, number: int) -> Path:
        """Where a stage's files go."""
        return self.out / f"stage{number}"

    @property
    def kept(self) -> set[int]:
        """Layers that stay attention in the student."""
        return attention_layers(self.recipe.student.attention_layers, len(self.teacher.layers))

    def mixers(self, layers: Iterable[int], start: Checkpoint | None) -> dict[int, Mamba2Mixer]:
        """Mixers to train: from a finished stage's checkpoint, from `init`, or freshly seeded."""
        start = start or self.init
        if start is not None:
            return loaded_mixers(start, layers, self.engine.device)
        asked = self.recipe.student
        seeding = Seeding(asked.seed, asked.inherit, asked.mimic)
        return seeded_mixers(self.file, layers, seeding, self.engine.device)

    def facts(self, number: int) -> dict[str, Any]:
        """What a stage depends on, itself and those before it: who goes on must agree with it."""
        recipe = self.recipe.facts()
        done = [n for n in self.recipe.stages if n <= number]
        student = dict(recipe["student"])
        if number != 3 and all(getattr(self.recipe.stage(n), "layers", "") == "all" for n in done):
            del student["attention_layers"]  # all are converted, whatever stays attention later
        return {
            "init": None if self.init is None else self.init.weights_id(),
            "teacher": str(self.recipe.teacher.resolve()), "student": student,
            **{key: recipe[key] for key in ("data", "validation", "engine")},
            **{f"stage{n}": recipe[f"stage{n}"] for n in done},
        }  # fmt: skip

    def begin(self, number: int) -> Path:
        """The stage's folder, checked against what it holds already; left-overs of a kill go."""
        folder = self.folder(number)
        self.check(number)
        self.engine.wait()  # all have looked before one of them writes
        if self.engine.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for left in (*folder.glob(".checkpoint.*"), *folder.glob(".mmmamba-*.tmp")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            with new_file(folder / "recipe.json") as part:
                text = json.dumps(self.facts(number), indent=1) + "\n"
                part.write_text(text, encoding="utf-8")
        self.engine.wait()
        return folder

    def check(self, number: int) -> None:
        """UserError where the stage's folder holds a run of another recipe, or one not resumed."""
        note = self.folder(number) / "recipe.json"
        if note.is_file():
            _agree(note, self.facts(number), self.resume)

    def finished(self, number: int) -> Checkpoint | None:
        """The checkpoint of a stage that is through, if it is."""
        folder = self.folder(number) / "checkpoint"
        return open_checkpoint(folder) if folder.is_dir() else None

    def finish(self, number: int, mixers: Mapping[int, Mamba2Mixer]) -> Checkpoint:
        """Write the stage's student: every tensor of every mixer, whether it learnt or not.

        Between stages mixers are kept in float32, else a stage would begin from rounded weights.
        """
        folder = self.folder(number) / "checkpoint"
        last = number == self.recipe.stages[-1]
        total = len(self.teacher.layers)
        config = self.file.config.with_attention_layers(set(range(total)) - set(mixers))
        shared = {id(p) for p in self.teacher.parameters()}
        tensors: dict[int, dict[str, Tensor]] = {
            layer: {
                name: whole(p.detach()).cpu()
                for name, p in mixer.named_parameters()
                if id(p) not in shared
            }
            for layer, mixer in mixers.items()
        }
        if self.engine.is_main:
            save_checkpoint(
                folder, config, lambda name: student_tensors(self.file, config, tensors, name),
                dtype=getattr(torch, self.recipe.dtype) if last else None,
                extra_files=tokenizer_files(self.file.folder),
            )  # fmt: skip
            print(f"wrote {folder}", file=sys.stderr)
        self.engine.wait()
        return open_checkpoint(folder)


def open_run(
    recipe: Recipe, engine: Engine, out: Path, *, resume: bool, init: Path | None = None
) -> Run:
    """Open teacher and data; `init` is the checkpoint folder of a student to start from.

    Raises:
        UserError: whatever is wrong with either, before anything is written.
    """
    file = open_checkpoint(recipe.teacher)
    if file.config.variant != "teacher":
        raise UserError(
            f"{recipe.teacher}: a {file.config.variant} model; distillation needs a teacher, whose "
            "layers are all attention"
        )
    if file.config.pixel_shuffle_loc != "pre":
        raise UserError(f"{recipe.teacher}: pixel_shuffle_loc 'post' (HoVLE-HD) is not distilled")
    attention_layers(recipe.student.attention_layers, len(file.config.layer_types))
    _held_out(recipe)
    _recordable(recipe, engine)
    begin = None if init is None else open_init(init, file)
    source = open_source(recipe.data, file, out / "index")
    validation = None
    if recipe.validation is not None:
        validation = open_source(recipe.validation, file, out / "index")
    dtype = torch.bfloat16 if recipe.engine.bf16 else torch.float32
    bits = recipe.engine.teacher_bits
    teacher = load_model(file, "cpu" if bits < 16 else engine.device, dtype)
    freeze(teacher)
    if bits < 16:
        from mmmamba_edge.model.bnb_layers import quantize_layers

        quantize_layers(teacher, bits)
        teacher.to(engine.device)
    return Run(recipe, engine, file, teacher, source, validation, out, resume, begin)


def open_init(folder: Path, teacher: Checkpoint) -> Checkpoint:
    """A student's checkpoint to start from; UserError where it is not one of this teacher."""
    student = open_checkpoint(folder)
    layers = set(range(len(teacher.config.layer_types)))
    attention = {i for i, kind in enumerate(student.config.layer_types) if kind == "attention"}
    if student.config.with_attention_layers(layers) != teacher.config:
        raise UserError(f"--init {folder}: its config.json is no student's of this teacher")
    if attention == layers:
        raise UserError(f"--init {folder}: a teacher; expected a student, whose mixers go on")
    return student


def open_source(config: DataConfig, teacher: Checkpoint, index: Path) -> Source:
    """The rows of a [data] table."""
    if isinstance(config, TextConfig):
        tokens = open_tokens(config.folder, config.split, teacher.config.vocab_size)
        return TextSource(tokens, config.length, config.seed)
    answers_only = config.positions == "answers"
    if not isinstance(config, ConversationsConfig):
        cache = SceneCache(config.folder)
        return SceneSource(cache, config.count, config.seed, answers_only=answers_only)
    return ConversationSource(
        config.meta, load_tokenizer(teacher.folder), teacher.config, index,
        seed=config.seed, max_length=config.max_length, max_tiles=config.max_tiles,
        positions=config.positions, window=config.window, threads=config.threads,
    )  # fmt: skip


def _recordable(recipe: Recipe, engine: Engine) -> None:
    if not recipe.engine.cuda_graph:
        return
    if engine.device.type != "cuda" or engine.world > 1:
        raise UserError(
            "[engine] cuda_graph: one process on a CUDA device can record its steps; here are "
            f"{engine.world} on {engine.device.type}. Leave it out"
        )
    if 3 in recipe.stages and recipe.stage3.topk:
        raise UserError(
            "[engine] cuda_graph: the teacher's answers of [stage3] topk come from the disk, which "
            "no graph reads; set one of the two"
        )


def _held_out(recipe: Recipe) -> None:
    """Validation on training rows is none (the original's fault, spec 9.17)."""
    train, held = recipe.data, recipe.validation
    if held is None:
        return
    places = [_place(config).resolve() for config in (train, held)]
    if places[0] == places[1]:
        raise UserError(f"[validation]: {_place(held)} is the training data; hold other rows out")


def _place(config: DataConfig) -> Path:
    if isinstance(config, TextConfig):
        return config.folder / config.split
    return config.meta if isinstance(config, ConversationsConfig) else config.folder


def _agree(note: Path, facts: dict, resume: bool) -> None:
    if not resume:
        raise UserError(
            f"{note.parent}: a run is there; --resume goes on with it, or choose another --out"
        )
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{note}: not readable ({error}); choose another --out") from error
    for key, value in facts.items():
        if found.get(key) != value:
            was, now = _difference(found.get(key), value)
            raise UserError(
                f"{note}: the run there has {key} {was}, the recipe {now}; go on with its own "
                "recipe or choose another --out"
            )


def _difference(was: object, now: object) -> tuple[str, str]:
    """Only what differs of two tables."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return str(was), str(now)
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return tuple(", ".join(f"{key} = {side.get(key)}" for key in keys) for side in (was, now))  # pyright: ignore

"""Putting a benchmark's questions to a model: greedy, each in a conversation of its own."""

import hashlib
from pathlib import Path
from typing import Any

from mmmamba_edge.bundle import MANIFEST, file_sha256
from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.answers_file import AnswersFile, Given
from mmmamba_edge.evaluation.task import Task
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.session import Session
from mmmamba_edge.status import Report, silent

MAX_TILES = 6  # of a picture, as in the evaluations behind mmMamba's published figures


def open_model(
    path: Path, runtime: str = "auto", threads: int | None = None, provider: str = "cpu"
) -> Runner:
    """`open_bundle`, for checkpoint folders too: runtime "auto" opens those in PyTorch."""
    is_checkpoint = (path / "config.json").is_file() and not (path / MANIFEST).is_file()
    if runtime == "auto" and is_checkpoint:
        runtime = "torch"
    return open_bundle(path, runtime, threads, provider)


def tile_limit(runner: Runner, asked: int | None) -> int:
    """Tiles of a picture at most: as asked for, else 6 or what the model was made for."""
    most, least = runner.config.max_dynamic_patch, runner.config.min_dynamic_patch
    limit = max(least, min(MAX_TILES, most)) if asked is None else asked
    if limit < least:
        raise UserError(f"--max-tiles {limit}: this model takes {least} at least")
    return limit


def what_is_asked(
    task: Task, suffix: str | None, model: Path, runner: Runner, max_tiles: int
) -> dict[str, Any]:
    """All that answers depend on: the first line of an answers file."""
    return {
        "task": task.name,
        "suffix": suffix,
        "questions": task.fingerprint(),
        "model_id": runner.model_id,
        "quant": runner.quant,
        "runtime": type(runner).__name__.removesuffix("Runner").lower(),
        "bundle": _bundle_sha256(model),
        "template": runner.config.template,
        "max_tiles": max_tiles,
    }


def ask(
    task: Task, runner: Runner, answers: AnswersFile, *, max_tiles: int,
    report: Report = silent,
) -> None:  # fmt: skip
    """Ask what `answers` lacks.

    Args:
        task: the questions.
        runner: the model.
        answers: where the answers go.
        max_tiles: of a picture.
        report: told how many of the answers there are, after each.

    Raises:
        UserError: a picture or question that cannot be read; it names the file and row.
    """
    seen = PrefixCache()  # several questions about one picture read it once
    done = sum(sample.id in answers.given for sample in task.samples)
    report("answers", done, len(task.samples))
    for sample in task.samples:
        if sample.id in answers.given:
            continue
        session = Session(runner, prefix_cache=seen)
        try:
            answer = session.ask(
                sample.prompt,
                [sample.image],
                max_new_tokens=sample.max_new_tokens,
                max_tiles=max_tiles,
            )
            text = "".join(answer).strip()
        except UserError as error:
            raise UserError(f"{sample.where}: {error}") from error
        answers.add(sample.id, Given(text, str(answer.reason)))
        done += 1
        report("answers", done, len(task.samples))


def _bundle_sha256(model: Path) -> str | None:
    """Of the manifest, which has every file's; None: a checkpoint, whose model_id says it all."""
    if model.is_file():
        return file_sha256(model)
    manifest = model / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None

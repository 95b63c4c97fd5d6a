"""Train a small model on the scenes task: `python -m mmmamba_edge.distill.pretrain`.

From scratch, or on from a checkpoint's weights (`--init`), with optimisers as at the start. The
recipe (TOML) fixes the rest: sizes, data, schedule, seed. Which scenes a step sees depends on
(seed, step) alone, so a killed run that resumes goes on exactly where it was.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmmamba_edge.config import Config
from mmmamba_edge.distill.batches import normalised
from mmmamba_edge.distill.cuda_graph import graphed
from mmmamba_edge.distill.perception import PerceptionHeads
from mmmamba_edge.distill.progress import load_progress, save_progress
from mmmamba_edge.distill.recipe import DataConfig, TrainConfig, read_recipe
from mmmamba_edge.distill.scenes.dataset import SceneCache
from mmmamba_edge.distill.schedule import wsd
from mmmamba_edge.distill.scratch import from_scratch, make_optimizers
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import open_checkpoint, save_model
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.mixer import look_up_kernels
from mmmamba_edge.status import StatusLine


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.pretrain",
        description="Train a small mmMamba, from scratch or a checkpoint, on rendered scenes.",
        epilog="example: python -m mmmamba_edge.distill.pretrain distill/recipes/default.toml "
        "--scenes cache/scenes --out runs/default",
    )
    parser.add_argument("recipe", type=Path, help="TOML file with [model], [data] and [train]")
    parser.add_argument("--scenes", type=Path, required=True, help="folder of rendered scenes")
    parser.add_argument("--val", type=Path, help="folder of validation scenes, scored at each save")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to put beside the weights")
    parser.add_argument(
        "--out", type=Path, required=True, help="run folder; resumes if it holds a run"
    )
    parser.add_argument("--init", type=Path, help="checkpoint whose weights to begin with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="override [train] steps")
    parser.add_argument("--batch", type=int, help="override [train] batch")
    parser.add_argument(
        "--minutes", type=float, help="end by then: fewer steps, the decay in the last 35 % of them"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers (CUDA)")
    args = parser.parse_args(argv)
    try:
        config, data, train = read_recipe(args.recipe, steps=args.steps, batch=args.batch)
        run(
            config, data, train, args.scenes, args.out, args.device,
            compile_layers=args.compile, tokenizer=args.tokenizer, val=args.val,
            minutes=args.minutes, init=args.init,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    config: Config, data: DataConfig, train: TrainConfig, scenes: Path, out: Path, device: str,
    *, compile_layers: bool = False, tokenizer: Path | None = None, val: Path | None = None,
    minutes: float | None = None, init: Path | None = None,
) -> Path:  # fmt: skip
    """Train to the end of the schedule, resuming from `out` if it holds a run.

    Args:
        config: of the model.
        data: how many scenes are drawn from.
        train: the schedule.
        scenes: folder of rendered scenes, which may still be growing.
        out: the run's folder.
        device: "cuda" or "cpu".
        compile_layers: with torch.compile.
        tokenizer: file to put beside the weights.
        val: folder of scenes to score at each save.
        minutes: end by then, counted from now.
        init: checkpoint to begin with, of this very `config`; None: random weights. A run that is
            resumed goes on from its own.

    Returns:
        The folder of the finished checkpoint, `out/checkpoint` (training layout, bfloat16).

    Raises:
        UserError: no scenes, another model's checkpoint, or the loss is no number.
    """
    if val is not None and not len(SceneCache(val)):
        raise UserError(f"{val}: no scenes; render some with scenes.dataset --split val")
    deadline = math.inf if minutes is None else time.perf_counter() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(train.seed)
    model = from_scratch(config)
    if init is not None and not (out / "progress.safetensors").is_file():
        load_weights(model, init)
    objective = Objective(model, train).to(device)
    heads = objective.heads.parameters()
    optimizers = make_optimizers(model, train.lr, train.weight_decay, device, heads)
    parameters = dict(objective.named_parameters())
    start = load_progress(out / "progress.safetensors", parameters, optimizers).step
    if start:
        print(f"resuming {out} at step {start}", file=sys.stderr)
    if compile_layers:
        look_up_kernels()  # now: tracing through an import breaks graphs
        for layer in model.layers:
            layer.compile(dynamic=False)
    scene_cache = SceneCache(scenes)
    gradients = partial(loss_and_gradients, objective, train)
    if device == "cuda":
        scene_cache.wait_for(train.batch)
        example = rows_as_tensors(scene_cache, np.arange(train.batch), pin=False)
        gradients = graphed(gradients, to_device(example, device))
    feed, recipe, losses = Feed(scene_cache, data, train, start, device), train, []
    began, status = time.perf_counter(), StatusLine(every=0)
    tick = began
    with (out / "metrics.jsonl").open("a") as metrics:
        for step, batch in enumerate(feed, start) if start < train.steps else ():
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = train.lr * schedule(step, train)
            losses.append(gradients(**batch).clone())
            for optimizer in optimizers:
                optimizer.step()
            done = step + 1
            if done % train.log_every == 0 or done >= train.steps:
                mean = torch.stack(losses).mean().item()
                seconds = time.perf_counter() - tick
                rate, waited = len(losses) / seconds, feed.waited / seconds
                tick, feed.waited = time.perf_counter(), 0.0
                losses.clear()
                left = (deadline - tick) * (done - start) / (tick - began)
                train = shortened(recipe, train, done, left)
                if not math.isfinite(mean):
                    raise UserError(
                        f"loss is {mean} at step {done}; the last good state is "
                        f"{out / 'progress.safetensors'}; lower [train] lr and run again"
                    )
                row = {
                    "step": done, "loss": round(mean, 5), "steps_per_s": round(rate, 3),
                    "waited": round(waited, 3),  # share of the time spent waiting for scenes
                    "steps": train.steps, "decay": train.decay,
                }  # fmt: skip
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                status("step", done, train.steps, f"loss {mean:.4f}  {rate:.2f} steps/s")
            if done % train.save_every == 0 or done >= train.steps:
                save_progress(out / "progress.safetensors", parameters, optimizers, done)
                if val is not None:
                    score = validate(model, SceneCache(val), train.batch, device)
                    metrics.write(json.dumps({"step": done, "val_exact": round(score, 4)}) + "\n")
                    status.note(f"step {done}: {score:.1%} of validation answers exact")
            if done >= train.steps:
                break
    final = out / "checkpoint"
    if start < train.steps or not final.exists():
        shutil.rmtree(final, ignore_errors=True)  # of a shorter run; progress holds the weights
        save_model(model, final, dtype=torch.bfloat16, extra_files=[tokenizer] if tokenizer else [])
    status.close()
    print(f"wrote {final}", file=sys.stderr)
    return final


def load_weights(model: MMMamba, folder: Path) -> None:
    """Give a model a checkpoint's weights, in the model's dtype.

    Raises:
        UserError: not a checkpoint, or one of another model than the recipe's.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.config != model.config:
        ours, theirs = asdict(model.config), asdict(checkpoint.config)
        odd = next(key for key in ours if key != "hf" and ours[key] != theirs[key])
        raise UserError(
            f"{folder}: {odd} is {theirs[odd]}, the recipe's [model] makes it {ours[odd]}; "
            "begin with a checkpoint of the same model"
        )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(checkpoint.get(name))


def validate(model: MMMamba, scenes: SceneCache, batch: int, device: str) -> float:
    """`answer_accuracy` over the whole (small) cache."""
    scores = []
    with torch.compiler.set_stance("force_eager"):  # not worth compiling a second time
        for start in range(0, len(scenes), batch):
            picks = np.arange(start, min(start + batch, len(scenes)))
            row = to_device(rows_as_tensors(scenes, picks, pin=False), device)
            with torch.autocast(device, torch.bfloat16):
                score = answer_accuracy(model, row["images"], row["ids"], row["mask"])
                scores.append((score, len(picks)))
    return sum(score * n for score, n in scores) / sum(n for _, n in scores)


class Objective(nn.Module):
    """What training minimises: the answers' loss, and what image tokens are asked to see.

    Args:
        model: to train.
        train: how much perception counts, and at which layers.
    """

    def __init__(self, model: MMMamba, train: TrainConfig) -> None:
        super().__init__()
        self.model, self.train_config = model, train
        width = model.config.llm.hidden_size
        self.heads = PerceptionHeads(width, len(train.perception_layers))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, cells: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            images: (batch, 3, height, width) float, normalised.
            ids: (batch, seq) int64, right-padded.
            mask: (batch, seq) bool, True at answer tokens.
            cells: (batch, image tokens, 3) uint8, the labels of image tokens.
        """
        model, train = self.model, self.train_config
        final, taps = read_all(model, images, ids, train.perception_layers)
        loss = answer_loss(model, final, ids, mask)
        if train.perception:
            places = (ids == model.config.img_context_token_id).int()
            where = places.argsort(dim=1, descending=True, stable=True)[:, : cells.shape[1], None]
            seen = [x.gather(1, where.expand(-1, -1, x.shape[-1])).flatten(0, 1) for x in taps]
            loss = loss + train.perception * self.heads(seen, cells.flatten(0, 1))
        return loss


def loss_and_gradients(objective: Objective, train: TrainConfig, **batch: Tensor) -> Tensor:
    """The loss of one batch, its clipped gradients left in `.grad`; nothing waits for the device.

    Batch as in `Objective.forward`.
    """
    objective.zero_grad(set_to_none=True)
    device = batch["images"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=train.bf16):
        loss = objective(**batch)
    loss.backward()
    nn.utils.clip_grad_norm_(objective.parameters(), train.clip)
    return loss.detach()


def answer_loss(model: MMMamba, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the answer tokens, averaged over them; `hidden` is `read_all`'s."""
    hidden = hidden[:, :-1]
    mask, target = mask[:, 1:], ids[:, 1:]
    if hidden.is_cuda:  # a CUDA graph has fixed shapes: mask the loss, not what goes into the head
        hidden, target = hidden.flatten(0, 1), target.masked_fill(~mask, -100).flatten()
    else:
        hidden, target = hidden[mask], target[mask]
    logits = model.language_model.output(hidden).float()
    return F.cross_entropy(logits, target, ignore_index=-100)


@torch.inference_mode()
def answer_accuracy(model: MMMamba, images: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Share of answers whose every token is the most likely one, given the true words before it.

    For one answer that is whether greedy decoding would say it; arguments as in `Objective`.
    """
    best = model.language_model.output(read_all(model, images, ids)[0][:, :-1]).argmax(-1)
    mask = mask[:, 1:]
    wrong = (best != ids[:, 1:]) & mask
    starts = mask & ~F.pad(mask, (1, 0))[:, :-1]
    answer = (starts.cumsum(1) + 1000 * torch.arange(len(ids), device=ids.device)[:, None])[mask]
    missed = torch.unique(answer[wrong[mask]]).numel()
    return 1 - missed / max(int(starts.sum()), 1)


def read_all(
    model: MMMamba, images: Tensor, ids: Tensor, tapped: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """The decoder's normed output for every position, and what `tapped` numbers of layers give.

    All are (batch, seq, hidden). The same as in `MMMamba.forward`, with fixed shapes throughout (no
    boolean indexing), so that it compiles once; a row without image positions ignores its image.
    """
    vectors = model.image_vectors(images)
    assert vectors is not None
    vectors = vectors.unflatten(0, (len(images), -1))  # (batch, tokens_per_tile, hidden)
    places = ids == model.config.img_context_token_id
    order = (places.cumsum(1) - 1).clamp(min=0)
    spread = vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1]))
    text = model.embedding_model.llm_text_embeddings(ids)
    x = torch.where(places[..., None], spread, text)
    taps: list[Tensor] = []
    for i, layer in enumerate(model.layers):
        if i == len(model.embedding_model.encoder):
            x = model.normalize(x)
        x = layer(x, None)
        if i + 1 in tapped:
            taps.append(x)
    return model.language_model.model.norm(x), taps


def schedule(step: int, train: TrainConfig) -> float:
    """The factor on the learning rate: warm-up, stable, a straight decay to zero."""
    return wsd(step, steps=train.steps, warmup=train.warmup, decay=train.decay, shape="linear")


def shortened(recipe: TrainConfig, train: TrainConfig, done: int, left: float) -> TrainConfig:
    """The recipe's schedule cut to end in `left` more steps; once it decays it stays (`train`)."""
    if done > train.steps - train.decay:
        return train
    if done + left >= recipe.steps:
        return recipe
    steps = max(done + int(left), done + 1)
    return replace(recipe, steps=steps, decay=min(int(0.35 * steps), steps - done))


# --- data -------------------------------------------------------------------------------------


class Feed:
    """The batches of steps start, start + 1, ..., prepared by a thread while the device works.

    Step s draws from scenes 0..n, n growing with s until all [data] scenes are in use: they are
    ordered from easy to hard, and rendering may still be going on (the thread waits for it).

    Attributes:
        waited: seconds the training has waited for batches; set it to 0 to count anew.
    """

    def __init__(
        self, scenes: SceneCache, data: DataConfig, train: TrainConfig, start: int, device: str
    ) -> None:
        self.scenes, self.data, self.train, self.start = scenes, data, train, start
        self.device, self.waited = device, 0.0
        self._queue: Queue[dict[str, Tensor] | BaseException] = Queue(maxsize=4)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        Thread(target=self._fill, daemon=True).start()
        while True:
            began = time.perf_counter()
            row = self._queue.get()
            self.waited += time.perf_counter() - began
            if isinstance(row, BaseException):
                raise row
            yield to_device(row, self.device)

    def _fill(self) -> None:
        train = self.train
        try:
            for step in count(self.start):
                ready = max(train.batch * 16, train.batch * (step + 1) // self.data.reuse)
                upper = min(self.data.scenes, ready)
                self.scenes.wait_for(upper)
                picks = np.random.default_rng((train.seed, step)).integers(0, upper, train.batch)
                pin = self.device != "cpu"
                self._queue.put(rows_as_tensors(self.scenes, np.sort(picks), pin=pin))
        except BaseException as error:
            self._queue.put(error)


def rows_as_tensors(
    scenes: SceneCache, picks: NDArray[np.int64], *, pin: bool
) -> dict[str, Tensor]:
    """Rows of the scenes: images (batch, height, width, 3) uint8, ids and mask (batch, seq), cells
    (batch, image tokens, 3) uint8."""
    rows = scenes.rows(picks)
    row = {
        "images": torch.from_numpy(rows.images),
        "ids": torch.from_numpy(rows.ids.astype(np.int64)),
        "mask": torch.from_numpy(rows.mask.astype(bool)),
        "cells": torch.from_numpy(rows.cells),
    }
    return {key: value.pin_memory() for key, value in row.items()} if pin else row


def to_device(row: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """A batch on the device, its images normalised to (batch, 3, height, width) float32."""
    row = {key: value.to(device, non_blocking=True) for key, value in row.items()}
    row["images"] = normalised(row["images"].permute(0, 3, 1, 2))
    return row


if __name__ == "__main__":
    sys.exit(main())

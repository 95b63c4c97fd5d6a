"""Render the training set into shards, and read them: `SceneCache`.

    DIR/cache.json           what the shards hold; a resumed run must agree with it
    DIR/images-00000.npy     (n, 112, 112, 3) uint8
    DIR/talk-00000.npy       (n, 2, length) int16: token ids, and 1 where the loss counts
    DIR/cells-00000.npy      (n, image tokens, 3) uint8: what each image token shows (cells.py)
    DIR/flags-00000.npy      (n, 2) uint8: has a picture, is from easy-vqa

Scene i is in shard i // 8192. Everything follows from (seed, split, i); shards are written by any
number of processes, in any order, and a shard that exists is complete.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mmmamba_edge.distill.scenes.art import load_art
from mmmamba_edge.distill.scenes.cells import CLASSES
from mmmamba_edge.distill.scenes.evaluation import easy_vqa_test, iter_eval
from mmmamba_edge.distill.scenes.rows import Spec, make_row
from mmmamba_edge.distill.scenes.scene import SIZE
from mmmamba_edge.distill.scenes.tokenizer import load_tokenizer
from mmmamba_edge.distill.scenes.vocabulary import SPLITS
from mmmamba_edge.errors import UserError
from mmmamba_edge.status import StatusLine
from mmmamba_edge.whole import new_file

__all__ = ["SHARD", "SceneCache", "Spec", "easy_vqa_test", "iter_eval", "write_cache"]

SHARD = 8192
FORMAT = 2


# --- shards -------------------------------------------------------------------------------------


def _write_shard(spec: Spec, art: Path, tokenizer: Path, out: Path, shard: int, size: int) -> int:
    """Write one shard; returns its size. Runs in a worker process."""
    pictures, words = load_art(art), _tokenizer(tokenizer)
    images = np.zeros((size, SIZE, SIZE, 3), np.uint8)
    talk = np.zeros((size, 2, spec.length), np.int16)
    cells = np.zeros((size, spec.image_tokens, len(CLASSES)), np.uint8)
    flags = np.zeros((size, 2), np.uint8)
    for place in range(size):
        row = make_row(spec, pictures, words, shard * SHARD + place)
        images[place], talk[place] = row.image, (row.ids, row.mask)
        cells[place] = row.cells
        flags[place] = row.has_image, row.easy_vqa
    # The images come last: where they are, the rest is.
    for name, array in (
        ("flags", flags),
        ("cells", cells),
        ("talk", talk),
        ("images", images),
    ):
        with new_file(_shard_path(out, name, shard)) as part, part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    return size


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _shard_path(folder: Path, name: str, shard: int) -> Path:
    return folder / f"{name}-{shard:05d}.npy"


def _rows_of(path: Path) -> int:
    """Rows of a .npy file, from its header."""
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable shard ({error}); delete it") from error


def write_cache(
    spec: Spec, art: Path, tokenizer: Path, out: Path, *, count: int, start: int = 0,
    workers: int = 1,
) -> None:  # fmt: skip
    """Write scenes start..start+count-1, skipping shards that are there.

    Raises:
        UserError: `out` holds another spec's cache, or `start` is not a multiple of the shard size.
    """
    if start % SHARD:
        raise UserError(f"--start {start}: must be a multiple of {SHARD}, the size of a shard")
    out.mkdir(parents=True, exist_ok=True)
    art_hash = hashlib.sha256((art / "art.json").read_bytes()).hexdigest()
    facts = {"format": FORMAT, **asdict(spec), "art": art_hash}
    note = out / "cache.json"
    if note.exists() and (found := json.loads(note.read_text())) != facts:
        wrong = sorted(key for key in facts if found.get(key) != facts[key])
        raise UserError(f"{note}: made with another {', '.join(wrong)}; choose another --out")
    note.write_text(json.dumps(facts, indent=1) + "\n")
    jobs = []
    for shard in range(start // SHARD, (start + count + SHARD - 1) // SHARD):
        size = min(SHARD, start + count - shard * SHARD)
        path = _shard_path(out, "images", shard)
        if not path.exists() or _rows_of(path) < size:
            jobs.append((spec, art, tokenizer, out, shard, size))
    total, done, status = sum(job[-1] for job in jobs), 0, StatusLine()
    if workers <= 1:
        for job in jobs:
            done += _write_shard(*job)
            status("scenes", done, total)
        status.close()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for shard in as_completed([pool.submit(_write_shard, *job) for job in jobs]):
            done += shard.result()
            status("scenes", done, total)
    status.close()


# --- reading ------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of a cache.

    Attributes:
        images: (n, 112, 112, 3) uint8.
        has_image: (n,) bool.
        ids, mask: (n, length) int16; the mask is 1 where the loss counts.
        cells: (n, image tokens, 3) uint8, what each image token shows (cells.py).
    """

    images: np.ndarray
    has_image: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    cells: np.ndarray


class SceneCache:
    """A folder of shards, memory-mapped. Shards may still be appearing while it is read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[int, tuple[np.ndarray, ...]] = {}  # images, talk, cells, flags

    def __len__(self) -> int:
        """Scenes that are there now."""
        shards = sorted(self.folder.glob("images-*.npy"))
        return sum(_rows_of(path) for path in shards)

    def wait_for(self, count: int, timeout: float = 600.0) -> None:
        """Return once scenes 0..count-1 are there.

        Raises:
            UserError: no new shard appeared for `timeout` seconds.
        """
        for shard in range((count + SHARD - 1) // SHARD):
            size = min(SHARD, count - shard * SHARD)
            if shard in self._open and len(self._open[shard][0]) >= size:
                continue
            path, patience = _shard_path(self.folder, "images", shard), time.monotonic() + timeout
            while not path.exists():
                if time.monotonic() > patience:
                    raise UserError(
                        f"{path}: not there after {timeout:.0f} s; render more scenes with "
                        "`python -m mmmamba_edge.distill.scenes.dataset`"
                    )
                time.sleep(0.5)
            self._open.pop(shard, None)  # it may have grown
            if len(self._shard(shard)[0]) < size:
                raise UserError(f"{path}: too few scenes for {count}; render more")

    def rows(self, indices: np.ndarray) -> Rows:
        """Rows by scene index, an (n,) array of integers; sorted ones read faster."""
        parts = []
        for index in indices:
            place = int(index) % SHARD
            parts.append([array[place] for array in self._shard(int(index) // SHARD)])
        images, talk, cells, flags = (np.stack(part) for part in zip(*parts, strict=True))
        return Rows(images, flags[:, 0].astype(bool), talk[:, 0], talk[:, 1], cells)

    def _shard(self, shard: int) -> tuple[np.ndarray, ...]:
        if shard not in self._open:
            names = ("images", "talk", "cells", "flags")
            paths = [_shard_path(self.folder, name, shard) for name in names]
            try:
                self._open[shard] = tuple(
                    np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths
                )
            except (OSError, ValueError) as error:
                raise UserError(f"{paths[0]}: not a readable shard ({error})") from error
        return self._open[shard]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.scenes.dataset",
        description="Render scenes and their conversations into shards; resumes where it stopped.",
        epilog="example: python -m mmmamba_edge.distill.scenes.dataset --art cache/art "
        "--tokenizer tokenizer.json --out cache/scenes --count 1000000 --workers 16",
    )
    parser.add_argument("--art", type=Path, required=True, help="folder made by scenes.art")
    parser.add_argument("--tokenizer", type=Path, required=True, help="made by scenes.tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, required=True, help="how many scenes")
    parser.add_argument("--start", type=int, default=0, help=f"first scene, a multiple of {SHARD}")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", type=int, choices=(0, 1, 2), help="default: the curriculum")
    parser.add_argument("--ramp", type=int, default=300_000, help="scenes until full difficulty")
    parser.add_argument("--length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--image-tokens", type=int, default=49, help="<IMG_CONTEXT>s of a picture")
    parser.add_argument(
        "--spelling", action="store_true",
        help="more printed words, most of them made up, in more fonts (training split alone)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if args.spelling and args.split != "train":
            raise UserError(
                f"--spelling --split {args.split}: only the training split practises spelling; "
                "leave --spelling out"
            )
        load_art(args.art)
        load_tokenizer(args.tokenizer)
        digest = hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
        spec = Spec(
            args.split, args.seed, args.level, args.ramp, args.length, args.image_tokens, digest,
            args.spelling,
        )  # fmt: skip
        write_cache(
            spec, args.art, args.tokenizer, args.out, count=args.count, start=args.start,
            workers=args.workers,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

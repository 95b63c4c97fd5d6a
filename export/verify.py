"""Compares a bundle with the checkpoint it was made of, on the runtime that will run it.

Both read the same prompts, with and without pictures: whole, and cut at random points into prefill,
single steps and prefill again. Compared are the logits of every position and the final states.
Where numbers are rounded three questions are kept apart: does the graph compute what its weights
say (`exact`, with activations, keys and values left in float32), what does rounding those add
(`shipped`), and how far from the float32 model is all of it together (`float32`).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from mmmamba_edge.bundle import read_manifest, write_manifest
from mmmamba_edge.config import Config
from mmmamba_edge.errors import CheckFailed
from mmmamba_edge.export.reference import Reading, read_streamed
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.quant.accuracy import log_softmax
from mmmamba_edge.runtimes.base import Runner, State
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner
from mmmamba_edge.status import Report, silent

Floats = NDArray[np.float32]

# Signal to error in dB below which a bundle is refused.
# Same numbers summed in another order: measured 85 to 130, the goldens' worst-conditioned included.
EXACT_DB = 75.0
# Keys and values kept in float16 lose 11 bits of 24: measured 59 to 92, and 43 at full size, where
# 32 layers of random weights add up what each loses.
HALF_CACHE_DB = 35.0
# Quantised against float32, all positions together. Goldens with random weights reach 13, models
# with trained-like scales 29 to 40; below 10 it is another model. A finer judgement needs data.
QUANTISED_DB = 10.0
FOUR_BIT_DB = 3.0  # random weights in 4 bits: what passes still is the same model, badly rounded

SPLITS = 3  # ways that a prompt is cut
LONG = 64  # tokens from which on a prompt is cut in one way only, to save time
ROWS = 64  # positions whose logits are compared at a time
STEPS = 12  # single steps between the two prefills, at most


@dataclass(frozen=True)
class Prompt:
    """Something to read, and what makes it lawful to cut it before a position."""

    ids: NDArray[np.int64]  # (tokens,)
    pixels: Floats | None  # (tiles, 3, height, width)
    per_tile: int  # image tokens of a tile
    image_id: int

    def part(self, start: int, stop: int) -> tuple[NDArray[np.int64], Floats | None]:
        """Ids and tiles between two positions that `cuts` allows."""
        tiles = self._tiles_before(stop) - self._tiles_before(start)
        if self.pixels is None or not tiles:
            return self.ids[start:stop], None
        first = self._tiles_before(start)
        return self.ids[start:stop], self.pixels[first : first + tiles]

    def cuts(self) -> list[int]:
        """Positions before which the prompt may be cut: not within a tile."""
        images = self.ids == self.image_id
        return [i for i in range(1, len(self.ids)) if images[:i].sum() % self.per_tile == 0]

    def _tiles_before(self, position: int) -> int:
        return int((self.ids[:position] == self.image_id).sum()) // self.per_tile


class Reader(Runner, Protocol):
    """A runner that can tell the logits of every position."""

    def read_all(
        self, input_ids: NDArray[np.int64], pixel_values: Floats | None = None
    ) -> tuple[Floats, State]:
        """Logits (tokens, vocab_size), and the state after them."""
        ...


def verify(
    folder: Path, weights: Weights, report: Report = silent,
    open_bundle: Callable[..., Reader] = OnnxRuntimeRunner,
) -> dict[str, Any]:  # fmt: skip
    """Compare the bundle in `folder` with the weights that it was made of.

    Args:
        folder: a whole bundle.
        weights: of the checkpoint, under the bundle's scheme.
        report: told what is being done, and how far.
        open_bundle: the runtime's runner.

    Returns:
        Figures for the manifest.

    Raises:
        CheckFailed: an answer or a state is not what PyTorch computes.
    """
    manifest = read_manifest(folder)
    prompts = list(make_prompts(manifest.model, manifest.max_context))

    def read(seen: Weights, what: str) -> list[Reading]:
        def progress(done: int, total: int) -> None:
            report(f"verifying: PyTorch reads {what}, layer", done, total)

        return read_streamed(seen, [(p.ids, p.pixels) for p in prompts], progress)

    half = any(tensor.dtype == "float16" for tensor in manifest.state)
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "positions": sum(len(prompt.ids) for prompt in prompts),
        "pictures": sum(prompt.pixels is not None for prompt in prompts),
    }
    unquantised = manifest.quant == "none"
    stored = read(weights, f"the {'float32' if unquantised else manifest.quant} weights")
    what = f"{manifest.quant} graph against PyTorch on its own weights"
    # Other runtimes' quantised products have no form with float32 activations.
    if (weights.scheme.bits or half) and open_bundle is OnnxRuntimeRunner:
        with tempfile.TemporaryDirectory(dir=folder, prefix="exact.") as t:
            exact = OnnxRuntimeRunner(exact_twin(folder, Path(t)), verify=False)
            figures["exact"] = compare(exact, prompts, stored, _part(report, "exact"))
            del exact  # its weights are copies: two sessions at a time are one too many
        _require(figures["exact"], _ALL, EXACT_DB, what)
    runner = open_bundle(folder, verify=False)
    if unquantised:
        figures["float32"] = compare(runner, prompts, stored, _part(report, "float32"))
        limit = HALF_CACHE_DB if half else EXACT_DB
        _require(figures["float32"], _ALL, limit, "float32 graph against PyTorch")
        return figures
    if weights.scheme.bits or half:
        figures["shipped"] = compare(runner, prompts, stored, _part(report, "shipped"))
    else:  # half-precision weights, which ONNX Runtime's CPU multiplies in float32
        figures["exact"] = compare(runner, prompts, stored, _part(report, "exact"))
        _require(figures["exact"], _ALL, EXACT_DB, what)
    if weights.quantized:  # the float32 weights are elsewhere; `check --reference` reads them
        return figures
    plain = read(weights.plain(), "the float32 weights")
    figures["float32"] = compare(runner, prompts, plain, _part(report, "float32"))
    limit = FOUR_BIT_DB if weights.scheme.bits == 4 else QUANTISED_DB
    _require(figures["float32"], ("sqnr_db",), limit, f"{manifest.quant} graph against float32")
    return figures


def _part(report: Report, name: str) -> Callable[[int, int], None]:
    what = f"verifying: the bundle reads ({name}), prompt"
    return lambda done, total: report(what, done, total)


def make_prompts(config: Config, max_context: int | None) -> Iterator[Prompt]:
    """Prompts of random ids and noise pictures: one token, text, one tile, two; those that fit."""
    rng = np.random.default_rng(0)
    text = np.setdiff1d(np.arange(config.vocab_size), [config.img_context_token_id])
    tile = np.full(config.tokens_per_tile, config.img_context_token_id)
    limit = max_context or 1 << 30
    for before, tiles, after in ((1, 0, 0), (min(37, limit - 1), 0, 0), (5, 1, 9), (3, 2, 14)):
        parts = [rng.choice(text, before), *[tile] * tiles, rng.choice(text, after)]
        ids = np.concatenate(parts).astype(np.int64)
        pixels = rng.standard_normal((tiles, 3, config.image_size, config.image_size))
        if 0 < len(ids) <= limit:
            yield Prompt(
                ids, pixels.astype(np.float32) if tiles else None,
                config.tokens_per_tile, config.img_context_token_id,
            )  # fmt: skip


def compare(
    runner: Reader, prompts: list[Prompt], wanted: list[Reading],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Read every prompt whole and in pieces, and put the differences into figures.

    Returns:
        Of the logits: sqnr_db over all positions, worst_sqnr_db of one reading, max_abs, mean_kld,
        top1 (share of positions whose likeliest token is the same). Of the states:
        worst_state_sqnr_db of one tensor after one reading.
    """
    rng = np.random.default_rng(1)
    worst, worst_state = _EQUAL_DB, _EQUAL_DB
    total = _Difference()
    for number, (prompt, want) in enumerate(zip(prompts, wanted, strict=True)):
        if progress:
            progress(number, len(prompts))
        ways = SPLITS if len(prompt.ids) < LONG else 1
        for read in (_whole, *[_in_pieces] * ways):
            rows, logits, state = read(runner, prompt, rng)
            here = _Difference()
            for start in range(0, len(rows), ROWS):
                part = slice(start, start + ROWS)
                here.add(logits[part], want.logits[rows[part]])
            total.merge(here)
            worst = _least(worst, here.sqnr_db)
            for name, array in want.state.items():
                worst_state = _least(worst_state, sqnr_db(state[name], array))
    return {
        "sqnr_db": round(total.sqnr_db, 1),
        "worst_sqnr_db": round(worst, 1),
        "max_abs": _short(total.max_abs),
        "mean_kld": _short(total.kld / total.rows),
        "top1": _short(total.same / total.rows, 4),
        "worst_state_sqnr_db": round(worst_state, 1),
    }


@dataclass
class _Difference:
    """What two sets of logits differ by, added up a few rows at a time: vocabularies are wide."""

    signal: float = 0.0
    error: float = 0.0
    max_abs: float = 0.0
    kld: float = 0.0
    same: int = 0
    rows: int = 0

    def add(self, got: Floats, want: Floats) -> None:
        """Some positions' logits (positions, vocab_size)."""
        signal, error = _powers(got, want)
        largest, kld = float(np.abs(got - want).max()), float(kl_divergence(got, want).sum())
        same = int((got.argmax(1) == want.argmax(1)).sum())
        self.merge(_Difference(signal, error, largest, kld, same, len(got)))

    def merge(self, other: "_Difference") -> None:
        """Add another's sums."""
        self.signal += other.signal
        self.error += other.error
        # NaN must stay: max() would lose it
        self.max_abs = float(np.maximum(self.max_abs, other.max_abs))
        self.kld += other.kld
        self.same += other.same
        self.rows += other.rows

    @property
    def sqnr_db(self) -> float:
        return _db(self.signal, self.error)


def exact_twin(folder: Path, twin: Path) -> Path:
    """The same bundle with activations, keys and values in float32; weights are linked."""
    manifest = read_manifest(folder)
    weights = {}
    for name, record in manifest.files.items():
        (twin / name).parent.mkdir(exist_ok=True)
        if name not in manifest.graphs.values():
            link(folder / name, twin / name)
            weights[name] = record
            continue
        model = onnx.load(folder / name, load_external_data=False)
        kept = {node.input[1] for node in model.graph.node if node.op_type == "TensorScatter"}
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1  # compute in float32
                elif node.op_type == "Cast" and node.output[0] in kept:
                    attribute.i = onnx.TensorProto.FLOAT  # keys and values
        for value in (*model.graph.input, *model.graph.output):
            tensor = value.type.tensor_type
            if tensor.elem_type == onnx.TensorProto.FLOAT16:
                tensor.elem_type = onnx.TensorProto.FLOAT
        (twin / name).write_bytes(model.SerializeToString(deterministic=True))
    state = tuple(replace(tensor, dtype="float32") for tensor in manifest.state)
    write_manifest(twin, replace(manifest, files=weights, state=state))
    return twin


# --- figures -------------------------------------------------------------------------------------


def sqnr_db(got: Floats, want: Floats) -> float:
    """Signal to error of `got` in dB: 10 log10(sum want^2 / sum (got - want)^2)."""
    return _db(*_powers(got, want))


def _powers(got: Floats, want: Floats) -> tuple[float, float]:
    error = np.subtract(got, want, dtype=np.float64)
    return float(np.square(want, dtype=np.float64).sum()), float(np.square(error, out=error).sum())


def _db(signal: float, error: float) -> float:
    if error == 0:
        return _EQUAL_DB
    ratio = 10 * float(np.log10(signal / error)) if signal else -_EQUAL_DB
    return _least(_EQUAL_DB, ratio)


def kl_divergence(got: Floats, want: Floats) -> NDArray[np.float64]:
    """KL(want || got) of the distributions behind logits (positions, vocab_size), each position."""
    p, q = log_softmax(want), log_softmax(got)
    return (np.exp(p) * (p - q)).sum(axis=1)


_EQUAL_DB = 200.0  # "no difference": more than float32 can express
_ALL = ("sqnr_db", "worst_sqnr_db", "worst_state_sqnr_db")


def _least(a: float, b: float) -> float:
    """The smaller one; NaN where there is one, which `min` may lose."""
    return b if not b >= a else a


def _require(figures: dict[str, float], names: tuple[str, ...], limit: float, what: str) -> None:
    for name in names:
        if not figures[name] >= limit:  # NaN fails too
            raise CheckFailed(
                f"verification failed: {what}: {name} is {figures[name]}, below {limit:g} "
                f"(largest difference of a logit: {figures['max_abs']}). Nothing was written"
            )


def _short(x: float, digits: int = 2) -> float:
    """Few digits: the manifest must not change with the last bits of a sum."""
    return float(f"{x:.{digits}g}")


# --- reading -------------------------------------------------------------------------------------

_Read = Callable[
    [Reader, Prompt, np.random.Generator],
    tuple[NDArray[np.int64], Floats, dict[str, Floats]],
]


def _whole(
    runner: Reader, prompt: Prompt, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Floats, dict[str, Floats]]:
    """Positions, their logits, and the final state, read in one go."""
    logits, state = runner.read_all(prompt.ids, prompt.pixels)
    return np.arange(len(prompt.ids)), logits, state.arrays()


def _in_pieces(
    runner: Reader, prompt: Prompt, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Floats, dict[str, Floats]]:
    """As `_whole`: a prefill up to a random cut, then steps while there is text, then a prefill."""
    state = runner.new_state()
    rows, logits = [], []

    def note(position: int, values: Floats) -> None:
        rows.append(position)
        logits.append(values.copy())

    position, size = 0, len(prompt.ids)
    cuts = prompt.cuts()
    if cuts:
        position = int(rng.choice(cuts))
        values, state = runner.prefill(*prompt.part(0, position), state)
        note(position - 1, values)
    for _ in range(STEPS):
        if position == size or prompt.ids[position] == prompt.image_id:
            break
        values, state = runner.step(int(prompt.ids[position]), state)
        note(position, values)
        position += 1
    if position < size:
        values, state = runner.prefill(*prompt.part(position, size), state)
        note(size - 1, values)
    return np.array(rows), np.stack(logits), state.arrays()


def link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where a file system has no such links."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)

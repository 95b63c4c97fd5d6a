"""The state: as fine as the bundle says, the same whichever way a text is cut, and its drift.

A state that is rounded at every step fails late and silently: once an update is smaller than half a
unit in the last place it is lost, and slow heads stop listening. So three things are looked at: of
which numbers a state is made; whether reading whole and step by step agree; and, where a reduced
format is asked about, how far a model with it departs from the same model without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError
from mmmamba_edge.export.verify import sqnr_db
from mmmamba_edge.quant.accuracy import TEXT, Scores, figures
from mmmamba_edge.quant.check_data import Item
from mmmamba_edge.quant.check_read import Artefact, cuts
from mmmamba_edge.reduced_state import reduce_state, restore_state
from mmmamba_edge.runtimes.base import State
from mmmamba_edge.status import Report, silent

Floats = NDArray[np.float32]

SPLIT_TOKENS = 96  # of a sequence that is read in two ways
DRIFT_TOKENS = 2000  # steps that a drift is measured over, at most


# --- of which numbers -----------------------------------------------------------------------------


def precision(states: Sequence[dict[str, Floats]]) -> dict[str, str]:
    """The coarsest format that holds every number of each state tensor, by its name.

    float32 where some number needs it. A tensor of which nothing but zeros was seen is left out.
    """
    out = {}
    for name in states[0] if states else ():
        array = np.concatenate([state[name].ravel() for state in states])
        array = array[array != 0]
        if len(array):
            fits = [
                kind for kind, rounded in _PLAIN.items() if np.array_equal(rounded(array), array)
            ]
            out[name] = fits[0] if fits else "float32"
    return out


# --- cut one way and another ----------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A text read in one go against step by step, on the same runner: worst figures, in dB."""

    logits_db: float
    state_db: float
    worst_state: str


def split(runner: Artefact, items: Sequence[Item]) -> Split:
    """Read the ends of some sequences step by step, and compare with reading them in one go."""
    logits_db, worst, where = 200.0, 200.0, ""
    for item in items:
        start = _text_from(runner, item)
        stop = min(start + SPLIT_TOKENS, len(item.ids))
        if stop - start < 2:
            continue
        base = runner.new_state()
        if start:
            for part, tiles in cuts(item.ids[:start], item.tiles(), runner.config):
                _, base = runner.prefill(item.ids[:start][part], tiles, base)
        one = base.copy()
        whole, one = runner.prefill(item.ids[start:stop], None, one)
        whole = whole.copy()
        many, said = base, whole
        for token in item.ids[start:stop]:
            said, many = runner.step(int(token), many)
        logits_db = min(logits_db, sqnr_db(said, whole))
        found = many.arrays()
        for name, array in one.arrays().items():
            db = sqnr_db(found[name], array)
            if db < worst:
                worst, where = db, name
    return Split(round(logits_db, 1), round(worst, 1), where)


def _text_from(runner: Artefact, item: Item) -> int:
    """The first position behind all pictures."""
    images = np.flatnonzero(item.ids == runner.config.img_context_token_id)
    return int(images[-1]) + 1 if len(images) else 0


# --- drift ----------------------------------------------------------------------------------------


def drift(
    runner: Artefact, items: Sequence[Item], kind: str, say: Report = silent
) -> dict[str, Any]:
    """The same runner with its SSD states rounded to `kind` after every step, against without.

    The model's own limits at a length cancel: both are the artefact.

    Args:
        runner: the artefact.
        items: sequences, read one after the other up to DRIFT_TOKENS in all, the longest first.
        kind: a key of `FORMATS`.
        say: told how far it is.

    Returns:
        format, tokens; mean_kld and top1 with intervals; by_position: last position, mean_kld and
        the state's worst relative error of a head there; heads: that error at the end for the
        worst ones, by layer and head.
    """
    if kind not in FORMATS:
        raise UserError(f"--state {kind}: known are {', '.join(FORMATS)}")
    rounded = FORMATS[kind]
    scores, marks, heads = Scores(), [], {}
    chosen = sorted((i for i in items if not i.pixels), key=lambda i: -len(i.ids)) or items
    left = min(DRIFT_TOKENS, sum(len(i.ids) for i in chosen))
    total = left
    for number, item in enumerate(chosen):
        if left <= 1:
            break
        start, ids = _text_from(runner, item), item.ids
        plain = runner.new_state()
        if start:
            for part, tiles in cuts(ids[:start], item.tiles(), runner.config):
                _, plain = runner.prefill(ids[part], tiles, plain)
        coarse = _rounded(runner, plain, rounded)
        stop = min(len(ids), start + left)
        following = item.following(runner.config)
        kept: list[tuple[Floats, Floats]] = []
        for position in range(start, stop):
            token = int(ids[position])
            want, plain = runner.step(token, plain)
            want = want.copy()
            got, coarse = runner.step(token, coarse)
            kept.append((got.copy(), want))
            coarse = _rounded(runner, coarse, rounded)
            last = position == stop - 1
            if position + 1 < len(ids) and (len(kept) == 64 or last):
                first = position + 1 - len(kept)
                places = np.arange(first, position + 1)
                scores.add(
                    number, places, np.full(len(places), TEXT, np.uint8),
                    np.stack([g for g, _ in kept]), np.stack([w for _, w in kept]),
                    following[first : position + 1],
                )  # fmt: skip
                kept = []
                say(f"drift of a {kind} state, token", total - left + position - start, total)
            if number == 0 and (last or (position & (position + 1)) == 0):  # 1, 2, 4, 8, ...
                heads = _head_errors(coarse.arrays(), plain.arrays())
                marks.append({"position": position + 1, "worst_head_error": max(heads.values())})
        left -= stop - start
    table = scores.whole()
    found = figures(table)
    for mark, before in zip(marks, [{"position": 0}, *marks], strict=False):
        part = table.where(
            (table.sequences == 0) & (table.positions < mark["position"])
            & (table.positions >= before["position"])
        )  # fmt: skip
        mark["mean_kld"] = float(part.columns.kld.mean()) if len(part) else 0.0
    worst = sorted(heads.items(), key=lambda pair: -pair[1])[:10]
    return {
        "format": kind, "tokens": len(table), "mean_kld": found["mean_kld"]._asdict(),
        "top1": found["top1"]._asdict(), "by_position": marks,
        "heads": [{"layer": a, "head": b, "relative_error": e} for (a, b), e in worst],
    }  # fmt: skip


def _rounded(runner: Artefact, state: State, rounded: Callable[[Floats], Floats]) -> State:
    arrays = state.arrays()
    for name, array in arrays.items():
        if name.endswith(".ssm"):
            arrays[name] = rounded(array)
    return runner.load_state(arrays, state.tokens)


def _head_errors(got: dict[str, Floats], want: dict[str, Floats]) -> dict[tuple[int, int], float]:
    """(layer, head) -> relative error of its state, in the 2-norm."""
    out = {}
    for name, array in want.items():
        if name.endswith(".ssm"):
            error = np.linalg.norm((got[name] - array).reshape(len(array), -1), axis=1)
            size = np.linalg.norm(array.reshape(len(array), -1), axis=1)
            for head, (e, s) in enumerate(zip(error, size, strict=True)):
                out[int(name.partition(".")[0]), head] = float(e / s) if s else 0.0
    return out


def to_bfloat16(x: Floats) -> Floats:
    """Rounded to nearest even, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def to_float16(x: Floats) -> Floats:
    """Rounded to nearest even, as float32; infinite beyond its range."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def through(precision: str) -> Callable[[Floats], Floats]:
    """What comes back of an SSD state that was kept so (reduced_state.py), as float32."""
    return lambda x: restore_state(reduce_state({"0.ssm": x}, precision))["0.ssm"]


_PLAIN = {"bfloat16": to_bfloat16, "float16": to_float16}
FORMATS: dict[str, Callable[[Floats], Floats]] = {
    "bfloat16": to_bfloat16, **{kind: through(kind) for kind in ("float16", "int16")}
}  # fmt: skip

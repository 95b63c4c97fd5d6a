"""What a quantised model must reach: limits by scheme, a bundle's own, and a user's.

The table is the project's target for models above 1B parameters: what comparable schemes lose in
llama.cpp's and Quamba's published measurements, halved where the SSD stays in float32. It is a
judgement, and stands here so that it can be argued with. A small model loses more to the same
rounding: its manifest may carry limits of its own, in `settings.thresholds`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmmamba_edge.errors import UserError
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.quant.accuracy import Estimate

Side = Literal["most", "least"]


@dataclass(frozen=True)
class Limit:
    """One figure that is judged: what it is, and which side of the limit is good."""

    what: str
    side: Side


KNOWN = {
    "mean_kld": Limit("mean KL divergence", "most"),
    "p999_kld": Limit("99.9 % KL divergence", "most"),
    "top1": Limit("same likeliest token", "least"),
    "ppl_ratio": Limit("perplexity, by the reference's", "most"),
    "flips": Limit("answers that flip", "most"),
    "added_db": Limit("signal to error (dB) of what it adds", "least"),
    "added_below_median_db": Limit("its gap (dB) below the other layers", "most"),
    "state_db": Limit("signal to error (dB) of the state", "least"),
    "split_db": Limit("whole against step by step (dB)", "least"),
    "cross_kld": Limit("mean KL divergence from the other bundle", "most"),
    "cross_top1": Limit("same likeliest token as the other bundle", "least"),
    "drift_kld": Limit("mean KL divergence that the reduced state makes", "most"),
    "drift_error": Limit("worst head's relative error of the reduced state", "most"),
    "drift_memory": Limit("longest memory of a head (tokens)", "most"),
}

ALIKE = {"added_below_median_db": 12.0, "cross_kld": 0.008, "cross_top1": 0.96}

# mean and 99.9 % KLD, top-1, perplexity, flips: targets for models above 1B. The figures in dB are
# floors below which something is broken, well under what was measured (docs/accuracy.md).
TABLE: dict[str, dict[str, float]] = {
    "float32": {
        "mean_kld": 1e-7, "p999_kld": 1e-5, "top1": 0.9999, "ppl_ratio": 1.00001, "flips": 0,
        "added_db": 75, "state_db": 75, "split_db": 75,
    },
    "float16 products": {
        "mean_kld": 5e-5, "p999_kld": 0.002, "top1": 0.997, "ppl_ratio": 1.0005, "flips": 0.001,
        "added_db": 45, "state_db": 45, "split_db": 50,
    },
    "int8 weights": {
        "mean_kld": 0.001, "p999_kld": 0.03, "top1": 0.985, "ppl_ratio": 1.001, "flips": 0.01,
        "added_db": 25, "state_db": 20, "split_db": 50,
    },
    "int8 weights and activations": {
        "mean_kld": 0.004, "p999_kld": 0.1, "top1": 0.97, "ppl_ratio": 1.003, "flips": 0.02,
        "added_db": 20, "state_db": 15, "split_db": 25,
    },
    "int4 weights": {
        "mean_kld": 0.025, "p999_kld": 0.6, "top1": 0.925, "ppl_ratio": 1.02, "flips": 0.04,
        "added_db": 8, "state_db": 5, "split_db": 50,
    },
    "int4 weights, int8 activations": {
        "mean_kld": 0.028, "p999_kld": 0.7, "top1": 0.92, "ppl_ratio": 1.022, "flips": 0.04,
        "added_db": 8, "state_db": 5, "split_db": 25,
    },
    "int4 weights, int8 activations a token": {
        "mean_kld": 0.035, "p999_kld": 0.8, "top1": 0.91, "ppl_ratio": 1.028, "flips": 0.04,
        "added_db": 8, "state_db": 5, "split_db": 25,
    },
}  # fmt: skip

# Of a state that is kept reduced, against float32: (mean KLD, worst head's relative error).
DRIFT = {"int16": (5e-5, 1e-3), "float16": (5e-4, 5e-3)}

POSITIONS_999 = 5000  # below, five positions or fewer lie beyond the percentile 99.9
ANSWERS = 200  # below, flips are reported and not judged


# Of checkpoints in PyTorch whose layers bitsandbytes rounded while loading.
ROUNDED = {"bnb-int8": "int8 weights and activations", "bnb-nf4": "int4 weights"}


def scheme_of(manifest: Manifest | None, quant: str = "none") -> str:
    """The row of TABLE of a bundle; None: a checkpoint in PyTorch, loaded as `quant`."""
    if manifest is None or manifest.quant == "none":
        return ROUNDED.get(quant, "float32")
    if manifest.quant == "fp16":
        return "float16 products"
    if manifest.quant == "int8":
        return "int8 weights" if manifest.ops == "standard" else "int8 weights and activations"
    if manifest.ops == "standard":  # int4, and what mixes it with int8
        return "int4 weights"
    fused = manifest.ops == "com.microsoft"
    return "int4 weights, int8 activations" + ("" if fused else " a token")


def limits(
    manifest: Manifest | None,
    override: Mapping[str, float],
    bundle: str = "manifest",
    quant: str = "none",
) -> tuple[dict[str, float], dict[str, str]]:
    """The limits that hold, and where each is from.

    Args:
        manifest: the bundle's; its `settings["thresholds"]` win over the table.
        override: what the user asks; it wins over both.
        bundle: named in errors.
        quant: of a checkpoint: the runner's.
    """
    row = scheme_of(manifest, quant)
    own = manifest.settings.get("thresholds", {}) if manifest else {}
    own = checked(own, f"{bundle}: settings.thresholds")
    found = {**ALIKE, **TABLE[row]}
    where = dict.fromkeys(found, row)
    for more, origin in ((own, "the bundle's own"), (override, "--thresholds")):
        found |= more
        where |= dict.fromkeys(more, origin)
    return found, where


def read(path: Path) -> dict[str, float]:
    """The limits of a TOML file: `mean_kld = 0.01` and the like.

    Raises:
        UserError: not such a file, or a key that is no limit.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--thresholds {path}: cannot be read ({error.strerror or error})"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--thresholds {path}: not TOML ({error})") from error
    return checked(data, f"--thresholds {path}")


def checked(data: Any, where: str) -> dict[str, float]:
    """`data` as limits; UserError naming the key that is none."""
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a table of limits, such as mean_kld = 0.01")
    for key, value in data.items():
        if key not in KNOWN:
            raise UserError(f"{where}: unknown limit {key!r}; known are {', '.join(KNOWN)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {key} is {value!r}; expected a number")
    return {key: float(value) for key, value in data.items()}


@dataclass(frozen=True)
class Line:
    """A judgement.

    Attributes:
        key: of the limit, or of the kind of check.
        what: in words.
        state: passed, failed or "not judged".
        value, low, high: the figure and its interval, where there is one.
        limit: where there is one.
        why: of a failure, or of not judging.
        place: where in the model, for faults that have one.
    """

    key: str
    what: str
    state: Literal["passed", "failed", "not judged"]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    side: Side | None = None
    why: str = ""
    place: str = ""


def judge(key: str, figure: Estimate | float, limit: float | None, unjudged: str = "") -> Line:
    """One figure against its limit: the whole interval must pass.

    Args:
        key: of KNOWN.
        figure: with its interval, or exact.
        limit: None: reported only.
        unjudged: why it is reported only, if it is.
    """
    known = KNOWN[key]
    value, low, high = figure if isinstance(figure, Estimate) else (figure, figure, figure)
    good = (lambda x: x <= limit) if known.side == "most" else (lambda x: x >= limit)
    state, why = "passed", ""
    if limit is None or unjudged:
        state, why = "not judged", unjudged or "no limit is set"
    elif not good(value):  # NaN too
        state = "failed"
    elif not (good(low) and good(high)):
        state = "failed"
        why = "the figure passes, its interval does not: score more positions (--tokens)"
    return Line(key, known.what, state, value, low, high, limit, known.side, why)

"""Recipes of a distillation: TOML, read strictly. What is left out is the paper's (spec 6)."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmmamba_edge.distill.batches import Positions
from mmmamba_edge.distill.tables import read_table, read_toml
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.recompute import Recompute

# Names of mixer tensors (tensor_names.mixer_shapes).
NEW = (
    "conv1d.weight", "conv1d.bias", "in_proj.weight", "g_proj.weight", "g_norm.weight",
    "dt_bias", "A_log_bias",
)  # fmt: skip
INHERITED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
STEPS = ("dt_bias", "A_log_bias")

# What of a layer stages 1 and 2 compare: outputs of the heads before the output projection (the
# paper's), or what the layer adds to the residual stream.
Match = Literal["heads", "output"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What stages have in common. Rates and steps are per optimiser step.

    Attributes:
        steps, batch: length of the stage, and rows of a step over all processes.
        micro_batch: rows that go through the model at once in a process.
        lr, warmup, decay: schedule: linear rise, plateau, half a cosine down to zero at the end.
        weight_decay: of AdamW; tensors named "bias" do not decay.
        clip: largest norm of all gradients together.
        train: mixer tensors that learn.
        log_every, save_every, validate_every: in steps.
    """

    batch: int
    micro_batch: int
    lr: float
    steps: int = 20_000
    warmup: int = 2_000
    decay: int = 2_000
    train: tuple[str, ...]
    weight_decay: float = 0.05
    clip: float = 5.0
    log_every: int = 10
    save_every: int = 500
    validate_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "log_every", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} are longer than steps {self.steps}"
            )


@dataclass(frozen=True, kw_only=True)
class MatchingConfig(StageConfig):
    """Stages 1 and 2.

    Attributes:
        match: what of a layer is compared, "heads" (the paper) or "output".
        relative: divide each layer's error by its target's mean square.
        layers: "all" are converted, whatever the student keeps (the paper: linear and hybrid then
            share the stage), or those that are Mamba-2 in the "student".
    """

    batch: int = 128
    micro_batch: int = 2
    lr: float = 1e-3
    train: tuple[str, ...] = NEW
    match: Match = "heads"
    relative: bool = False
    layers: Literal["all", "student"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "o_proj.weight" in self.train and self.match == "heads":
            raise ValueError("o_proj.weight learns nothing from the heads; match = 'output'")


@dataclass(frozen=True, kw_only=True)
class SecondConfig(MatchingConfig):
    """Stage 2: the inherited projections learn too."""

    lr: float = 5e-4
    train: tuple[str, ...] = (*NEW, *INHERITED)


@dataclass(frozen=True, kw_only=True)
class LogitsConfig(StageConfig):
    """Stage 3.

    Attributes:
        tau: temperature.
        recompute: activation checkpointing: "layers" (all but each layer's input), "cheap" (what
            lies between projections: faster, where the memory is there) or "nothing".
        topk: the teacher's likeliest tokens kept on disk at each position; 0: nothing is kept and
            the whole distribution counts.
    """

    batch: int = 64
    micro_batch: int = 1
    lr: float = 5e-5
    train: tuple[str, ...] = (*(n for n in NEW if n not in STEPS), *INHERITED)
    tau: float = 1.0
    recompute: Recompute = "layers"
    topk: int = 0


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student.

    Attributes:
        attention_layers: layers that stay attention: a list, or a pattern such as
            "head-interleaved 8" (student.attention_layers).
        seed: of the mixers' random parts.
        inherit, mimic: how mixers begin (seed.Seeding).
    """

    attention_layers: str | tuple[int, ...] = "none"
    seed: int = 0
    inherit: bool = True
    mimic: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How it is computed.

    Attributes:
        bf16: autocast to bfloat16, frozen weights in bfloat16; trained ones stay float32.
        teacher_bits: 16, or 8 (int8) or 4 (NF4) for the frozen layers, through bitsandbytes.
        optimizer: "adamw", or "adamw8bit" (bitsandbytes).
        shard: FSDP2 instead of DDP: trained weights, gradients and optimiser state are spread over
            the processes.
        compile: torch.compile the mixers and what of the models lies around them.
        cuda_graph: record the gradients of text micro-batches once and replay them: one launch
            where there were thousands. One process, on CUDA; not for stage 3 with `topk`.
    """

    bf16: bool = True
    teacher_bits: Literal[16, 8, 4] = 16
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    shard: bool = False
    compile: bool = False
    cuda_graph: bool = False


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    """[data] of kind "conversations": the InternVL layout.

    Attributes:
        meta: the JSON that lists the JSONL files; relative to the recipe.
        positions: tokens that count: "all" (the paper) or "answers".
        window: global batches whose rows are sorted by length together.
    """

    meta: Path
    max_length: int = 8192
    max_tiles: int = 12
    positions: Positions = "all"
    window: int = 16
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """[data] of kind "scenes": rendered scenes (scenes.dataset).

    Attributes:
        folder: of the shards; relative to the recipe.
        count: scenes in use.
    """

    folder: Path
    count: int
    positions: Positions = "all"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """[data] of kind "text": packed tokens (text.corpus), every position of which counts.

    Attributes:
        folder: of the tokens; relative to the recipe.
        split: "train", "validation" or "test".
        length: tokens of a row.
    """

    folder: Path
    split: Literal["train", "validation", "test"] = "train"
    length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("length must be at least 1")


DataConfig = ConversationsConfig | ScenesConfig | TextConfig
KINDS: dict[str, type] = {
    "conversations": ConversationsConfig, "scenes": ScenesConfig, "text": TextConfig,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole distillation.

    Attributes:
        teacher: checkpoint folder, relative to the recipe.
        stages: which run, in order; each starts from the one before, the first from seeding.
        validation: held-out data, or None.
        dtype: of the last checkpoint's weights.
    """

    teacher: Path
    data: DataConfig
    validation: DataConfig | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stages: tuple[int, ...] = (1, 2, 3)
    stage1: MatchingConfig = field(default_factory=MatchingConfig)
    stage2: SecondConfig = field(default_factory=SecondConfig)
    stage3: LogitsConfig = field(default_factory=LogitsConfig)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def stage(self, number: int) -> MatchingConfig | LogitsConfig:
        """The table of a stage."""
        return (self.stage1, self.stage2, self.stage3)[number - 1]

    def facts(self) -> dict[str, Any]:
        """All of it as JSON: what a resumed run must agree with."""
        return _plain(asdict(self))


def read_distill_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: TOML.
        overrides: `stage1.steps` -> `100` and the like, values as TOML.

    Raises:
        UserError: names the file, the table and the key.
    """
    tables = read_toml(path)
    for key, text in (overrides or {}).items():
        _override(tables, key, text)
    return recipe_of_tables(tables, str(path), path.parent)


def recipe_of_tables(tables: dict[str, Any], where: str, base: Path) -> Recipe:
    """A recipe of TOML's tables; `where` names them in errors, paths are relative to `base`."""
    for name in ("data", "validation"):
        if name in tables:
            tables[name] = _data(tables[name], f"{where} [{name}]", base)
    if "teacher" in tables:
        tables["teacher"] = base / str(tables["teacher"])
    for name, kind in _TABLES.items():
        if name in tables:
            tables[name] = read_table(kind, tables[name], f"{where} [{name}]")
    recipe = read_table(Recipe, tables, where)
    if set(recipe.stages) - {1, 2, 3}:
        raise UserError(f"{where}: stages {list(recipe.stages)}: expected some of 1, 2, 3")
    if list(recipe.stages) != sorted(set(recipe.stages)):
        raise UserError(f"{where}: stages {list(recipe.stages)}: each once, in rising order")
    return recipe


_TABLES: dict[str, type] = {
    "student": StudentConfig,
    "engine": EngineConfig,
    "stage1": MatchingConfig,
    "stage2": SecondConfig,
    "stage3": LogitsConfig,
}


def _override(tables: dict[str, Any], key: str, text: str) -> None:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word
    *outer, last = key.split(".")
    for name in outer:
        tables = tables.setdefault(name, {})
        if not isinstance(tables, dict):
            raise UserError(f"--set {key}: {name} is not a table")
    tables[last] = value


def _data(table: Any, where: str, base: Path) -> DataConfig:
    if not isinstance(table, dict) or table.get("kind") not in KINDS:
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}")
    kind = KINDS[table["kind"]]
    rest = {key: value for key, value in table.items() if key != "kind"}
    config = read_table(kind, rest, where)
    place = "meta" if kind is ConversationsConfig else "folder"
    object.__setattr__(config, place, base / getattr(config, place))
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

"""Plans of a table of students: which variants, with which budget, trained from which teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_edge.distill.distill_recipe import Recipe, recipe_of_tables
from mmmamba_edge.distill.tables import read_table, read_toml
from mmmamba_edge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScenesPlan:
    """[scenes]: what is rendered.

    Attributes:
        count, val: scenes to train on, and to validate on.
        ramp, level: difficulty (scenes.dataset); level None follows the curriculum.
        length, image_tokens: tokens of a row, and of a picture in it.
    """

    count: int
    val: int
    ramp: int
    length: int
    image_tokens: int
    level: int | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """[teacher]: a recipe of pretrain.py whose layers are all attention; relative to the plan.

    Attributes:
        minutes: cut its schedule to end by then; None: as it is.
        compile: torch.compile the layers.
    """

    recipe: Path
    minutes: float | None = None
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """[score]: how much is asked.

    Attributes:
        pictures: of the test split, a question of every type each allows.
        easy_vqa: questions of the official test split; 0: none.
        batch: questions at a time.
    """

    pictures: int
    easy_vqa: int
    batch: int = 256


@dataclass(frozen=True, kw_only=True)
class Row:
    """[[rows]]: one variant.

    Attributes:
        name: in the table.
        group: rows of a group are shown together; "main" comes first, with all question types.
        seeds: each trains a student of its own.
        set: keys of the recipe that differ, dotted: {"stage3.steps" = 100}.
    """

    name: str
    group: str
    seeds: tuple[int, ...] = (0,)
    set: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole table.

    Attributes:
        base: tables of a distillation recipe, without teacher and data.
    """

    scenes: ScenesPlan
    teacher: TeacherPlan
    score: ScorePlan
    base: dict[str, Any]
    rows: tuple[Row, ...]

    def recipe(self, row: Row, seed: int, teacher: Path, train: Path, val: Path) -> Recipe:
        """The recipe of one student."""
        tables: dict[str, Any] = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in self.base.items()
        }
        tables |= {"teacher": str(teacher), "dtype": "float32"}
        count, held = self.scenes.count, self.scenes.val
        tables["data"] = {"kind": "scenes", "folder": str(train), "count": count, "seed": seed}
        tables["validation"] = {"kind": "scenes", "folder": str(val), "count": held}
        tables.setdefault("student", {})["seed"] = seed
        for key, value in row.set.items():
            *outer, last = key.split(".")
            place = tables
            for name in outer:
                place = place.setdefault(name, {})
            place[last] = value
        return recipe_of_tables(tables, f"row {row.name}", Path())


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: names the file, the table and the key.
    """
    tables = read_toml(path)
    kinds = {"scenes": ScenesPlan, "teacher": TeacherPlan, "score": ScorePlan}
    for name, kind in kinds.items():
        if name in tables:
            tables[name] = read_table(kind, tables[name], f"{path} [{name}]")
    rows = tables.get("rows", [])
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: no [[rows]]; expected at least one")
    tables["rows"] = tuple(
        read_table(Row, _row(row), f"{path} [[rows]] number {i}") for i, row in enumerate(rows, 1)
    )
    names = [row.name for row in tables["rows"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two [[rows]] are named {twice[0]!r}")
    plan = read_table(Plan, tables, str(path))
    object.__setattr__(plan.teacher, "recipe", path.parent / plan.teacher.recipe)
    for row in plan.rows:  # a misspelt key is found before hours of training
        plan.recipe(row, 0, Path("teacher"), Path("train"), Path("val"))
    return plan


def _row(table: Any) -> Any:
    return {"set": {}, **table} if isinstance(table, Mapping) else table

"""Which matrix gets how many bits, by which algorithm, and why."""

import tomllib
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmmamba_edge.errors import UserError
from mmmamba_edge.quant.codes import GROUPS, group_of
from mmmamba_edge.quant.schemes import WIDE, kept_because

ALGORITHMS = ("clipped", "gptq", "fisher")


@dataclass(frozen=True)
class Choice:
    """How a matrix is to be stored.

    Attributes:
        bits: 8 or 4; 0: it stays floating-point.
        group: of 4 bits: columns that share a scale, at most.
        algorithm: one of `ALGORITHMS`.
        reason: why.
    """

    bits: int
    group: int
    algorithm: str
    reason: str

    def group_of(self, columns: int) -> int | None:
        """The group of a matrix; None: a scale a row."""
        return group_of(columns, self.group) if self.bits == 4 else None


@dataclass(frozen=True)
class Rule:
    """Bits of the matrices whose training name fits `match` (with * and ?)."""

    match: str
    bits: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Of a whole checkpoint.

    Attributes:
        scheme: its name: int8, int4 or mixed.
        bits, group, algorithm: of matrices that nothing else is said of.
        folds: whether scales may move (folds.py).
        promoted: matrices in 8 bits, by training name, and why.
        rules: of a file; the first that fits counts, before all else.
    """

    scheme: str
    bits: int
    group: int = 32
    algorithm: str = "gptq"
    folds: bool = True
    promoted: dict[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def choice(self, name: str) -> Choice:
        """Of the tensor with that training name."""
        if reason := kept_because(name):
            return Choice(0, 0, "", reason)
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                return Choice(rule.bits, self.group, self.algorithm, rule.reason)
        if self.bits == 4 and (reason := WIDE.get(name) or self.promoted.get(name)):
            return Choice(8, 0, self.algorithm, reason)
        return Choice(self.bits, self.group, self.algorithm, f"{self.scheme}: every matrix")

    def promote(self, names: dict[str, str]) -> "Plan":
        """The same with these matrices in 8 bits."""
        return replace(self, promoted={**self.promoted, **names})

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def make_plan(scheme: str, group: int = 32, algorithm: str = "gptq", *, folds: bool = True) -> Plan:
    """The plan of a scheme's name, or of a TOML file.

        bits = 4                # of matrices that no rule names: 8 or 4
        group = 32
        [[rule]]
        match = "*.w2.weight"   # training names, with * and ?; the first rule that fits counts
        bits = 8
        reason = "why"

    Raises:
        UserError: an unknown name, or a file with unknown keys or values; the key is named.
    """
    if group not in GROUPS:
        raise UserError(f"--group-size {group}: expected one of {', '.join(map(str, GROUPS))}")
    if scheme in ("int8", "int4", "mixed"):
        return Plan(scheme, 8 if scheme == "int8" else 4, group, algorithm, folds)
    path = Path(scheme)
    if path.suffix != ".toml":
        raise UserError(f"--scheme {scheme}: expected int8, int4, mixed or a .toml file")
    return _read_plan(path, group, algorithm, folds)


def _read_plan(path: Path, group: int, algorithm: str, folds: bool) -> Plan:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error
    if unknown := sorted(data.keys() - {"bits", "group", "rule"}):
        raise UserError(f"{path}: unknown key {unknown[0]}; known are bits, group, rule")
    bits, group = data.get("bits", 4), data.get("group", group)
    if bits not in (4, 8):
        raise UserError(f"{path}: bits is {bits!r}; expected 4 or 8")
    if group not in GROUPS:
        raise UserError(f"{path}: group is {group!r}; expected one of {GROUPS}")
    rules = []
    for number, rule in enumerate(data.get("rule", []), 1):
        where = f"{path}: rule {number}"
        if unknown := sorted(rule.keys() - {"match", "bits", "reason"}):
            raise UserError(f"{where}: unknown key {unknown[0]}; known are match, bits, reason")
        if not isinstance(rule.get("match"), str) or rule.get("bits") not in (4, 8):
            raise UserError(f"{where}: expected match, a name with * and ?, and bits, 4 or 8")
        rules.append(Rule(rule["match"], rule["bits"], rule.get("reason", f"{path.name}")))
    return Plan(path.stem, bits, group, algorithm, folds, rules=tuple(rules))

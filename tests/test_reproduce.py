"""The table of students, in small: what the paper finds shows even in two minutes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import mmmamba_edge.distill
from mmmamba_edge.distill.scenes import reproduce
from mmmamba_edge.distill.scenes.reproduce import main
from mmmamba_edge.distill.scenes.table_plan import read_plan
from mmmamba_edge.distill.scenes.tokenizer import main as tokenizer_main
from scene_art import make_art

torch.set_num_threads(1)  # two workers share the cores of the tests

RECIPES = Path(mmmamba_edge.distill.__file__).parent / "recipes"


@pytest.mark.slow
def test_the_smoke_table(tmp_path, capsys, monkeypatch):
    """Losses fall, every student beats the seeded one, the hybrid is nearest to the teacher."""
    art, tokenizer = tmp_path / "art", tmp_path / "tokenizer.json"
    art.mkdir()
    make_art(art)
    assert tokenizer_main(["--out", str(tokenizer)]) == 0
    out = tmp_path / "table"
    args = [str(RECIPES / "scenes-smoke.toml"), "--art", str(art), "--tokenizer", str(tokenizer)]
    args += ["--out", str(out), "--device", "cpu"]
    assert main(args) == 0
    table = capsys.readouterr().out
    lines = {line["row"]: line for line in json.loads((out / "results.json").read_text())}
    assert set(lines) == {"teacher", "linear", "hybrid", "seeded, not trained"}
    for folder in {f for line in lines.values() for f in line.get("stages", ())}:
        rows = [json.loads(x) for x in (out / folder / "metrics.jsonl").read_text().splitlines()]
        trained = [row["loss"] for row in rows if "loss" in row]
        held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
        assert trained[-1] < 0.8 * trained[0] and held_out[-1] < 0.8 * held_out[0], folder
    distance = {name: line["kl"] for name, line in lines.items()}
    assert distance["hybrid"] < distance["linear"] < 0.3 * distance["seeded, not trained"]
    right = {name: line["scores"]["all"]["accuracy"] for name, line in lines.items()}
    assert min(right["linear"], right["hybrid"]) > 1.5 * right["seeded, not trained"]
    assert lines["linear"]["stages"][:2] == lines["hybrid"]["stages"][:2]  # shared, trained once
    assert len(list((out / "stages").iterdir())) == 4
    assert re.search(r"\| linear \| 1 \| \d", table) and "### stages" in table
    # A second call trains and scores nothing.
    monkeypatch.setattr(reproduce, "STAGES", {})
    monkeypatch.setattr(reproduce, "score_batch", None)
    shutil.rmtree(out / "stages")  # scores outlive the weights
    assert main(args) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("plan", sorted(RECIPES.glob("scenes-*.toml")), ids=lambda path: path.stem)
def test_committed_plans_are_valid(plan):
    if "teacher" not in plan.stem:
        assert read_plan(plan).teacher.recipe.is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("stages = []", "stages = [4]"), r"row seeded, not trained: stages \[4\]"),
        (('name = "hybrid"', 'name = "linear"'), r"two \[\[rows\]\] are named 'linear'"),
        (("student.attention_layers", "student.layers"), r"\[student\]: unknown key layers"),
        (("val = 128", ""), r"\[scenes\]: missing key val"),
        (("pictures = 40", "pictures = 'all'"), r"\[score\]: pictures = 'all': expected int"),
    ],
)
def test_bad_plans(tmp_path, capsys, change, message):
    plan = tmp_path / "plan.toml"
    text = (RECIPES / "scenes-smoke.toml").read_text()
    assert change[0] in text
    plan.write_text(text.replace(*change))
    args = [str(plan), "--art", "art", "--tokenizer", "t", "--out", str(tmp_path / "out")]
    assert main(args) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_only_rows_of_the_plan(tmp_path, capsys):
    plan = str(RECIPES / "scenes-smoke.toml")
    args = [plan, "--art", "art", "--tokenizer", "t", "--out", str(tmp_path / "out")]
    assert main([*args, "--only", "linear", "quadratic"]) == 2
    assert "--only quadratic: the plan has no such row" in capsys.readouterr().err

"""Students beside their teacher on text, mixers that travel alone, and starting from a student."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import distilling
import mmmamba_edge.distill
from mmmamba_edge.cli import main as cli
from mmmamba_edge.distill.distill_recipe import read_distill_recipe
from mmmamba_edge.distill.mixer_file import load_mixers, mixers_of, with_progress
from mmmamba_edge.distill.mixer_file import main as mixer_file
from mmmamba_edge.distill.student import attention_layers
from mmmamba_edge.distill.text.evaluate import main as evaluate
from mmmamba_edge.distill.text.evaluate import measure, summary, windows
from mmmamba_edge.distill.text_source import open_tokens
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.tensor_names import mixer_shapes

TEXT = """
teacher = "teacher"
{stages}
[data]
kind = "text"
folder = "tokens"
length = 16
[validation]
kind = "text"
folder = "tokens"
split = "validation"
length = 16
[student]
attention_layers = [1]
[engine]
bf16 = false
[stage1]
steps = 4
batch = 4
micro_batch = 2
lr = 1e-2
warmup = 1
decay = 1
log_every = 1
[stage3]
steps = {steps}
batch = 4
micro_batch = 4
lr = 3e-3
warmup = 1
decay = 1
log_every = 1
save_every = 2
"""


def make_tokens(folder):
    rng = np.random.default_rng(0)
    sources = {"verse": 400, "prose": 300, "tiny": 9}
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        for name, size in sources.items():
            ids = rng.integers(10, 40, size).astype(np.uint16)
            np.save(folder / split / f"{name}.npy", ids)
    (folder / "tokens.json").write_text(json.dumps({"vocab_size": 40, "sources": sources}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A hybrid distilled on text, all stages but the second; returns its folder."""
    folder = tmp_path_factory.mktemp("text")
    distilling.make(folder)
    make_tokens(folder / "tokens")
    recipe = folder / "text.toml"
    recipe.write_text(TEXT.format(stages="stages = [1, 3]", steps=6))
    assert cli(["distill", str(recipe), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "loss" in (row := json.loads(line))]


@pytest.mark.parametrize(("name", "kept"), [("linear", set()), ("hybrid", set(range(0, 30, 4)))])
def test_the_committed_recipes_differ_in_attention_only(name, kept):
    folder = Path(mmmamba_edge.distill.__file__).parent / "recipes"
    recipes = {n: read_distill_recipe(folder / f"smollm2-{n}.toml") for n in ("linear", "hybrid")}
    assert attention_layers(recipes[name].student.attention_layers, 30) == kept
    facts = [recipe.facts() for recipe in recipes.values()]
    for each in facts:
        del each["student"]["attention_layers"]
    assert facts[0] == facts[1]
    assert set(recipes[name].stage3.train) == set(mixer_shapes(distilling.config(), 0))


def test_stages_learn_from_text(run):
    for number in (1, 3):
        losses = [row["loss"] for row in rows(run / f"run/stage{number}")]
        assert losses[-1] < losses[0], number


def test_figures_are_those_of_whole_logits(run):
    teacher = load_model(run / "teacher")
    student = load_model(run / "run/stage3/checkpoint", dtype=torch.float32)
    ids = windows(open_tokens(run / "tokens", "test", 40), 16, 5)
    assert set(windows(open_tokens(run / "tokens", "test", 40), 16, 5, ["verse"])) == {"prose"}
    assert set(ids) == {"verse", "prose"} and ids["verse"].shape == (5, 16)
    sums = measure(teacher, {"s": student}, ids["verse"], rows=2)["s"]
    text = torch.from_numpy(ids["verse"].astype(np.int64))
    with torch.no_grad():
        p, q = (model(text)[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    target = text[:, 1:, None]
    naive = [
        torch.full((5,), 15.0), -p.gather(2, target).sum((1, 2)), -q.gather(2, target).sum((1, 2)),
        (p.exp() * (p - q)).sum((1, 2)), (p.argmax(-1) == q.argmax(-1)).sum(1),
    ]  # fmt: skip
    np.testing.assert_allclose(sums, torch.stack([x.double() for x in naive], 1), rtol=2e-5)
    figures = summary(sums)
    assert figures["ratio"][0] == pytest.approx(
        math.exp((sums[:, 2].sum() - sums[:, 1].sum()) / 75)
    )
    assert all(low <= value <= high for value, low, high in figures.values())


def test_a_teacher_is_no_further_from_itself(run):
    teacher = load_model(run / "teacher")
    ids = windows(open_tokens(run / "tokens", "test", 40), 16, 3)["prose"]
    figures = summary(measure(teacher, {"same": teacher}, ids)["same"])
    assert figures["ratio"] == [1, 1, 1] and figures["agreement"] == [1, 1, 1]
    assert figures["kl"][0] == 0


def test_the_command_writes_figures_and_refuses_nonsense(run, capsys):
    student = run / "run/stage3/checkpoint"
    more = ["--teacher", run / "teacher", "--tokens", run / "tokens", "--length", 16]
    more = [str(x) for x in (*more, "--sample-tokens", 0, "--out", run / "results")]
    assert evaluate(["--student", f"hybrid={student}", *more]) == 0
    found = json.loads((run / "results/results.json").read_text())
    by_source = found["results"]["hybrid"]
    assert set(by_source) == {"all", "verse", "prose"} and found["length"] == 16
    total = sum(by_source[name]["windows"] for name in ("verse", "prose"))
    assert by_source["all"]["windows"] == total
    assert "| hybrid | all |" in (run / "results/table.md").read_text()
    assert evaluate(["--student", "hybrid", *more]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err
    assert evaluate(["--student", f"hybrid={student}", "--without", "prosa", *more]) == 2
    assert "--without prosa" in capsys.readouterr().err


def test_mixers_travel_alone_and_join_their_teacher(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmmamba_edge.distill.mixer_file.FILE_BYTES", 30_000)
    student = run / "run/stage3/checkpoint"
    mixers = tmp_path / "mixers"
    assert mixer_file(["split", str(student), "--out", str(mixers)]) == 0
    assert (
        mixer_file(["join", str(run / "teacher"), str(mixers), "--out", str(tmp_path / "s")]) == 0
    )
    first, second = open_checkpoint(student), open_checkpoint(tmp_path / "s")
    assert second.config == first.config and second.weights_id() == first.weights_id()
    assert sorted(load_mixers(mixers)) == [0, 2, 3]


def test_a_missing_file_is_named(run, tmp_path, capsys):
    from mmmamba_edge.distill.mixer_file import save_mixers

    mixers = mixers_of(open_checkpoint(run / "run/stage3/checkpoint"))
    save_mixers(mixers, tmp_path / "mixers", torch.float32, limit=40_000)
    files = sorted((tmp_path / "mixers").iterdir())
    assert len(files) > 2
    files[1].unlink()
    join = ["join", str(run / "teacher"), str(tmp_path / "mixers"), "--out", str(tmp_path / "s")]
    assert mixer_file(join) == 2
    assert "a file is missing" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_progress_goes_over_the_checkpoint_it_began_from(run):
    begun = mixers_of(open_checkpoint(run / "run/stage1/checkpoint"))
    ended = mixers_of(open_checkpoint(run / "run/stage3/checkpoint"))
    joined = with_progress(begun, run / "run/stage3/progress.safetensors")
    assert sorted(begun) == [0, 1, 2, 3] and sorted(joined) == sorted(ended) == [0, 2, 3]
    for layer, tensors in ended.items():
        for name, tensor in tensors.items():
            assert torch.equal(joined[layer][name].to(tensor.dtype), tensor), (layer, name)


def test_a_run_may_begin_with_a_student(run, tmp_path, capsys):
    student = run / "run/stage3/checkpoint"
    recipe = run / "on.toml"
    recipe.write_text(TEXT.format(stages="stages = [3]", steps=2))
    line = ["distill", str(recipe), "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli([*line, "--init", str(student)]) == 0
    last, on = (rows(folder / "stage3")[::-1][0] for folder in (run / "run", tmp_path / "run"))
    first = rows(run / "run/stage3")[0]
    assert rows(tmp_path / "run/stage3")[0]["loss"] < 0.9 * first["loss"], (first, last, on)
    # It is a run of that student: not to be gone on with from another one, or from seeding.
    assert cli([*line, "--resume"]) == 2
    assert "init" in capsys.readouterr().err
    assert cli([*line[:-1], str(tmp_path / "other"), "--init", str(run / "teacher")]) == 2
    assert "a teacher; expected a student" in capsys.readouterr().err

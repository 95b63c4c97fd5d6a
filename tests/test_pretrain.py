"""Training from scratch: it learns, resumes bit for bit, and reads recipes strictly."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmmamba_edge.distill import pretrain
from mmmamba_edge.distill.cuda_graph import graphed
from mmmamba_edge.distill.pretrain import (
    Objective,
    answer_accuracy,
    load_weights,
    loss_and_gradients,
    main,
    read_all,
    schedule,
    shortened,
)
from mmmamba_edge.distill.progress import save_progress
from mmmamba_edge.distill.recipe import read_recipe
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import open_checkpoint, save_model

RECIPE = """
[model]
hidden_size = 32
intermediate_size = 48
num_attention_heads = 2
num_key_value_heads = 1
embedding_layers = 1
llm_layers = 1
attention_layers = [1]
vocab_size = 40
image_size = 112
patch_size = 28
img_context_token_id = 7
eos_token_id = 4
template = "scenes"
[data]
scenes = 64
reuse = 1
[train]
steps = 12
batch = 4
lr = 1e-2
warmup = 2
decay = 4
weight_decay = 0.05
clip = 1.0
seed = 3
bf16 = false
perception = 0.5
perception_layers = [1]
save_every = 6
log_every = 6
"""


@pytest.fixture
def run(tmp_path):
    """Runs the command line on a tiny cache: images say nothing, the answer is always 9."""
    rng = np.random.default_rng(0)
    cache = tmp_path / "scenes"
    cache.mkdir()
    ids = rng.integers(10, 40, (64, 2, 24)).astype(np.int16)
    ids[:, 0, 2:6] = 7  # four image tokens
    ids[:, 1] = 0
    ids[:, 0, 20:22], ids[:, 1, 20:22] = 9, 1
    np.save(cache / "talk-00000.npy", ids)
    np.save(cache / "cells-00000.npy", rng.integers(0, 12, (64, 4, 3)).astype(np.uint8))
    np.save(cache / "flags-00000.npy", np.ones((64, 2), np.uint8))
    images = rng.integers(0, 255, (64, 112, 112, 3)).astype(np.uint8)
    np.save(cache / "images-00000.npy", images)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)

    def call(out, *more):
        args = [str(recipe), "--scenes", str(cache), "--out", str(tmp_path / out)]
        assert main([*args, "--device", "cpu", *more]) == 0
        return tmp_path / out

    return call


class Killed(BaseException):
    """Stands for kill -9: nothing runs after it."""


def killed_at_its_first_save(monkeypatch, run, *args):
    def save_then_die(*args):
        save_progress(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_progress", save_then_die)
        with pytest.raises(Killed):
            run(*args)


def test_it_learns_and_resumes_bit_for_bit(run, monkeypatch):
    whole = run("whole")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[1]["loss"] < 0.7 * rows[0]["loss"]
    assert open_checkpoint(whole / "checkpoint").config.variant == "hybrid"

    killed_at_its_first_save(monkeypatch, run, "killed")
    killed = whole.parent / "killed"
    assert not (killed / "checkpoint").exists()
    run("killed")
    ours, theirs = (load_file(out / "progress.safetensors") for out in (whole, killed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    resumed = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in resumed] == [6, 12]


def test_a_run_begins_with_a_checkpoint(run, tmp_path, monkeypatch):
    """`--init` gives the weights; the schedule and the optimisers are a new run's."""
    first = open_checkpoint(run("first") / "checkpoint")
    begun = []

    def begin(model, folder):
        load_weights(model, folder)
        begun.append({name: p.detach().clone() for name, p in model.state_dict().items()})

    monkeypatch.setattr(pretrain, "load_weights", begin)
    run("second", "--init", str(tmp_path / "first/checkpoint"))
    assert begun[0] and all(torch.equal(p, first.get(n).float()) for n, p in begun[0].items())
    files = (tmp_path / out / "metrics.jsonl" for out in ("first", "second"))
    before, after = ([json.loads(row) for row in file.read_text().splitlines()] for file in files)
    assert [row["step"] for row in after] == [6, 12] and after[0]["loss"] < 0.7 * before[0]["loss"]

    killed_at_its_first_save(
        monkeypatch, run, "killed", "--init", str(tmp_path / "first/checkpoint")
    )
    run("killed", "--init", str(tmp_path / "first/checkpoint"))
    runs = ("second", "killed")
    ours, theirs = (load_file(tmp_path / out / "progress.safetensors") for out in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    small, _, _ = read_recipe(path)
    save_model(from_scratch(small), tmp_path / "small")
    path.write_text(RECIPE.replace("vocab_size = 40", "vocab_size = 48"))
    large, _, _ = read_recipe(path)
    with pytest.raises(UserError, match="small: vocab_size is 40, the recipe's .* makes it 48"):
        load_weights(from_scratch(large), tmp_path / "small")
    with pytest.raises(UserError, match="nowhere"):
        load_weights(from_scratch(large), tmp_path / "nowhere")


def test_the_schedule_ends_with_the_training(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    _, _, train = read_recipe(path)
    factors = [schedule(step, train) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[7:] == [1.0, 1.0, 0.75, 0.5, 0.25]


def test_minutes_cut_the_schedule_until_it_decays(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("decay = 4", "decay = 300"))
    _, _, recipe = read_recipe(path, steps=1000)
    slow = shortened(recipe, recipe, 50, 150.0)
    assert (slow.steps, slow.decay) == (200, 70)
    faster = shortened(recipe, slow, 100, 300.0)
    assert (faster.steps, faster.decay) == (400, 140)
    assert shortened(recipe, faster, 300, 5000.0) is faster  # decaying: no way back
    assert shortened(recipe, slow, 100, 900.0) is recipe
    late = shortened(recipe, recipe, 100, -1.0)
    assert late.steps == 101 and schedule(100, late) > 0


def test_minutes_end_a_run(run):
    out = run("short", "--steps", "100000", "--minutes", "0.02")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["steps"] < 100000
    assert (out / "checkpoint").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_replays_the_gradients(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    config, _, train = read_recipe(path)
    torch.manual_seed(0)
    objective = Objective(from_scratch(config), train).cuda()
    backward = partial(loss_and_gradients, objective, train)

    def batch():
        ids = torch.randint(10, 40, (4, 24), device="cuda")
        ids[:, 2:6] = 7
        return {
            "images": torch.randn(4, 3, 112, 112, device="cuda"),
            "ids": ids,
            "mask": ids > 30,
            "cells": torch.randint(0, 12, (4, 4, 3), dtype=torch.uint8, device="cuda"),
        }

    replay, new = graphed(backward, batch()), batch()
    loss = replay(**new).clone()
    gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    torch.testing.assert_close(loss, backward(**new))
    after = [p.grad for p in objective.parameters() if p.grad is not None]
    assert gradients
    torch.testing.assert_close(gradients, after)


def test_the_training_pass_is_the_model(tmp_path):
    """`read_all` has fixed shapes; it computes what `MMMamba.forward` does, text-only rows too."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    config, _, _ = read_recipe(path)
    torch.manual_seed(0)
    model = from_scratch(config)
    ids = torch.randint(10, 40, (2, 24))
    ids[0, 3:7] = 7
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        logits = model.language_model.output(read_all(model, images, ids)[0])
        alone = [model(ids[:1], images[:1]), model(ids[1:])]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_accuracy_counts_whole_answers(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    config, _, _ = read_recipe(path)
    model = from_scratch(config)
    ids, mask = torch.randint(10, 40, (2, 24)), torch.zeros(2, 24, dtype=torch.bool)
    images = torch.zeros(2, 3, 112, 112)
    with torch.inference_mode():
        best = model.language_model.output(read_all(model, images, ids)[0]).argmax(-1)
    for row, place in ((0, 4), (0, 9), (1, 5)):
        ids[row, place] = best[row, place - 1]  # later tokens change nothing before them
        mask[row, place] = True
        with torch.inference_mode():
            best = model.language_model.output(read_all(model, images, ids)[0]).argmax(-1)
    assert answer_accuracy(model, images, ids, mask) == 1.0
    mask[1, 6] = True  # the answer at 5 goes on with a word the model does not expect
    ids[1, 6] = (best[1, 5] + 1) % 40
    assert answer_accuracy(model, images, ids, mask) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[train]\n", "[train]\ncolour = 1\n"), r"\[train\]: unknown key colour"),
        (("clip = 1.0\n", ""), r"\[train\]: missing key clip"),
        (("[data]", "[dates]"), r"unknown table \[dates\]"),
        (("hidden_size = 32\n", ""), r"\[model\]: missing key hidden_size"),
        (("vocab_size = 40", "vocabulary = 40"), r"\[model\]: .*vocabulary"),
        (("steps = 12", "steps = "), "not a readable recipe"),
    ],
)
def test_bad_recipes(change, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(*change))
    with pytest.raises(UserError, match=message):
        read_recipe(path)

"""A stage's gradients from a CUDA graph are those that it computes itself."""

import gc
import weakref

import pytest
import torch

import distilling
from mmmamba_edge.cli import main
from mmmamba_edge.distill import cuda_graph
from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.distill.cuda_graph import RecordedStage
from mmmamba_edge.distill.distill_recipe import LogitsConfig, MatchingConfig
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.distill.layer_matching import LayerMatching
from mmmamba_edge.distill.logit_matching import LogitMatching
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.distill.student import freeze, share_output_projection, train_only, trained
from mmmamba_edge.model.mixer import Mamba2Mixer


def replayed_by_hand(backward, example):
    """What `graphed` promises, without a graph: three rounds to warm up, inputs at fixed places."""
    inputs = {name: tensor.clone() for name, tensor in example.items()}
    for _ in range(3):
        backward(**inputs)

    def replay(**batch):
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        return backward(**inputs)

    return replay


def stage_of(number: int, device: str):
    torch.manual_seed(0)
    teacher = freeze(from_scratch(distilling.config()).to(device))
    mixers = {i: Mamba2Mixer(teacher.config.stack_of(i)).to(device) for i in range(4)}
    train_only(mixers, (MatchingConfig() if number == 1 else LogitsConfig()).train)
    share_output_projection(teacher, mixers)
    kind = LayerMatching if number == 1 else LogitMatching
    return kind(teacher, mixers, Engine(device))


def dense(seq: int, device: str, *, seed: int) -> Batch:
    ids = torch.randint(10, 40, (2, seq), generator=torch.Generator().manual_seed(seed))
    weights, lengths = torch.ones(2, seq), torch.tensor([seq, seq])
    return Batch(ids, lengths, weights, dense=True).to(device)


def accumulated(stage, batches) -> tuple[list, list]:
    losses = [stage.backward(batch, torch.tensor(0.5 + i)) for i, batch in enumerate(batches)]
    return losses, [p.grad for p in trained(stage.mixers).values()]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["by-hand", "graph"]
)
def test_recorded_gradients_are_the_stages_own(number, device, monkeypatch):
    """Of two recorded batches, one of another length between them, and one that is not dense."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu":
        monkeypatch.setattr(cuda_graph, "graphed", replayed_by_hand)
    padded = dense(70, device, seed=3)
    padded = Batch(padded.ids, padded.lengths - 5, (padded.ids < 35).float())
    batches = [dense(70, device, seed=1), dense(33, device, seed=2), padded]
    batches += [dense(70, device, seed=4)]
    if device == "cuda":
        batches = [batch.to(device) for batch in batches]
    want = accumulated(stage_of(number, device), batches)
    got = accumulated(RecordedStage(stage_of(number, device)), batches)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in want[1])


@pytest.mark.parametrize("number", [1, 3])
def test_what_a_recording_reads_stays(number, monkeypatch):
    """A graph knows addresses alone: what it read of the first batch, a temporary, must not be
    freed and become something else, the optimiser's counters for one.
    """

    def by_address(backward, example):
        inputs = {name: tensor.clone() for name, tensor in example.items()}
        kept.append(list(inputs.values()))
        loss = backward(**inputs)
        return lambda **_batch: loss  # as a graph: it holds nothing of what `backward` read

    kept, read = [], []
    monkeypatch.setattr(cuda_graph, "graphed", by_address)
    stage = stage_of(number, "cpu")
    plain = stage.backward

    def seen(batch, factor):
        read.extend(weakref.ref(tensor) for tensor in (batch.ids, batch.weights, batch.lengths))
        return plain(batch, factor)

    monkeypatch.setattr(stage, "backward", seen)
    recorded = RecordedStage(stage)
    recorded.backward(dense(70, "cpu", seed=1), 1.0)
    stage.loss(dense(70, "cpu", seed=2))  # validation: stage 1 forgets the batch that it had
    gc.collect()
    assert read and all(tensor() is not None for tensor in read)


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 3])
def test_a_replay_reads_nothing_that_was_freed(number):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    want = stage_of(number, "cuda")
    stage = stage_of(number, "cuda")
    recorded = RecordedStage(stage)
    others = []
    for seed in range(3):
        recorded.backward(dense(70, "cuda", seed=seed), 0.5)
        stage.loss(dense(70, "cuda", seed=9))
        others.append([torch.full((2, 70), 7.0, device="cuda") for _ in range(64)])  # over the old
        want.backward(dense(70, "cuda", seed=seed), 0.5)
    got = [p.grad for p in trained(stage.mixers).values()]
    plain = [p.grad for p in trained(want.mixers).values()]
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)


def test_a_recipe_that_cannot_be_recorded_is_refused(tmp_path, capsys):
    recipe = distilling.make(tmp_path)
    args = ["distill", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*args, "--set", "engine.cuda_graph=true"]) == 2
    assert "cuda_graph: one process on a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

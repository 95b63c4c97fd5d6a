"""The embedded default: whole, small, its checkpoint's own, and it sees the sample pictures."""

import re
from pathlib import Path

import pytest

import mmmamba_edge as mm
from mmmamba_edge.bundle import DEFAULT_BUNDLE, read_manifest
from mmmamba_edge.dialogue import SAMPLES, find_picture, sample_names

CHECKPOINT = Path(__file__).parents[1] / "distill/checkpoints/default"


@pytest.fixture(scope="module")
def runner():
    return mm.open_bundle(verify=True)


def ask(runner, name, question):
    """The answer about a sample picture."""
    return "".join(mm.stream(runner, question, images=[find_picture(name)], max_new_tokens=48))


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("panda", "What is in the picture?", "panda"),
        ("panda", "Is there a panda?", "yes"),
        ("panda", "Is there a car in the picture?", "no"),
        ("three-apples", "How many apples are there?", "3"),
        ("dog-and-car", "Is there a car?", "yes"),
        ("circle-and-square", "Describe the picture.", "a red circle and a blue square"),
        ("rocket-and-star", "Describe the picture.", "a rocket and a yellow star"),
        ("word-stop", "What does it say?", "stop"),
    ],
)
def test_it_sees_the_sample_pictures(runner, name, question, answer):
    assert answer in ask(runner, name, question).lower()


def test_it_talks_without_a_picture(runner):
    assert re.search("[a-z]{2,}", "".join(mm.stream(runner, "Hello!")))


def test_its_state_is_fixed(runner):
    """mmMamba-linear: no context limit, and the bytes of a new state are those of a used one."""
    assert runner.max_context is None
    session = mm.Session(runner)
    empty = runner.new_state().nbytes
    for question in ("What is this?", "Is there a dog?", "How many things are there?"):
        "".join(session.ask(question, images=[find_picture("fruit")]))
        assert session.stats.state_bytes == empty


def test_bundle_and_checkpoint_are_one_model():
    checkpoints = pytest.importorskip("mmmamba_edge.model.checkpoints")
    source = checkpoints.open_checkpoint(CHECKPOINT)
    manifest = read_manifest(DEFAULT_BUNDLE)
    assert manifest.model_id == source.weights_id()
    assert manifest.model == source.config
    parameters = sum(source.get(name).numel() for name in source.names())
    assert parameters <= 5_500_000


def test_sizes():
    """Bundle and samples fit into 12 MiB of wheel; the checkpoint is a file under 12 MiB."""
    shipped = [p for folder in (DEFAULT_BUNDLE, SAMPLES) for p in folder.rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in shipped) < 12 << 20
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 12 << 20
    assert 6 <= len(sample_names()) <= 8

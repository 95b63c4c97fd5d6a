"""Seeding: deterministic parts equal the original's bit for bit, random ones follow its law."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import golden
from mmmamba_edge.config import load_config
from mmmamba_edge.distill.seed import seed_checkpoint
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from tolerances import GOLDEN_LOGITS

TEACHER = golden.ROOT / "release_plain/teacher"
RANDOM = ("dt_bias", "g_proj.weight")


def test_seeded_tensors_and_logits_equal_the_original(tmp_path):
    seed_checkpoint(open_checkpoint(TEACHER), tmp_path / "out", seed=3)
    ours = open_checkpoint(tmp_path / "out")
    theirs = load_file(golden.ROOT / "release_plain/seed/seeded_new_keys.safetensors")
    assert {n for n in ours.names() if ".attention." in n and n not in theirs} == set()
    for name, want in theirs.items():
        if name.endswith("dt_bias"):
            for dt in (torch.nn.functional.softplus(x) for x in (want, ours.get(name))):
                assert ((dt >= 0.001 * 0.999) & (dt <= 0.1 * 1.001)).all()
        elif name.endswith("g_proj.weight"):
            bound = 2**-2.5 * math.sqrt(6 / 128)
            for gate in (want, ours.get(name)):
                assert 0.98 * bound < gate.abs().max() <= bound
        else:
            assert torch.equal(ours.get(name), want), name
    # with the original's draws in place of ours, its logits
    model = load_model(tmp_path / "out")
    state = model.state_dict()
    with torch.inference_mode():
        for name, want in theirs.items():
            if name.endswith(RANDOM):
                state[name].copy_(want)
        logits = model(**golden.inputs("release_plain", "one_tile"))
    want = load_file(golden.ROOT / "release_plain/seed/outputs.safetensors")["one_tile.logits"]
    torch.testing.assert_close(logits, want, **GOLDEN_LOGITS._asdict())


def test_the_seed_is_stored_and_reproduces(tmp_path):
    for name, seed, keep in (("a", 5, {0}), ("b", 5, set()), ("c", 6, set())):
        seed_checkpoint(open_checkpoint(TEACHER), tmp_path / name, keep, seed)
    assert json.loads((tmp_path / "a/seed.json").read_text())["seed"] == 5
    a, b, c = (open_checkpoint(tmp_path / name) for name in "abc")
    gate = "language_model.model.layers.1.attention.g_proj.weight"
    assert torch.equal(a.get(gate), b.get(gate))  # whatever other layers are seeded
    assert not torch.equal(b.get(gate), c.get(gate))
    assert load_config(tmp_path / "a").variant == "hybrid"
    assert a.config.layer_types == ("attention",) + ("mamba2",) * 4


def test_only_a_teacher_is_seeded(tmp_path):
    student = open_checkpoint(golden.ROOT / "release_plain/linear/final")
    with pytest.raises(UserError, match="seeding starts from a teacher"):
        seed_checkpoint(student, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"attention layers \[9\] do not exist; this model has 0..4"
    ):
        seed_checkpoint(open_checkpoint(TEACHER), tmp_path / "out", {9})

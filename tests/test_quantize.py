"""Quantising with calibration: rounding, GPTQ, folds, mixed precision; one set of codes for all."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from exported import ROOT, checkpoint, small_model
from mmmamba_edge.cli import main
from mmmamba_edge.config import StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.reference import embedded
from mmmamba_edge.export.to_onnx import export_onnx
from mmmamba_edge.export.verify import sqnr_db
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint, save_checkpoint
from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.quant import quantize_layers, quantize_sensitivity
from mmmamba_edge.quant.builtin_text import topics
from mmmamba_edge.quant.codes import MIN_SCALE, quantize_int4, quantize_int8
from mmmamba_edge.quant.folds import apply, rows_divided_by, sites
from mmmamba_edge.quant.gptq import product_error, quantize_gptq
from mmmamba_edge.quant.plan import make_plan
from mmmamba_edge.quant.quantize_data import Calibration, Sequence, balanced, digest
from mmmamba_edge.quant.quantize_layers import quantize_checkpoint
from mmmamba_edge.quant.quantize_sensitivity import load_sensitivity, measure_sensitivity
from mmmamba_edge.quant.quantize_units import Unit, measure_units, promoted
from mmmamba_edge.quant.rotation import turned
from mmmamba_edge.quant.rounding import nearest, quantize_clipped
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.quant.stored import CODES, FACTS, QuantizedCheckpoint
from mmmamba_edge.runtimes import open_bundle

VARIANTS = ("linear", "hybrid")


# --- rounding -------------------------------------------------------------------------------------


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights as trained ones: a few large among many small."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02


def inputs_of(columns: int, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs that depend on each other, some columns far larger."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    x = torch.randn(2048, columns) @ mixing * torch.linspace(-1.5, 1.5, columns).exp()
    return x.T @ x / len(x)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, None)])
def test_scales_keep_the_rules(bits, group):
    weight = heavy_tailed(48, 128)
    weight[3] = 0.0
    outputs = inputs_of(48, seed=2)
    outputs[3], outputs[:, 3] = 0.0, 0.0  # a row that makes up for no other
    for codes in (
        quantize_clipped(weight, bits, group),
        quantize_gptq(weight, inputs_of(128), bits, group),
        quantize_gptq(weight, inputs_of(128), bits, group, outputs=outputs),
    ):
        scale = torch.from_numpy(codes.scale)
        assert torch.equal(scale, scale.bfloat16().float()) and bool((scale >= MIN_SCALE).all())
        assert codes.scale.shape == (48, 128 // (group or 128))
        assert codes.codes.min() >= (-8 if bits == 4 else -127)
        assert codes.codes.max() <= (7 if bits == 4 else 127)
        assert not codes.codes[3].any()


def test_clipping_loses_less_than_rounding_up_to_the_largest():
    weight = heavy_tailed(64, 256)
    plain = quantize_int4(weight.numpy(), 32).dequantized()
    clipped = quantize_clipped(weight, 4, 32).dequantized()
    lost = [float(np.square(weight.numpy() - got).sum()) for got in (plain, clipped)]
    assert lost[1] < 0.9 * lost[0]


def test_gptq_uses_what_it_knows_of_the_inputs():
    """Far better than rounding each weight by itself where inputs depend on each other."""
    weight, hessian = heavy_tailed(96, 128), inputs_of(128)
    alone = product_error(weight, quantize_clipped(weight, 4, 32, hessian.diagonal()), hessian)
    together = product_error(weight, quantize_gptq(weight, hessian, 4, 32), hessian)
    assert together < 0.6 * alone


def test_gptq_of_independent_inputs_is_rounding():
    """With nothing to make up for by, the nearest code is the best one."""
    weight = heavy_tailed(16, 64)
    one = quantize_gptq(weight, torch.eye(64), 4, 32, passes=0)
    other = quantize_clipped(weight, 4, 32, torch.ones(64))
    assert np.array_equal(one.codes, other.codes) and np.array_equal(one.scale, other.scale)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, None)])
def test_descent_loses_less_in_every_row(bits, group):
    hessian, weight = inputs_of(128), torch.randn(96, 128) * 0.02
    weight[5, 32:64] = 0  # a group that has no scale of its own

    def lost(passes):
        codes = quantize_gptq(weight, hessian, bits, group, passes=passes)
        error = weight - torch.from_numpy(codes.dequantized())
        return ((error @ hessian) * error).sum(1)

    before, after = lost(0), lost(2)
    assert (after <= before * 1.03).all()  # they are compared under a damped Hessian
    assert after.sum() < 0.985 * before.sum()


def test_descent_with_rows_that_know_each_other_loses_less():
    weight, hessian, outputs = heavy_tailed(96, 128), inputs_of(128), inputs_of(96, seed=2)

    def lost(passes):
        codes = quantize_gptq(weight, hessian, 4, 32, outputs=outputs, passes=passes)
        error = weight - torch.from_numpy(codes.dequantized())
        return float((outputs @ error @ hessian * error).sum())

    assert lost(2) < 0.93 * lost(0)


def test_rows_make_up_for_rows_where_answers_depend_on_them_together():
    weight, hessian, outputs = heavy_tailed(96, 128), inputs_of(128), inputs_of(96, seed=2)

    def lost(codes):
        error = weight - torch.from_numpy(codes.dequantized())
        return float((outputs @ error @ hessian * error).sum())

    alone = quantize_gptq(weight, hessian, 4, 32)
    together = quantize_gptq(weight, hessian, 4, 32, outputs=outputs)
    assert lost(together) < 0.75 * lost(alone)


def test_rows_that_answers_do_not_depend_on_together_are_rounded_alone():
    weight, hessian = heavy_tailed(96, 128), inputs_of(128)
    alone = quantize_gptq(weight, hessian, 4, 32)
    diagonal = torch.linspace(1, 9, 96).diag()
    other = quantize_gptq(weight, hessian, 4, 32, outputs=diagonal)
    assert np.array_equal(alone.codes, other.codes) and np.array_equal(alone.scale, other.scale)


def test_gptq_takes_inputs_that_are_never_there():
    """A column that is always zero, and a Hessian of rank 1."""
    hessian = torch.zeros(64, 64)
    hessian[:10, :10] = torch.ones(10, 10)
    codes = quantize_gptq(heavy_tailed(8, 64), hessian, 4, 32)
    assert np.isfinite(codes.dequantized()).all()


def test_gptq_refuses_what_is_not_finite():
    weight = heavy_tailed(4, 64)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_gptq(weight, torch.eye(64), 4, 32)


# --- folds and rotation ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba2", "attention"])
@pytest.mark.parametrize("index", range(4))
def test_a_fold_changes_no_answer(kind, index):
    stack = StackConfig(64, 96, 4, 2, 1e-5, 10000.0, 128, (kind,))
    torch.manual_seed(index)
    layer = DecoderLayer(stack, kind)
    x = torch.randn(1, 20, 64)
    site = sites(kind)[index]
    tensors = {name: p.detach().clone() for name, p in layer.named_parameters()}
    width = layer.get_submodule(site.probe).in_features
    scales = torch.rand(width) * 3 + 0.3
    if site.name == "wo":  # heads of a group read one value
        scales = scales.view(2, 2, 16)[:, :1].expand(2, 2, 16).reshape(-1)
    with torch.no_grad():
        wanted = layer(x, None)
        apply(site, tensors, scales, stack)
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            layer.get_submodule(parent)._parameters[leaf] = nn.Parameter(tensor)
        assert not torch.equal(tensors[site.coded[0]], wanted)
        torch.testing.assert_close(layer(x, None), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "index"), [("attention", 1), ("attention", 3), ("mamba2", 3)])
def test_what_a_fold_divides_the_rows_of_a_matrix_by(kind, index):
    """Where the writer is a matrix, gradients at its product grow by what its rows shrink by."""
    stack = StackConfig(64, 96, 4, 2, 1e-5, 10000.0, 128, (kind,))
    site = sites(kind)[index]
    layer = DecoderLayer(stack, kind)
    tensors = {name: p.detach().clone() for name, p in layer.named_parameters()}
    before = tensors[site.writer]
    scales = torch.rand(layer.get_submodule(site.probe).in_features) * 3 + 0.3
    if site.name == "wo":
        scales = scales.view(2, 2, 16)[:, :1].expand(2, 2, 16).reshape(-1)
    apply(site, tensors, scales, stack)
    rows = rows_divided_by(site, scales, stack, len(before))
    assert not torch.equal(tensors[site.writer], before)
    torch.testing.assert_close(tensors[site.writer] * rows[:, None], before)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 64)])
def test_folds_round_as_the_codes_do(bits, group):
    weight = heavy_tailed(48, 192)
    weight[3] = 0
    codes = quantize_int4(weight.numpy(), group) if group else quantize_int8(weight.numpy())
    assert np.array_equal(nearest(weight, bits, group).numpy(), codes.dequantized())


@pytest.mark.parametrize("kind", ["full", "pairs"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turned_model_answers_alike(variant, kind, tmp_path):
    source = open_checkpoint(checkpoint("small", variant))
    save_checkpoint(tmp_path / "turned", source.config, turned(source, kind))
    pixels = torch.randn(1, 3, 56, 56)
    ids = torch.randint(8, 300, (1, 30))
    ids[0, 3 : 3 + source.config.tokens_per_tile] = source.config.img_context_token_id
    with torch.inference_mode():
        plain = load_model(source, dtype=torch.float32)(ids, pixels)
        other = load_model(tmp_path / "turned", dtype=torch.float32)(ids, pixels)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    name = "embedding_model.encoder.0.feed_forward.w1.weight"
    assert not torch.allclose(
        open_checkpoint(tmp_path / "turned").get(name), source.get(name), atol=1e-3
    )


# --- calibration ----------------------------------------------------------------------------------


def test_pictures_and_text_have_the_same_mass_and_answers_twice_their_number():
    ids = np.array([1, 7, 7, 7, 7, 7, 7, 2, 3, 4])  # 7: the image token
    answer = np.arange(10) >= 8
    (weights,) = balanced([Sequence(ids, None, answer)], image_id=7)
    assert weights.mean() == pytest.approx(1)
    assert weights[ids == 7].sum() == pytest.approx(weights[ids != 7].sum())
    assert weights[8] == pytest.approx(2 * weights[7])


def test_halves_of_the_builtin_text_never_meet():
    ours, theirs = dict(topics("calibration")), dict(topics("evaluation"))
    assert not ours.keys() & theirs.keys()
    for half in (ours, theirs):
        assert sum(map(len, half.values())) > 150_000


# --- whole checkpoints ----------------------------------------------------------------------------


@cache
def data() -> Calibration:
    """Random ids, and a picture: what counts is that they are read."""
    rng = np.random.default_rng(0)
    sequences = []
    for tiles in (0, 1, 0):
        ids = rng.integers(8, 300, 40)
        pixels = None
        if tiles:
            ids[2:6] = 7
            pixels = rng.standard_normal((1, 3, 56, 56)).astype(np.float32)
        sequences.append(Sequence(ids, pixels, np.zeros(40, np.bool_)))
    return Calibration(sequences, balanced(sequences, 7), "test", digest(sequences))


@cache
def quantized(variant: str, scheme: str) -> Path:
    """The small model's codes; of mixed with one product in 8 bits."""
    out = ROOT / f"quantized-{variant}-{scheme}"
    plan = make_plan(scheme)
    if scheme == "mixed":
        name = "language_model.model.layers.1.feed_forward.w2.weight"
        plan = plan.promote({name: "to see that it goes through"})
    quantize_checkpoint(open_checkpoint(checkpoint("small", variant)), out, plan, data())
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheme", ["int8", "mixed"])
def test_it_opens_as_the_checkpoint_that_its_codes_stand_for(variant, scheme):
    opened = open_checkpoint(quantized(variant, scheme))
    assert isinstance(opened, QuantizedCheckpoint)
    assert opened.weights_id() == open_checkpoint(checkpoint("small", variant)).weights_id()
    ids = torch.randint(8, 300, (1, 24))
    with torch.inference_mode():
        got = load_model(opened)(ids)
        want = small_model(variant)(ids)
    noise = float((got - want).square().sum() / want.square().sum())
    assert noise < (1e-3 if scheme == "int8" else 0.1)
    assert noise > 0


def test_what_stays_and_why():
    opened = open_checkpoint(quantized("linear", "mixed"))
    assert isinstance(opened, QuantizedCheckpoint)
    facts = opened.facts
    bits = {name: coding.bits for name, coding in facts.matrices.items()}
    assert bits["language_model.model.layers.1.feed_forward.w2.weight"] == 8
    assert bits["language_model.model.layers.0.feed_forward.w2.weight"] == 4
    assert bits["language_model.output.weight"] == 8
    assert not any(name.endswith(("in_proj.weight", "norm.weight")) for name in bits)
    assert all(coding.reason for coding in facts.matrices.values())
    assert 4.5 < facts.bits_per_weight < 8


@pytest.mark.parametrize("algorithm", ["gptq", "fisher"])
def test_a_killed_run_goes_on_behind_its_last_layer(algorithm, tmp_path, monkeypatch):
    """The same bytes as one that was never stopped; layers that are done are not done again."""
    source, out = open_checkpoint(checkpoint("small", "linear")), tmp_path / "out"
    plan, done = make_plan("int4", algorithm=algorithm), []

    class Killed(BaseException):
        pass

    plain = quantize_layers._quantized

    def count(*args):
        if len(done) == 3:
            raise Killed
        done.append(plain(*args))
        return done[-1]

    monkeypatch.setattr(quantize_layers, "_quantized", count)
    with pytest.raises(Killed):
        quantize_checkpoint(source, out, plan, data())
    assert not out.exists()
    assert sorted(p.name for p in (tmp_path / "out.working").glob("layer-*"))[-1].startswith(
        "layer-002"
    )
    monkeypatch.setattr(quantize_layers, "_quantized", plain)
    resumed = quantize_checkpoint(source, out, plan, data())
    whole = quantize_checkpoint(source, tmp_path / "whole", plan, data())
    assert resumed == whole
    for name in (CODES, FACTS, "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.working").exists()


def test_layers_of_another_plan_are_not_taken(tmp_path):
    source, out = open_checkpoint(checkpoint("small", "linear")), tmp_path / "out"
    working = quantize_layers._open_working(source, out, make_plan("int4"), data())
    (working / "layer-000.safetensors").write_bytes(b"")
    quantize_layers._open_working(source, out, make_plan("int8"), data())
    assert not (working / "layer-000.safetensors").exists()


# --- what answers depend on -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalized", [False, True])
def test_sensitivity_is_the_gradient_of_drawn_tokens(variant, normalized, tmp_path, monkeypatch):
    """A layer at a time, pictures too, it is what one backward pass of the whole model says."""
    monkeypatch.setattr(quantize_sensitivity, "quick", lambda _device: nullcontext())
    source = open_checkpoint(checkpoint("small", variant))
    source.config = replace(source.config, normalize_encoder_output=normalized)
    calibration, tokens = data(), sum(len(s.ids) for s in data().sequences)
    weights = Weights(source, SCHEMES["none"])
    hidden = embedded(weights, [(s.ids, s.pixels) for s in calibration.sequences])
    measure_sensitivity(weights, hidden, calibration, tmp_path, seed=3)

    model = load_model(source, dtype=torch.float32)
    said, generator = {}, torch.Generator().manual_seed(3)
    for name in ("0.feed_forward.w3", "1.feed_forward.w1"):
        module = model.embedding_model.encoder.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: said.__setitem__(name, out))
    wanted = dict.fromkeys(("0.feed_forward.w3", "1.feed_forward.w1"), torch.zeros(192, 192))
    for one, weight in zip(calibration.sequences, calibration.weights, strict=True):
        pixels = None if one.pixels is None else torch.from_numpy(one.pixels)
        logp = model(torch.from_numpy(one.ids)[None], pixels)[0].log_softmax(-1)
        drawn = torch.multinomial(logp.exp().detach(), 1, generator=generator)
        loss = -(logp.gather(1, drawn)[:, 0] * torch.from_numpy(weight).sqrt()).sum()
        for name, g in zip(said, torch.autograd.grad(loss, list(said.values())), strict=True):
            wanted[name] = wanted[name] + g[0].T @ g[0] / tokens
    like = [torch.from_numpy(w) for w in calibration.weights]
    for name, matrix in wanted.items():
        index, _, name = name.partition(".")
        found = load_sensitivity(tmp_path, int(index), like)
        assert found is not None
        scale = float(matrix.abs().max())
        torch.testing.assert_close(
            found.outputs[f"{name}.weight"] / scale, matrix / scale, rtol=1e-3, atol=2e-2
        )  # inputs are kept in bfloat16
        weights = torch.cat(found.tokens["w2"])
        assert weights.mean() == pytest.approx(1, rel=1e-4) and bool((weights >= 0).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_lose_less_by_what_they_depend_on(variant, tmp_path):
    """KL on other tokens than were read."""
    source = open_checkpoint(checkpoint("small", variant))
    rng = np.random.default_rng(0)
    sequences = [
        Sequence(rng.integers(8, 300, 64), None, np.zeros(64, np.bool_)) for _ in range(64)
    ]
    read = Calibration(sequences, balanced(sequences, 7), "test", digest(sequences))
    ids = torch.from_numpy(rng.integers(8, 300, (8, 64)))
    kl = {}
    with torch.inference_mode():
        p = load_model(source, dtype=torch.float32)(ids).log_softmax(-1)
    for algorithm in ("gptq", "fisher"):
        out = tmp_path / algorithm
        quantize_checkpoint(source, out, make_plan("int4", algorithm=algorithm), read)
        with torch.inference_mode():
            q = load_model(out)(ids).log_softmax(-1)
        kl[algorithm] = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl["fisher"] < 0.98 * kl["gptq"]


# --- one set of codes -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_bundles_hold_the_codes_of_the_safetensors(variant, tmp_path):
    """Byte for byte: the file, ONNX initialisers, the .pte; both exporters say its digest."""
    pytest.importorskip("executorch")
    pytest.importorskip("torchao")
    from mmmamba_edge.export.to_executorch import export_executorch

    folder = quantized(variant, "mixed")
    opened = open_checkpoint(folder)
    assert isinstance(opened, QuantizedCheckpoint)
    written: list[Manifest] = [
        export_onnx(folder, tmp_path / "onnx"),
        export_executorch(folder, tmp_path / "pte"),
    ]
    for manifest in written:
        assert manifest.settings["codes_sha256"] == opened.facts.digest
        assert manifest.quant == "int4" and manifest.settings["quantized"]["scheme"] == "mixed"
    stored = load_file(folder / CODES)
    graph = onnx.load(tmp_path / "onnx" / "decoder.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    pte = (tmp_path / "pte" / "model.pte").read_bytes()
    checked = 0
    for name, coding in opened.facts.matrices.items():
        label = name.removesuffix(".weight")
        if not name.endswith(("w2.weight", "o_proj.weight", "wo.weight")):
            continue  # others share a product with their neighbours
        codes, scale = stored[f"{name}.codes"], stored[f"{name}.scale"]
        wide = (scale.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        packed = arrays[f"{label}.codes"]
        scales = arrays[f"{label}.scales"]
        if coding.bits == 4:
            assert np.array_equal(packed, codes) and np.array_equal(scales, wide)
            assert codes.tobytes() in pte and scale.tobytes() in pte
        else:
            assert np.array_equal(packed.reshape(len(codes), -1), codes)
            assert (codes ^ np.uint8(0x80)).tobytes() in pte
        checked += 1
    assert checked == 8


def test_a_quantised_checkpoint_says_its_scheme_itself(tmp_path):
    with pytest.raises(UserError, match="codes already"):
        export_onnx(quantized("linear", "mixed"), tmp_path / "b", quant="int8")


# --- mixed precision ------------------------------------------------------------------------------


def test_budget_goes_where_most_is_lost_for_a_bit():
    units = [
        Unit(("a",), 100, 4.5, 8.0, kl=0.1),
        Unit(("b1", "b2"), 1000, 4.5, 8.0, kl=0.5),  # less for a bit than a, more than c
        Unit(("c",), 100, 4.5, 8.0, kl=0.01),
    ]
    assert list(promoted(units, 4.5)) == []
    assert list(promoted(units, 4.5 + 350 / 1200)) == ["a"]
    assert list(promoted(units, 4.5 + 700 / 1200)) == ["a", "c"]  # b no longer fits
    assert list(promoted(units, 8.0)) == ["a", "b1", "b2", "c"]
    assert "0.1 nats" in promoted(units, 8.0)["a"]


def test_units_know_what_a_spoilt_matrix_costs():
    """A matrix of outliers loses more than its neighbours."""
    source = open_checkpoint(checkpoint("small", "linear"))
    units = measure_units(source, make_plan("mixed"), data())
    assert len(units) == 4 * 4 and all(unit.kl >= 0 for unit in units)
    assert units[0].names[0].startswith("embedding_model.encoder.0.attention.")
    assert units[0].bits4 == 4.5 and units[0].bits8 == 8 + 16 / 128


# --- plans and the verb ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 5", "bits is 5; expected 4 or 8"),
        ("group = 48", "group is 48"),
        ("wide = 1", "unknown key wide"),
        ('[[rule]]\nmatch = "*"\nbits = 3', "rule 1: expected match"),
        ('[[rule]]\nmatch = "*"\nbits = 8\nwhy = "x"', "rule 1: unknown key why"),
        ("bits = ", "cannot be read as TOML"),
    ],
)
def test_a_bad_plan_is_named(text, message, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        make_plan(str(path))


def test_rules_decide_by_name(tmp_path):
    path = tmp_path / "heads.toml"
    path.write_text('[[rule]]\nmatch = "*.w2.weight"\nbits = 8\nreason = "long tails"\n')
    plan = make_plan(str(path))
    assert plan.choice("x.feed_forward.w2.weight").bits == 8
    assert plan.choice("x.feed_forward.w2.weight").reason == "long tails"
    assert plan.choice("x.feed_forward.w1.weight").bits == 4
    assert plan.choice("x.attention.in_proj.weight").bits == 0


def test_one_product_has_one_kind_of_codes(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('[[rule]]\nmatch = "*.w1.weight"\nbits = 8\n')
    source = open_checkpoint(checkpoint("small", "linear"))
    with pytest.raises(UserError, match=r"w1\.weight 8, .*w3\.weight 4"):
        quantize_checkpoint(source, tmp_path / "out", make_plan(str(path)), data())
    assert not (tmp_path / "out").exists()


def test_the_verb_on_the_embedded_model(tmp_path, capsys):
    """From conversations with pictures to a bundle that is verified."""
    samples = Path("mmmamba_edge/assets/samples")
    picture = sorted(samples.glob("*.png"))[0]
    (tmp_path / picture.name).write_bytes(picture.read_bytes())
    talk = [
        {"from": "human", "value": "<image>\nWhat is in the picture?"},
        {"from": "gpt", "value": "a red circle."},
    ]
    row = {"image": picture.name, "conversations": talk}
    (tmp_path / "talk.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    out = tmp_path / "q"
    default = next(Path("distill/checkpoints").glob("*/config.json")).parent
    command = ["quantize", str(default), "--scheme", "int8", "--out", str(out)]
    assert main([*command, "--calibration", str(tmp_path / "talk.jsonl"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["scheme"] == "int8" and said["calibration"]["tokens"] > 400
    assert said["codes_sha256"] == open_checkpoint(out).facts.digest  # pyright: ignore
    assert main([*command, "--json"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_text_that_the_tokenizer_only_spells_is_refused(tmp_path, capsys):
    default = next(Path("distill/checkpoints").glob("*/config.json")).parent
    command = ["quantize", str(default), "--scheme", "int8", "--out", str(tmp_path / "q")]
    assert main(command) == 2
    assert "this model's tokenizer spells it out" in capsys.readouterr().err


# --- rounded while loading ------------------------------------------------------------------------


@pytest.mark.parametrize(("runtime", "low", "high"), [("torch-int8", 30, 60), ("torch-nf4", 8, 30)])
def test_layers_rounded_while_loading(runtime, low, high):
    """bitsandbytes' int8 and NF4 in PyTorch: near, not equal; named in what sessions compare."""
    pytest.importorskip("bitsandbytes")
    folder = checkpoint("small", "hybrid")
    ids = np.random.default_rng(3).integers(8, 300, 40)
    plain, _ = open_bundle(folder, "torch").prefill(ids)
    runner = open_bundle(folder, runtime)
    got, state = runner.prefill(ids)
    assert low < sqnr_db(got, plain) < high
    assert runner.quant == f"bnb-{runtime.removeprefix('torch-')}"
    again, _ = runner.step(9, state)
    assert np.isfinite(again).all()

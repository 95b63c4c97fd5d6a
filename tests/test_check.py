"""`check`: good bundles pass, each fault fails and is named, and its figures are what they say."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import faults
from exported import ROOT, bundle, checkpoint
from mmmamba_edge.bundle import DEFAULT_BUNDLE, read_manifest
from mmmamba_edge.cli import main
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.to_onnx import export_onnx
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.model.checkpoints import open_checkpoint
from mmmamba_edge.quant import accuracy, thresholds
from mmmamba_edge.quant.accuracy import ANSWER, TEXT, Estimate, Scores
from mmmamba_edge.quant.check_data import collect
from mmmamba_edge.quant.check_faults import compare
from mmmamba_edge.quant.check_page import page
from mmmamba_edge.quant.check_report import as_text
from mmmamba_edge.quant.check_run import check
from mmmamba_edge.quant.codes import Codes, quantize_int4
from mmmamba_edge.quant.held_matrices import Matrix
from mmmamba_edge.quant.plan import make_plan
from mmmamba_edge.quant.quantize_data import Calibration, Sequence, balanced, digest
from mmmamba_edge.quant.quantize_layers import quantize_checkpoint
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.runtimes import open_bundle

REFERENCE = Path(__file__).parents[1] / "distill/checkpoints/default"

# Random weights are near ties everywhere, so that their likeliest token changes at a breath.
LOOSE = {"top1": 0.5}


def checked(folder, variant="linear", **options):
    options = {"tokens": 600, "timed": False, "thresholds": LOOSE, **options}
    return check(folder, checkpoint("small", variant), **options)


# --- good bundles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
@pytest.mark.parametrize("quant", ["none", "fp16", "int8", "int4"])
@pytest.mark.parametrize("ops", ["com.microsoft", "standard"])
def test_good_bundles_pass(variant, quant, ops):
    report = checked(bundle("small", variant, quant, ops), variant)
    assert report["failures"] == [] and report["verdict"] == "passed"
    assert not report["weights"]["not_found"] and report["weights"]["compared"] > 50
    assert len(report["layers"]["halves"]) == 8
    assert report["bundle"]["runtime"] == "onnxruntime"


def test_a_checkpoint_in_pytorch_is_its_own_reference():
    report = checked(checkpoint("small", "hybrid"), "hybrid", runtime="torch")
    assert report["verdict"] == "passed"
    assert report["figures"]["mean_kld"]["value"] < 1e-10


def fold_norm(state):
    """Out of the norm into the columns behind it: nothing changes."""
    scales = torch.linspace(0.5, 2, 128)
    state[f"{faults.LAYER}attention_norm.weight"] /= scales
    for name in ("q_proj", "k_proj", "v_proj", "g_proj", "in_proj"):
        state[f"{faults.LAYER}attention.{name}.weight"] *= scales


def drop_fold(state):
    """Into the columns, and out of nothing."""
    kept = state[f"{faults.LAYER}attention_norm.weight"].clone()
    fold_norm(state)
    state[f"{faults.LAYER}attention_norm.weight"].copy_(kept)


def fold_rows(state):
    """Out of the rows of w3 into the columns of w2, and of the values into wo where they are."""
    scales = torch.linspace(0.5, 2, 192)
    state[f"{faults.LAYER}feed_forward.w3.weight"] /= scales[:, None]
    state[f"{faults.LAYER}feed_forward.w2.weight"] *= scales
    packed = "embedding_model.encoder.1.attention.wqkv.weight"
    if packed in state:
        values = state[packed].unflatten(0, (2, 4, 32))[:, -1]
        factors = torch.linspace(0.5, 2, 64).view(2, 32)
        values /= factors[..., None]
        state[packed.replace("wqkv", "wo")] *= factors.repeat_interleave(2, dim=0).flatten()


@pytest.mark.parametrize(("variant", "fold"), [("linear", fold_norm), ("hybrid", fold_rows)])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_folds_are_followed(variant, fold, quant):
    report = checked(faults.remade(variant, fold, quant, fold.__name__), variant)
    assert report["failures"] == []


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_gptq_and_its_folds_pass(variant, scheme, tmp_path):
    """Far too little calibration moves weights far: still no fault."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(8, 300, 60) for _ in range(2)]
    sequences = [Sequence(one, None, np.zeros(60, bool)) for one in ids]
    data = Calibration(sequences, balanced(sequences, 7), "test", digest(sequences))
    source = checkpoint("small", variant)
    quantize_checkpoint(open_checkpoint(source), tmp_path / "q", make_plan(scheme), data)
    manifest = export_onnx(tmp_path / "q", tmp_path / "b", reference=source)
    assert manifest.verification["accuracy"]["file"] == "accuracy.json"
    report = checked(tmp_path / "b", variant, thresholds={"top1": 0.3})
    assert report["failures"] == []
    other = checkpoint("small", "hybrid" if variant == "linear" else "linear")
    with pytest.raises(UserError, match="give the checkpoint that was quantised"):
        export_onnx(tmp_path / "q", tmp_path / "c", reference=other)
    assert "accuracy" not in export_onnx(tmp_path / "q", tmp_path / "d").verification


# --- faults ---------------------------------------------------------------------------------------


def failing(report):
    assert report["verdict"] == "failed"
    return "\n".join(report["failures"])


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_wrong_scale_in_one_layer(quant):
    name = f"{faults.LAYER}feed_forward.w2"
    broken = faults.edited(bundle("small", "linear", quant), f"{name}.scales", lambda x: 2 * x, "a")
    said = failing(checked(broken))
    assert f"{name}.weight: weights: all its numbers are 2 times what they should be" in said
    assert "layer 2, feed_forward: " in said  # and the layer's added error, without the weights
    assert "layer 2, mix" not in said and "layer 3, mix" not in said
    if quant == "int8":  # the first state behind it; of int4 the rounding hides it
        assert "layer 3, conv: signal to error (dB) of the state" in said


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_one_wrong_scale_among_many(quant):
    """Of a row, and of one group in it: nothing that an average would show."""
    name = f"{faults.LAYER}feed_forward.w1w3"

    def change(scales):
        scales[7] = scales[7] * np.where(np.arange(scales.shape[1]) < 2, 2, 1)
        if quant == "int8":
            scales[7] = scales[7, 0]
        return scales

    broken = faults.edited(bundle("small", "linear", quant), f"{name}.scales", change, "one")
    said = failing(checked(broken))
    assert f"{faults.LAYER}feed_forward.w1.weight: weights: scale of row 7" in said
    assert re.search(r"is (1\.9|2\.0)\d? times what its weights call for", said)


def test_swapped_nibbles():
    name = f"{faults.LAYER}attention.o_proj"
    broken = faults.edited(
        bundle("small", "linear", "int4"), f"{name}.codes", lambda x: (x << 4) | (x >> 4), "nibbles"
    )
    said = failing(checked(broken))
    assert f"{name}.weight: weights: neighbouring codes are swapped" in said
    assert "layer 2, mix" in said


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_dropped_fold(quant):
    report = checked(faults.remade("linear", drop_fold, quant, "dropped"))
    said = failing(report)
    assert f"{faults.LAYER}attention.q_proj.weight: weights: its columns are multiplied by" in said
    assert "a fold was done by half" in said
    assert f"{faults.LAYER}attention.in_proj.weight" in said  # dt, which is float32
    assert "layer 2, mix" in said


def test_weights_that_a_method_clips_are_no_wrong_scale():
    """One column of much larger inputs may choose a group's scale, and the rest is clipped."""
    rng = np.random.default_rng(0)
    want = rng.standard_normal((64, 128)).astype(np.float32)
    alike = rng.uniform(0.8, 1.0, (64, 32)) * rng.choice([-1, 1], (64, 32))
    want[:, 32:64] = np.where(np.arange(32) < 24, alike, alike / 4)
    codes = quantize_int4(want, 32)
    scale = codes.scale.copy()
    scale[:, 1] *= 0.6
    rounded = np.rint(want.reshape(64, 4, 32) / scale[..., None]).clip(-7, 7).astype(np.int8)
    clipped = Codes(rounded.reshape(64, 128), scale, 4)
    wrong = Codes(codes.codes, scale, 4)
    assert not compared(clipped, want).fault
    assert "group 1 is 0.60" in compared(wrong, want).fault


def test_weights_moved_at_random_are_no_wrong_scale():
    """Among very many groups of small weights a few seem larger: one of SmolLM2's did."""
    rng = np.random.default_rng(0)
    want = rng.standard_normal((4000, 640)).astype(np.float32)
    want[:, ::32] *= 5  # they choose the scale
    codes = quantize_int4(want, 32)
    steps = want.reshape(4000, 20, 32) / codes.scale[..., None]
    moved = np.rint(steps + 0.55 * rng.standard_normal(steps.shape)).clip(-7, 7).astype(np.int8)
    assert not compared(Codes(moved.reshape(want.shape), codes.scale, 4), want).fault
    scale = codes.scale.copy()
    scale[7, 3] *= 1.5
    assert "row 7, group 3 is 1." in compared(Codes(codes.codes, scale, 4), want).fault


def compared(codes, want):
    def read(start, stop):
        return Codes(codes.codes[start:stop], codes.scale[start:stop], 4)

    found = compare("w", Matrix(*want.shape, 4, 32, read), want)
    assert found is not None
    return found


def test_other_numbers_altogether():
    name = f"{faults.LAYER}attention.o_proj"
    broken = faults.edited(
        bundle("small", "linear", "int8"), f"{name}.codes", lambda x: x[::-1], "reversed"
    )
    assert f"{name}.weight: weights: " in failing(checked(broken))


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_bfloat16_state(quant):
    folder = bundle("small", "linear", quant)
    report = checked(folder, opener=lambda *args: faults.CoarseState(open_bundle(*args)))
    said = failing(report)
    for layer in range(4):
        assert f"layer {layer}, ssm: state in float32: every number of it fits bfloat16" in said
    if quant == "none":
        assert "whole against step by step" in said


def test_logits_that_are_no_numbers():
    class Broken(faults.CoarseState):
        def _coarse(self, result):
            logits, state = result
            return np.where(np.arange(logits.shape[-1]) == 3, np.nan, logits), state

    report = checked(bundle("small", "linear"), opener=lambda *a: Broken(open_bundle(*a)))
    assert re.search(r"logits: [\d,]+ positions have logits that are not numbers", failing(report))
    json.dumps(report, allow_nan=False)


# --- ExecuTorch -----------------------------------------------------------------------------------


def test_executorch():
    """A .pte passes, by itself and beside the ONNX bundle of the same codes."""
    from pte_bundle import pte_bundle

    folder = pte_bundle("small", "linear", "int8")
    report = checked(folder, other=bundle("small", "linear", "int8"))
    assert report["failures"] == []
    assert report["bundle"]["runtime"] == "executorch"
    assert report["layers"]["halves"] == [] and len(report["layers"]["states_db"]) == 8
    assert report["other"]["codes"]["equal"] == 17 and not report["other"]["codes"]["different"]
    assert "hides" in report["layers"]["note"] and "hides" in report["weights"]["note"]
    alone = checked(folder / "model.pte")
    assert alone["figures"] == report["figures"]


def test_a_fault_in_a_pte_is_placed_by_its_states():
    """Codes of one matrix the wrong way round: the layer behind it is named, and beside the ONNX
    bundle the matrix."""
    from pte_bundle import pte_bundle

    ours = bundle("small", "linear", "int8")
    folder = pte_bundle("small", "linear", "int8")
    weights = Weights(open_checkpoint(checkpoint("small", "linear")), SCHEMES["int8"])
    codes = weights.codes("embedding_model.encoder.1.feed_forward.w2.weight").codes
    data = (folder / "model.pte").read_bytes()
    assert data.count(codes.tobytes()) == 1
    file = ROOT / "wrong.pte"
    file.write_bytes(data.replace(codes.tobytes(), codes[::-1].tobytes()))
    said = failing(checked(file, other=ours))
    assert "layer 2, conv: signal to error (dB) of the state" in said
    assert "embedding_model.encoder.1.feed_forward.w2: one set of codes" in said


# --- two bundles ----------------------------------------------------------------------------------


def test_beside_another_bundle():
    ours = bundle("small", "linear", "int8")
    report = checked(ours, other=bundle("small", "linear", "int8", "standard"))
    assert report["verdict"] == "passed"
    assert report["other"]["codes"] == {"equal": 17, "different": [], "note": ""}
    broken = faults.edited(ours, f"{faults.LAYER}feed_forward.w2.scales", lambda x: 1.3 * x, "b")
    said = failing(checked(ours, other=broken))
    assert f"{faults.LAYER}feed_forward.w2: one set of codes: its codes or scales are not" in said


# --- figures --------------------------------------------------------------------------------------


def scored(kld, unit=accuracy.UNIT):
    """A table of these divergences, all else equal."""
    n = len(kld)
    zero = np.zeros(n)
    columns = accuracy.Columns(kld, np.ones(n, bool), np.ones(n), zero, zero)
    return accuracy.Table(columns, np.zeros(n, np.uint8), np.zeros(n, int), np.arange(n))


def test_figures_are_those_of_the_distributions():
    rng = np.random.default_rng(0)
    want = rng.standard_normal((40, 11)).astype(np.float32) * 3
    got = want + rng.standard_normal((40, 11)).astype(np.float32) * 0.3
    following = rng.integers(0, 11, 40)
    found = accuracy.compare(got, want, following)
    p, q = (torch.from_numpy(x).double().log_softmax(1) for x in (want, got))
    kld = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(found.kld, kld, rtol=1e-10)
    np.testing.assert_allclose(found.nll, -q[np.arange(40), following], rtol=1e-12)
    assert (found.same == (got.argmax(1) == want.argmax(1))).all()
    top = [set(np.argsort(-row)[:5]) for row in want], [set(np.argsort(-row)[:5]) for row in got]
    assert found.top5.tolist() == [len(a & b) / 5 for a, b in zip(*top, strict=True)]
    equal = accuracy.compare(want, want, following)
    assert (equal.kld == 0).all() and equal.same.all() and (equal.top5 == 1).all()


def test_intervals_cover_correlated_positions():
    """95 % of the intervals hold the true mean, though neighbours are alike; singles' do not."""
    rng = np.random.default_rng(0)
    units, hits, naive = 60, 0, 0
    for trial in range(200):
        # Divergences of mean 1 whose logarithms share most within 32 positions.
        level = np.repeat(rng.standard_normal(units * 4), 32)
        kld = np.exp(0.8 * level + 0.6 * rng.standard_normal(len(level)) - 0.5)
        table = scored(kld)
        found = accuracy.Draws(table, trial).mean(kld)
        hits += found.low <= 1 <= found.high
        error = 1.96 * kld.std() / np.sqrt(len(kld))
        naive += abs(kld.mean() - 1) <= error
    assert 180 <= hits <= 199  # 190 are expected, give or take 3
    assert naive < 120


def test_quantiles_and_their_intervals():
    kld = np.random.default_rng(1).exponential(1, 20_000)
    found = accuracy.figures(scored(kld))
    assert found["median_kld"].low < np.log(2) < found["median_kld"].high
    assert found["p99_kld"].low < np.log(100) < found["p99_kld"].high
    assert found["p999_kld"].low < np.log(1000) < found["p999_kld"].high


def test_positions_are_counted_in_buckets():
    rows = accuracy.by_position(scored(np.ones(5000)))
    assert [(row["first"], row["count"]) for row in rows] == [
        (0, 64), (64, 192), (256, 768), (1024, 3072), (4096, 904),
    ]  # fmt: skip
    assert all(row["mean_kld"] == 1 for row in rows)


def test_flips():
    found = accuracy.flips([True, False, True, True] * 50, [True, True, False, True] * 50)
    assert found["accuracy"].value == found["reference_accuracy"].value == 0.75
    assert found["flips"].value == 0.5 and found["delta"].value == 0
    assert found["flips"].low < 0.5 < found["flips"].high


def test_the_worst_positions_are_no_neighbours():
    scores = Scores()
    want = np.zeros((200, 5), np.float32)
    got = want.copy()
    got[50:54, 0], got[120, 1] = 9, 5
    kinds = np.full(200, TEXT, np.uint8)
    scores.add(0, np.arange(200), kinds, got, want, np.zeros(200, np.int64))
    worst = scores.worst()
    assert worst[0].position in range(50, 54) and worst[1].position == 120
    assert worst[0].got[0][0] == 0 and worst[0].got[0][1] > 0.99


# --- judging --------------------------------------------------------------------------------------


def test_the_whole_interval_must_pass():
    good = thresholds.judge("mean_kld", Estimate(1, 0.9, 1.1), 1.1)
    wide = thresholds.judge("mean_kld", Estimate(1, 0.9, 1.2), 1.1)
    low = thresholds.judge("top1", Estimate(0.98, 0.96, 0.99), 0.97)
    assert good.state == "passed"
    assert wide.state == low.state == "failed" and "score more positions" in wide.why
    assert thresholds.judge("mean_kld", Estimate(np.nan, np.nan, np.nan), 1).state == "failed"
    assert thresholds.judge("p999_kld", Estimate(9, 9, 9), 1, "too few").state == "not judged"


def test_limits_come_from_scheme_bundle_and_user():
    runner = open_bundle(DEFAULT_BUNDLE)
    found, where = thresholds.limits(runner.manifest, {"top1": 0.5})
    assert found["mean_kld"] == 0.004 and where["mean_kld"] == "int8 weights and activations"
    assert found["top1"] == 0.5 and where["top1"] == "--thresholds"
    runner.manifest.settings["thresholds"] = {"mean_kld": 0.5, "top1": 0.9}
    found, where = thresholds.limits(runner.manifest, {"top1": 0.5})
    assert found["mean_kld"] == 0.5 and where["mean_kld"] == "the bundle's own"
    assert found["top1"] == 0.5
    runner.manifest.settings["thresholds"] = {"kld": 0.5}
    with pytest.raises(UserError, match="b: settings.thresholds: unknown limit 'kld'; known are"):
        thresholds.limits(runner.manifest, {}, "b")


def test_a_limit_that_is_not_met_is_named():
    report = checked(bundle("small", "linear", "int8"), thresholds={**LOOSE, "mean_kld": 1e-9})
    (line,) = report["failures"]
    assert re.match(r"mean KL divergence is .* at most 1e-09 is allowed", line)


def test_few_positions_are_not_judged_by_their_extremes():
    report = checked(bundle("small", "linear", "int8"))
    line = next(line for line in report["judged"] if line["key"] == "p999_kld")
    assert line["state"] == "not judged" and "are too few for it (5,000)" in line["why"]


# --- drift ----------------------------------------------------------------------------------------


def test_a_reduced_state_drifts_less_the_finer_it_is():
    errors = {}
    for kind in ("int16", "float16", "bfloat16"):
        report = checked(bundle("small", "linear", "int8"), state=kind)
        drift = report["state"]["drift"]
        assert drift["exact"] and drift["format"] == kind and drift["tokens"] > 300
        errors[kind] = drift["heads"][0]["relative_error"]
        line = next(line for line in report["judged"] if line["key"] == "drift_error")
        assert line["state"] == ("not judged" if kind == "bfloat16" else "passed")
    assert errors["int16"] < errors["float16"] < errors["bfloat16"]


# --- data -----------------------------------------------------------------------------------------


def collected(asked="builtin", tokens=2000, art=Path("nowhere"), limit=None, scratch=ROOT):
    runner = open_bundle(DEFAULT_BUNDLE)
    return runner.config, collect(
        asked, runner.config, runner.tokenizer_dir, tokens, limit, scratch, art
    )


def test_builtin_without_artwork_says_what_is_left_out():
    config, data = collected(tokens=5000)
    assert [source["name"] for source in data.sources] == ["questions about the sample pictures"]
    assert any("no general text: this model's tokenizer spells it out" in n for n in data.notes)
    assert any("no scenes: " in note for note in data.notes)
    item = data.items[0]
    kinds, following = item.kinds(config), item.following(config)
    assert set(kinds) == {0, 1, 2} and len(kinds) == len(item.ids) - 1
    assert (following[kinds == ANSWER] >= 0).all() and (following[kinds != ANSWER] == -1).all()
    assert len(list(item.answers())) == 8
    tiles = item.tiles()
    assert tiles is not None and len(tiles) == 1


def test_text_files(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("is there a dog? " * 3000)
    config, data = collected(str(file), tokens=10_000)
    sizes = [len(item.ids) for item in data.items]
    assert sizes[0] > 4000 and set(sizes[1:-1]) == {1025}  # a long one, then those of a kind
    assert sum(sizes) - len(sizes) == pytest.approx(10_000, abs=2)
    assert (data.items[0].following(config) >= 0).all()
    _, short = collected(str(file), limit=100)
    assert max(len(item.ids) for item in short.items) == 100


def test_conversation_files(tmp_path):
    from mmmamba_edge.dialogue import find_picture

    (tmp_path / "panda.png").write_bytes(find_picture("panda").read_bytes())
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a panda"},
    ]
    rows = [
        {"image": "panda.png", "conversations": turns},
        {"image": "missing.png", "conversations": turns},
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n{\n")
    _, data = collected(str(file))
    assert len(data.items) == 1 and data.sources[0]["name"] == "talk.jsonl"
    assert len(data.sources[0]["sha256"]) == 64
    assert any("talk.jsonl:2: image missing" in note for note in data.notes)
    assert any("talk.jsonl:3: not JSON" in note for note in data.notes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.txt", "--data .*no.txt: no such file"),
        ("talk.csv", "--data .*talk.csv: expected builtin, or a .txt or .jsonl file"),
        ("empty.txt", "--data .*empty.txt: nothing in it can be read"),
    ],
)
def test_bad_data(name, message, tmp_path):
    (tmp_path / "talk.csv").touch()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=message):
        collected(str(tmp_path / name))


# --- in the bundle --------------------------------------------------------------------------------


def test_every_quantised_bundle_carries_a_report(tmp_path):
    folder = bundle("small", "linear", "int8")
    manifest = read_manifest(folder)
    report = json.loads((folder / "accuracy.json").read_text())
    assert "accuracy.json" in manifest.files
    short = manifest.verification["accuracy"]
    assert short["file"] == "accuracy.json" and short["positions"] == 2040
    assert short["mean_kld"] == report["figures"]["mean_kld"]["value"] < 1e-4
    assert report["scheme"] == "int8 weights and activations"
    assert set(report) == {
        "format", "producer", "scheme", "reference", "data", "figures", "by_kind", "by_position",
        "answers", "head_memory", "limits",
    }  # fmt: skip
    source = checkpoint("small", "linear")
    for name, wanted in (("again", True), ("without", False)):
        export_onnx(source, tmp_path / name, quant="int8", accuracy=wanted)
    assert (tmp_path / "again/accuracy.json").read_bytes() == (
        folder / "accuracy.json"
    ).read_bytes()
    assert not (tmp_path / "without/accuracy.json").exists()
    assert "accuracy" not in read_manifest(tmp_path / "without").verification
    assert not (bundle("small", "linear") / "accuracy.json").exists()


# --- the command ----------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Every element that is opened is closed, and nothing is loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_command(tmp_path, capsys):
    """The embedded model passes; the report is text, JSON and a page."""
    out = tmp_path / "report"
    args = ["check", str(DEFAULT_BUNDLE), "--reference", str(REFERENCE), "--tokens", "1500"]
    code = main([*args, "--out", str(out)])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "PASSED" in text and "same likeliest token" in text and "tokens/s" in text
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.json"]
    report = json.loads((out / "report.json").read_text())
    assert {
        "format", "producer", "bundle", "reference", "data", "figures", "by_kind", "by_position",
        "histogram", "quantiles", "answers", "layers", "weights", "state", "worst", "limits",
        "judged", "failures", "verdict", "cost", "command",
    } == set(report)  # fmt: skip
    assert report["answers"]["count"] > 100 and report["answers"]["accuracy"]["value"] > 0.8
    assert report["by_kind"]["answer"]["ppl_ratio"]["value"] == pytest.approx(1, abs=0.02)
    assert report["cost"]["peak_rss_bytes"] < 300 << 20  # no PyTorch in the process that is timed
    assert report["command"].startswith("mmmamba-edge check ")
    parser = Balanced()
    parser.feed((out / "report.html").read_text())
    assert not parser.open and not parser.loads
    assert main([*args, "--out", str(DEFAULT_BUNDLE)]) == 2
    assert "which is no report's" in capsys.readouterr().err


def test_json_and_exit_code_1(tmp_path, capsys):
    limits = tmp_path / "limits.toml"
    limits.write_text("mean_kld = 1e-9\ntop1 = 0.5\n")
    code = main(
        [
            "check", str(bundle("small", "linear", "int8")), "--reference",
            str(checkpoint("small", "linear")), "--tokens", "300", "--json", "--thresholds",
            str(limits),
        ]
    )  # fmt: skip
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert code == 1 and report["verdict"] == "failed"
    assert "mean KL divergence is " in captured.err
    assert "FAILED" in as_text(report) and report["failures"][0] in as_text(report)
    assert "Failed" in page(report)


def test_text_of_others_is_escaped_in_the_page():
    report = checked(bundle("small", "linear", "int8"))
    report["bundle"]["name"] = report["worst"][0]["before"] = "<script>alert(1)</script>"
    report["data"]["notes"].append("<b>")
    text = page(report)
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_kl = 1", "unknown limit 'mean_kl'; known are mean_kld, p999_kld, "),
        ("mean_kld = 'low'", "mean_kld is 'low'; expected a number"),
        ("mean_kld =", "not TOML"),
        (None, "cannot be read"),
    ],
)
def test_bad_thresholds(text, message, tmp_path, capsys):
    file = tmp_path / "limits.toml"
    if text is not None:
        file.write_text(text)
    args = ["check", str(DEFAULT_BUNDLE), "--reference", str(REFERENCE), "--thresholds", str(file)]
    assert main(args) == 2
    assert f"--thresholds {file}: {message}" in capsys.readouterr().err


def test_another_models_reference(capsys):
    args = ["check", str(DEFAULT_BUNDLE), "--reference", str(checkpoint("small", "linear"))]
    assert main(args) == 2
    assert "give the checkpoint that it was exported from" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--tokens", "0"], ["--data", "missing.txt"]])
def test_bad_options(more, capsys):
    args = ["check", str(DEFAULT_BUNDLE), "--reference", str(REFERENCE), *more]
    assert main(args) == 2
    assert more[0] in capsys.readouterr().err


def test_help_loads_no_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime'): sys.modules[name] = None\n"
        "from mmmamba_edge.cli import main\n"
        "assert main(['check', '--help']) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0 and "example: mmmamba-edge check" in done.stdout, done.stderr

"""The benchmark of long contexts, on a tiny model: what it runs and what it writes down."""

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import long_context  # noqa: E402
from hovle_decoding import Growing, StaticStep  # noqa: E402

CASE = {
    "size": "small", "device": "cpu", "contexts": [6, 11], "tokens": 2, "chunk": 4,
    "kernels": ["plain"], "attention": ["repeat", "flash"], "tune": False, "pdl": False,
}  # fmt: skip


@pytest.mark.parametrize("attention", ["flash", "repeat"])
@torch.inference_mode()
def test_both_baselines_are_hovle(attention):
    model = long_context.build("static", "small", "cpu")
    ids = torch.randint(8, 200, (1, 20))
    state = model.new_state(1, max_context=32)
    model.prefill(ids, state)
    growing = Growing(model)
    growing.read(ids[:, :13])
    growing.read(ids[:, 13:])
    growing.attention = attention
    static = StaticStep(model, state.copy())
    static.token.fill_(9)
    want = model.step(torch.tensor([9]), state)[0]
    torch.testing.assert_close(growing.read(torch.tensor([[9]])), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(static.replay(), want[0], rtol=1e-4, atol=1e-5)
    assert growing.tokens == 21


@pytest.mark.parametrize("model", list(long_context.MODELS))
def test_rows_of_a_model(model, monkeypatch):
    monkeypatch.setattr(long_context, "PROBE_BYTES", 1 << 24)
    about, *rows = long_context.measure(model=model, **CASE)
    ways = CASE["attention"] if model == "original" else CASE["kernels"]
    assert about["kind"] == "about" and about["ways"] == ways
    assert [(r["context"], r["way"]) for r in rows] == [(c, w) for c in (6, 11) for w in ways]
    for row in rows:
        assert row["at"] >= row["context"] and row["median_ms"] > 0
        assert row["over_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
    grows = rows[-1]["moved_bytes"] - rows[0]["moved_bytes"]
    per_token = {"original": 8, "static": 8, "hybrid": 8, "linear": 0}[model] * 2 * 2 * 16 * 4
    assert grows == per_token * (rows[-1]["at"] - rows[0]["at"])


def test_tables_plot_and_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    found = {
        name: list(long_context.measure(model=name, **CASE)) for name in ("original", "linear")
    }
    monkeypatch.setattr(long_context, "_alone", lambda model, **case: found[model])
    monkeypatch.setattr(
        sys, "argv",
        ["x", "--models", "original,linear", "--contexts", "6,11",
         "--json", str(tmp_path / "l.json"), "--plot", str(tmp_path / "l.png")],
    )  # fmt: skip
    assert long_context.main() == 0
    facts = json.loads((tmp_path / "l.json").read_text())
    assert len(facts["rows"]) == 6 and set(facts["about"]) == {"original", "linear"}
    assert (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    linear = next(r for r in facts["rows"] if r["model"] == "linear" and r["context"] == 11)
    repeat = next(r for r in facts["rows"] if r["way"] == "repeat" and r["context"] == 11)
    row = next(line for line in table.splitlines() if line.startswith("| 11 | linear"))
    assert f"{repeat['median_ms'] / linear['median_ms']:.2f}" in row

"""States in half their bytes: what is kept, what is lost, and what is refused."""

import numpy as np
import pytest

from exported import bundle
from fake_runner import FakeRunner
from mmmamba_edge.errors import UserError
from mmmamba_edge.reduced_state import reduce_state, restore_state
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.state import Record, load_session, save_session


def arrays(largest: float = 3.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ssm = rng.standard_normal((4, 8, 16)).astype(np.float32)
    ssm[2] *= 1e-4  # a head of small numbers keeps its digits
    ssm[3, 5] = 0.0
    ssm[1, 2, 3] = largest
    return {"0.ssm": ssm, "0.conv": rng.standard_normal((24, 1)).astype(np.float32)}


@pytest.mark.parametrize(("precision", "worst"), [("int16", 1.6e-5), ("float16", 5e-4)])
def test_each_row_keeps_its_digits(precision, worst):
    kept = arrays()
    back = restore_state(reduce_state(kept, precision))
    assert back.keys() == kept.keys()
    assert np.array_equal(back["0.conv"], kept["0.conv"])
    lost = np.abs(back["0.ssm"] - kept["0.ssm"]).max(-1)
    rows = np.abs(kept["0.ssm"]).max(-1)
    assert (lost <= worst * rows + 1e-7).all()
    assert lost.max() > 0
    assert not back["0.ssm"][3, 5].any()


def test_float32_is_what_it_was():
    kept = arrays()
    assert reduce_state(kept, "float32")["0.ssm"] is kept["0.ssm"]


def test_what_float16_cannot_hold_is_named():
    with pytest.raises(UserError, match=r"layer 0 \(ssm\), heads 1: up to 70000"):
        reduce_state(arrays(largest=7e4), "float16")
    assert np.isfinite(restore_state(reduce_state(arrays(7e4), "int16"))["0.ssm"]).all()


@pytest.mark.parametrize("precision", ["int16", "float16"])
def test_what_is_not_finite_is_refused(precision):
    with pytest.raises(UserError, match="heads 1"):
        reduce_state(arrays(largest=np.nan), precision)


def test_unknown_precision():
    with pytest.raises(UserError, match="known are float32, int16, float16"):
        reduce_state(arrays(), "bfloat16")


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
@pytest.mark.parametrize("precision", ["int16", "float16"])
def test_a_session_goes_on_from_half_the_bytes(variant, precision, tmp_path):
    """On a real runner: the file is smaller, and the next logits are the same to its digits."""
    runner = open_bundle(bundle("small", variant))
    ids = np.random.default_rng(1).integers(8, 300, 60)
    _, state = runner.prefill(ids)
    record = Record(runner.model_id, runner.quant, "plain", state.tokens, None)
    sizes = {}
    for kind in ("float32", precision):
        save_session(tmp_path / kind, record, state, {}, kind)
        sizes[kind] = (tmp_path / kind).stat().st_size
    _, twin, _ = load_session(tmp_path / precision, runner)
    assert sizes[precision] < 0.6 * sizes["float32"]
    wanted, _ = runner.step(11, state)
    wanted = wanted.copy()
    got, _ = runner.step(11, twin)
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert 0 < error < (1e-3 if precision == "int16" else 1e-2)


def test_a_damaged_reduced_file_is_told(tmp_path):
    runner = FakeRunner()
    _, state = runner.prefill(np.array([7, 8, 9]))
    record = Record(runner.model_id, runner.quant, "plain", state.tokens, None)
    path = tmp_path / "s"
    save_session(path, record, state, {}, "int16")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_session(path, runner)

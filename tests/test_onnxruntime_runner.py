"""The ONNX Runtime runner: golden answers at every split, states that fork, bad input refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import golden
from exported import bundle, case, checkpoint
from mmmamba_edge.errors import UserError
from mmmamba_edge.runtimes import onnxruntime_runner, open_bundle
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner
from mmmamba_edge.runtimes.torch_runner import TorchRunner
from tolerances import GOLDEN_LOGITS

VARIANTS = ("linear", "hybrid", "teacher")
DIALECTS = ("com.microsoft", "standard")
_open: dict[Path, OnnxRuntimeRunner] = {}


def runner_of(part: str, variant: str, quant: str = "none", ops: str = "com.microsoft"):
    """One runner a bundle: opening costs more than most tests."""
    folder = bundle(part, variant, quant, ops)
    if folder not in _open:
        _open[folder] = OnnxRuntimeRunner(folder, threads=1)
    return _open[folder]


@pytest.fixture
def linear() -> OnnxRuntimeRunner:
    return runner_of("release_plain", "linear")


@pytest.fixture
def hybrid() -> OnnxRuntimeRunner:
    return runner_of("release_plain", "hybrid")


def first_after_images(ids: np.ndarray, runner: OnnxRuntimeRunner) -> int:
    places = np.flatnonzero(ids == runner.config.img_context_token_id)
    return int(places[-1]) + 1 if len(places) else 1


def assert_states_equal(a, b, exactly: bool = False) -> None:
    left, right = a.arrays(), b.arrays()
    assert a.tokens == b.tokens and list(left) == list(right)
    for name in left:
        if exactly:
            assert np.array_equal(left[name], right[name]), name
        else:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-3, atol=1e-4, err_msg=name)


# --- golden answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", golden.CASES)
def test_golden_logits_at_every_split(variant, ops, name):
    runner = runner_of("release_plain", variant, ops=ops)
    ids, pixels = case("release_plain", name)
    expected = golden.outputs("release_plain", variant)[f"{name}.logits"][0].numpy()

    def check(logits: np.ndarray, position: int) -> None:
        np.testing.assert_allclose(logits, expected[position], *GOLDEN_LOGITS, err_msg=position)

    every, whole = runner.read_all(ids, pixels)
    np.testing.assert_allclose(every, expected, *GOLDEN_LOGITS)
    first = first_after_images(ids, runner)
    logits, walked = runner.prefill(ids[:first], pixels)
    check(logits, first - 1)
    for split in range(first, len(ids) + 1):
        logits, state = runner.prefill(ids[:split], pixels)  # prefill, then steps
        check(logits, split - 1)
        for position in range(split, len(ids)):
            logits, state = runner.step(int(ids[position]), state)
            check(logits, position)
        assert_states_equal(state, whole)
        if split < len(ids):  # steps, then prefill
            logits, state = runner.prefill(ids[split:], None, walked.copy())
            check(logits, len(ids) - 1)
            assert_states_equal(state, whole)
            logits, walked = runner.step(int(ids[split]), walked)
            check(logits, split)


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("name", golden.CASES)
def test_golden_logits_with_normalised_embeddings(ops, name):
    """`release`: badly conditioned, so its own float32 run is off by up to 5e-4 from float64."""
    import torch

    runner = runner_of("release", "linear", ops=ops)
    ids, pixels = case("release", name)
    expected = golden.outputs("release", "linear")[f"{name}.logits"][0].numpy()
    with torch.inference_mode():
        wide = golden.model("release", "linear").double()
        tiles = None if pixels is None else torch.from_numpy(pixels).double()
        exact = wide(torch.from_numpy(ids)[None], tiles)[0].numpy()
    own_error = np.abs(expected - exact).max()
    every, _ = runner.read_all(ids, pixels)
    assert np.abs(every - exact).max() <= max(GOLDEN_LOGITS.atol, 1.5 * own_error)
    assert np.abs(every - expected).max() <= GOLDEN_LOGITS.atol + own_error


@pytest.mark.parametrize("ops", DIALECTS)
def test_dynamic_ntk_hybrid_is_the_plain_base_up_to_its_context(ops):
    runner = runner_of("release", "hybrid", ops=ops)
    assert runner.max_context == 16
    assert "dynamic NTK" in runner.manifest.settings["rope"]
    ids, _ = case("release", "text_only")
    torch_runner = TorchRunner(golden.model("release", "hybrid"), model_id="x", max_context=16)
    state = torch_runner.new_state()
    logits, own = runner.prefill(ids[:9])
    expected, state = torch_runner.prefill(ids[:9], None, state)
    np.testing.assert_allclose(logits, expected, *GOLDEN_LOGITS)
    for token in ids[9:16]:
        logits, own = runner.step(int(token), own)
        expected, state = torch_runner.step(int(token), state)
        np.testing.assert_allclose(logits, expected, *GOLDEN_LOGITS)


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("keep, expected", [(1, 1), (3, 3), (0, 8), (99, 8)])
def test_logits_to_keep_are_the_last_ones(ops, keep, expected):
    """The graph by itself, as another program would run it (FORMAT.md)."""
    runner = runner_of("release_plain", "hybrid", ops=ops)
    ids = np.arange(3, 11)[None]
    (vectors,) = runner._embed.run(None, {"input_ids": ids})
    feeds = {f"past_state.{t.name}": np.zeros(t.shape, "f4") for t in runner.manifest.state}
    feeds |= {
        "inputs_embeds": np.asarray(vectors),
        "logits_to_keep": np.array([keep]),
        "past_length": np.array([0]),
    }
    (logits,) = runner._decoder.run(["logits"], feeds)
    every, _ = runner.read_all(ids[0])
    np.testing.assert_allclose(np.asarray(logits)[0], every[-expected:], *GOLDEN_LOGITS)


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_chunks_change_nothing(variant, monkeypatch):
    runner = runner_of("release_plain", variant)
    ids, pixels = case("release_plain", "two_tiles")
    whole, state = runner.read_all(ids, pixels)
    for chunk in (1, 3, 7, len(ids) - 1):  # through the middle of tiles as well
        monkeypatch.setattr(onnxruntime_runner, "PREFILL_CHUNK", chunk)
        told = []
        logits, own = runner.prefill(ids, pixels, progress=lambda *at, told=told: told.append(at))
        np.testing.assert_allclose(logits, whole[-1], *GOLDEN_LOGITS)
        assert_states_equal(own, state)
        assert told[-1] == (len(ids), len(ids)) and len(told) == -(-len(ids) // chunk)
        every, _ = runner.read_all(ids, pixels)
        np.testing.assert_allclose(every, whole, *GOLDEN_LOGITS)


def test_interrupt_between_chunks_keeps_the_last_whole_one(linear, monkeypatch):
    monkeypatch.setattr(onnxruntime_runner, "PREFILL_CHUNK", 4)
    ids, _ = case("release_plain", "text_only")

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    state = linear.new_state()
    with pytest.raises(KeyboardInterrupt):
        linear.prefill(ids, None, state, progress=stop)
    assert state.tokens == 8
    _, expected = linear.prefill(ids[:8])
    assert_states_equal(state, expected)


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_states_fork_and_take_turns(variant, ops):
    """Three states on one runner, stepped in any order, never disturb each other."""
    runner = runner_of("release_plain", variant, ops=ops)
    ids, _ = case("release_plain", "text_only")
    _, state = runner.prefill(ids[:5])
    before = {name: array.copy() for name, array in state.arrays().items()}
    forks = [state.copy(), state.copy()]
    tails = [ids[5:12], ids[12:19]]
    logits = [[], []]
    for tokens in zip(*tails, strict=True):
        for which, token in enumerate(tokens):
            out, forks[which] = runner.step(int(token), forks[which])
            logits[which].append(out.copy())
    for name, array in state.arrays().items():
        assert np.array_equal(array, before[name]), name
    for which, tail in enumerate(tails):
        alone = state.copy()
        for token, expected in zip(tail, logits[which], strict=True):
            out, alone = runner.step(int(token), alone)
            assert np.array_equal(out, expected)
        assert_states_equal(alone, forks[which], exactly=True)


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_step_writes_the_state_over_itself(variant):
    """P1: the same memory before and after; and it is really used, not a stale copy."""
    runner = runner_of("release_plain", variant)
    assert runner.in_place
    _, state = runner.prefill(np.arange(3, 8))
    places = {n: t.array.__array_interface__["data"] for n, t in state.sets[0].items()}
    before = state.arrays()
    _, after = runner.step(9, state)
    assert after is state and len(state.sets) == 1
    assert places == {n: t.array.__array_interface__["data"] for n, t in state.sets[0].items()}
    assert all(not np.array_equal(before[n], a) for n, a in state.arrays().items())
    assert state.nbytes == runner.manifest.state_bytes


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_writing_in_place_is_exact(variant, quant, monkeypatch):
    """Bit for bit what two buffers in turns give, for one token and for many."""
    runner = runner_of("release_plain", variant, quant)
    ids = np.random.default_rng(0).integers(8, 150, 40)
    results = []
    for in_place in (True, False):
        monkeypatch.setattr(runner, "in_place", in_place)
        logits, state = runner.prefill(ids[:17])
        seen = [logits.copy()]
        assert len(state.sets) == (1 if in_place else 2)
        for token in ids[17:30]:
            logits, state = runner.step(int(token), state)
            seen.append(logits.copy())
        logits, state = runner.prefill(ids[30:], None, state)
        results.append(([*seen, logits.copy()], state))
    assert np.array_equal(results[0][0], results[1][0])
    assert_states_equal(results[0][1], results[1][1], exactly=True)


def test_plain_onnx_keeps_two_copies():
    runner = runner_of("release_plain", "linear", ops="standard")
    state = runner.new_state()
    assert not runner.in_place and state.nbytes == 2 * runner.manifest.state_bytes


def test_state_size_is_fixed(linear, hybrid):
    for runner in (linear, hybrid):
        state = runner.new_state()
        size = state.nbytes
        for _ in range(20):
            _, state = runner.step(3, state)
        assert state.nbytes == size and state.tokens == 20


@pytest.mark.parametrize("ops", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral_state_passes_between_runtimes(variant, ops):
    """Half a text in PyTorch, the rest here, and the other way round."""
    ids, pixels = case("release_plain", "one_tile")
    expected = golden.outputs("release_plain", variant)["one_tile.logits"][0].numpy()
    own = runner_of("release_plain", variant, ops=ops)
    other = TorchRunner(golden.model("release_plain", variant), model_id="x", max_context=64)
    half = len(ids) - 4
    for here, there in ((own, other), (other, own)):
        _, state = here.prefill(ids[:half], pixels)
        moved = there.load_state(state.arrays(), state.tokens)
        for position in range(half, len(ids)):
            logits, moved = there.step(int(ids[position]), moved)
            np.testing.assert_allclose(logits, expected[position], *GOLDEN_LOGITS)


def test_loading_own_arrays_is_exact(hybrid):
    _, state = hybrid.prefill(np.arange(3, 10))
    again = hybrid.load_state(state.arrays(), state.tokens)
    assert_states_equal(state, again, exactly=True)
    assert {n: a.shape for n, a in state.arrays().items() if n.endswith("key")} == {
        f"{i}.key": (2, 7, 16) for i, k in enumerate(hybrid.config.layer_types) if k == "attention"
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("0.ssm"), r"state 0.ssm: expected \(4, 16, 16\), found nothing"),
        (lambda a: a.update({"9.ssm": a["0.ssm"]}), "state has 9.ssm, which this model does not"),
        (lambda a: a.update({"0.conv": a["0.conv"][1:]}), r"state 0.conv: expected \(128, 1\)"),
    ],
)
def test_state_of_another_shape_is_refused(linear, change, message):
    arrays = linear.new_state().arrays()
    change(arrays)
    with pytest.raises(UserError, match=message):
        linear.load_state(arrays, 3)


def test_state_of_another_runner_is_refused(linear, hybrid):
    with pytest.raises(UserError, match="OnnxState of another runner; convert it with"):
        linear.step(3, hybrid.new_state())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[-1], [3, 10**6]])
def test_ids_outside_the_vocabulary(linear, ids):
    with pytest.raises(UserError, match="leaves the vocabulary of 151; this is another model's"):
        linear.prefill(np.array(ids))
    with pytest.raises(UserError, match="leaves the vocabulary"):
        linear.step(ids[-1], linear.new_state())


@pytest.mark.parametrize("ids", [np.zeros(0, np.int64), np.zeros((1, 3), np.int64)])
def test_ids_of_another_shape(linear, ids):
    with pytest.raises(UserError, match="input_ids: expected .tokens,. with at least one"):
        linear.prefill(ids)


def test_image_positions_must_match_the_tiles(linear):
    ids, pixels = case("release_plain", "one_tile")
    state = linear.new_state()
    assert pixels is not None
    for tiles, count in ((None, 0), (np.concatenate([pixels, pixels]), 8)):
        with pytest.raises(UserError, match=f"hold 4 image tokens; . tiles make {count}"):
            linear.prefill(ids, tiles, state)
    with pytest.raises(UserError, match=r"pixel_values: expected float32 \(tiles, 3, 56, 56\)"):
        linear.prefill(ids, pixels[..., :28], state)
    assert state.tokens == 0 and not any(a.any() for a in state.arrays().values())


def test_context_is_refused_before_anything_is_read(hybrid):
    assert hybrid.max_context == 256
    state = hybrid.new_state()
    with pytest.raises(UserError, match="257 tokens exceed the context of 256 .*--max-context"):
        hybrid.prefill(np.full(257, 3), None, state)
    assert state.tokens == 0
    _, state = hybrid.prefill(np.full(256, 3), None, state)
    with pytest.raises(UserError, match="257 tokens exceed"):
        hybrid.step(3, state)
    with pytest.raises(UserError, match="300 tokens exceed"):
        hybrid.load_state({}, 300)


def test_vision_graph_is_loaded_when_needed_and_can_be_dropped():
    runner = OnnxRuntimeRunner(bundle("release_plain", "linear"), threads=1)
    ids, pixels = case("release_plain", "one_tile")
    runner.prefill(ids[:1])
    assert runner._vision is None
    first = runner.prefill(ids, pixels)[0].copy()
    assert runner._vision is not None
    runner.drop_vision()
    assert runner._vision is None
    assert np.array_equal(runner.prefill(ids, pixels)[0], first)


# --- opening -------------------------------------------------------------------------------------


def test_open_bundle_finds_the_runtime():
    runner = open_bundle(bundle("release_plain", "linear"), threads=1)
    assert isinstance(runner, OnnxRuntimeRunner)
    assert runner.quant == "none" and runner.tokenizer_dir is None and runner.max_context is None
    folder = checkpoint("release_plain", "linear")
    other = open_bundle(folder, runtime="torch")
    assert isinstance(other, TorchRunner) and other.model_id == runner.model_id


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runtime": "tflite"}, "runtime 'tflite': known are auto, onnxruntime, executorch, torch"),
        ({"runtime": "executorch"}, "made for onnxruntime, not for executorch; export the"),
        ({"threads": 0}, "threads is 0; expected a whole number above 0"),
        ({"provider": "abacus"}, "provider 'abacus': this onnxruntime has cpu"),
        ({"provider": "cuda"}, "provider 'cuda': this onnxruntime has cpu.*onnxruntime-gpu"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        open_bundle(bundle("release_plain", "linear"), **options)


def test_checkpoint_paths_are_explained():
    with pytest.raises(UserError, match="no manifest.json, so this is not a bundle"):
        open_bundle(checkpoint("release_plain", "linear"))


def test_graph_that_onnxruntime_cannot_read_is_named(tmp_path):
    import shutil

    folder = shutil.copytree(bundle("release_plain", "linear"), tmp_path / "bundle")
    graph = folder / "decoder.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(UserError, match="decoder.onnx: corrupt, sha256 is"):
        open_bundle(folder)
    with pytest.raises(UserError, match="decoder.onnx: ONNX Runtime cannot open it"):
        open_bundle(folder, verify=False)


def test_missing_onnxruntime_names_the_extra_and_torch_is_not_needed():
    code = (
        "import sys\n"
        "for name in sys.argv[2].split(','): sys.modules[name] = None\n"
        "import mmmamba_edge as mm, numpy as np\n"
        "try:\n"
        "    print(mm.open_bundle(sys.argv[1], threads=1).prefill(np.array([3, 4]))[0].shape)\n"
        "except mm.UserError as error:\n"
        "    print(error)\n"
    )
    folder = str(bundle("release_plain", "linear"))
    for blocked, expected in (
        ("torch,onnx", "(151,)"),
        ("onnxruntime", "this needs onnxruntime, which is not installed: pip install"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, folder, blocked], capture_output=True, text=True
        )
        assert done.stdout.startswith(expected), done


# --- a device with memory of its own -------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_on_a_device_of_their_own(variant, monkeypatch):
    """No CUDA here: a second memory of the CPU stands for it, so that a missing copy shows."""
    import onnxruntime as ort

    made = ort.OrtValue.ortvalue_from_numpy

    def apart(array, device="cpu", number=0):
        return made(array.copy(), device, number)

    near = runner_of("release_plain", variant)
    ids, pixels = case("release_plain", "two_tiles")
    first = first_after_images(ids, near)
    want, close = near.prefill(ids[:first], pixels)
    want = want.copy()
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", apart)
    monkeypatch.setitem(onnxruntime_runner.DEVICES, "cpu", "cpu")
    monkeypatch.setattr(onnxruntime_runner, "IN_PLACE", frozenset())
    far = OnnxRuntimeRunner(near.folder)
    got, distant = far.prefill(ids[:first], pixels)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    fork = distant.copy()
    loaded = far.load_state(distant.arrays(), distant.tokens)
    for token in (5, 6, 7):
        want, close = near.step(token, close)
        want = want.copy()
        for state in (distant, fork, loaded):
            got, _ = far.step(token, state)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert_states_equal(fork, close)

"""Decoding with Triton kernels is plain decoding: on a GPU compiled, elsewhere interpreted."""

import os
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed: no kernels to test")
if not CUDA and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    # Triton 3.6's interpreter makes scalars of arrays with one element.
    pytest.skip("Triton's interpreter needs numpy<2.4", allow_module_level=True)

import golden  # noqa: E402
from fake_runner import tiny_config  # noqa: E402
from mmmamba_edge.distill.scratch import from_scratch  # noqa: E402
from mmmamba_edge.errors import UserError  # noqa: E402
from mmmamba_edge.model import fused_step, step_tuning  # noqa: E402
from mmmamba_edge.model.decoder import MMMamba  # noqa: E402
from mmmamba_edge.model.fused_step import FusedStep, Launch, why_not_fused  # noqa: E402
from mmmamba_edge.model.recorded_step import RecordedStep  # noqa: E402
from mmmamba_edge.runtimes.torch_runner import TorchRunner  # noqa: E402
from tolerances import FUSED, FUSED_HALF  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
GOLDEN = [
    ("release", "linear"), ("release", "hybrid"), ("release", "teacher"),
    ("release_plain", "linear"), ("release_plain", "hybrid"),
]  # fmt: skip
PROMPT, ANSWER = [3, 17, 5, 40, 9, 22, 6], [11, 4, 30]

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA device")


def read(model: MMMamba, ids=PROMPT):
    """A state that has read the ids."""
    return model.prefill(torch.tensor([ids], device=DEVICE))[1]


def assert_same_state(left, right, tolerance):
    assert torch.equal(left.length, right.length)
    for i, (one, other) in enumerate(zip(left.layers, right.layers, strict=True)):
        if hasattr(one, "length"):
            assert torch.equal(one.length, other.length), i
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(
                tensor, other.tensors()[name], **tolerance, msg=lambda m, at=(i, name): f"{at}: {m}"
            )


@pytest.mark.parametrize(("part", "variant"), GOLDEN)
@torch.inference_mode()
def test_fused_steps_are_plain_steps(part, variant):
    model = golden.model(part, variant).to(DEVICE)
    state = read(model)
    other = state.copy()
    recorded = RecordedStep(FusedStep(model), other)
    for token in ANSWER:
        want, _ = model.step(torch.tensor([token], device=DEVICE), state)
        found = recorded.step(token, other)
        torch.testing.assert_close(found, want[0], **FUSED._asdict())
    assert_same_state(state, other, FUSED._asdict())


@torch.inference_mode()
def test_another_tile_computes_the_same():
    """Rows of a program that do not divide a matrix's, and many programs."""
    model = golden.model("release", "hybrid").to(DEVICE)
    state = read(model)
    other = state.copy()
    how = Launch(tile=dict.fromkeys(fused_step.TILES, 256))
    want, _ = model.step(torch.tensor([5], device=DEVICE), state)
    found = RecordedStep(FusedStep(model, how), other).step(5, other)
    torch.testing.assert_close(found, want[0], **FUSED._asdict())
    assert_same_state(state, other, FUSED._asdict())


@torch.inference_mode()
def test_attention_over_many_blocks(monkeypatch):
    """Shares of several blocks, a last one that is not full, and shares that are empty."""
    monkeypatch.setattr(fused_step, "BLOCK", 16)
    model = golden.model("release_plain", "hybrid").to(DEVICE)
    ids = [3 + i % 50 for i in range(150)]
    for splits in (2, 4, 16):
        state = model.new_state(1, max_context=160)
        model.prefill(torch.tensor([ids], device=DEVICE), state)
        other = state.copy()
        fused = FusedStep(model)
        fused._splits = dict.fromkeys(fused._splits, splits)
        want, _ = model.step(torch.tensor([7], device=DEVICE), state)
        if splits * model.config.llm.num_attention_heads > len(fused._tops):
            fused._tops, fused._totals = fused._buffer(256), fused._buffer(256)
            fused._shares = fused._buffer(256 * model.config.llm.head_dim)
        found = RecordedStep(fused, other).step(7, other)
        torch.testing.assert_close(found, want[0], **FUSED._asdict())


@torch.inference_mode()
def test_half_precision():
    """float16, which Triton's interpreter multiplies as it is; bfloat16 is for the device."""
    model = golden.model("release", "hybrid").to(DEVICE).half()
    state = read(model)
    other = state.copy()
    want, _ = model.step(torch.tensor([5], device=DEVICE), state)
    found = RecordedStep(FusedStep(model), other).step(5, other)
    torch.testing.assert_close(found, want[0].float(), **FUSED_HALF._asdict())
    assert_same_state(state, other, FUSED_HALF._asdict())


@torch.inference_mode()
def test_linear_rope_scaling():
    from mmmamba_edge.config import RopeScaling

    torch.manual_seed(0)
    config = tiny_config(hybrid=True, vocab_size=64)
    scaled = replace(config.llm, rope_scaling=RopeScaling("linear", 4.0))
    config = replace(config, llm=scaled, img_context_token_id=63)
    model = from_scratch(config).to(DEVICE)
    for parameter in model.parameters():
        parameter.data *= 3
    state = read(model)
    other = state.copy()
    want, _ = model.step(torch.tensor([5], device=DEVICE), state)
    found = RecordedStep(FusedStep(model), other).step(5, other)
    torch.testing.assert_close(found, want[0], **FUSED._asdict())


@pytest.mark.slow
@torch.inference_mode()
def test_a_perturbed_weight_is_noticed():
    """The comparison can fail: every layer's weights reach the logits."""
    model = golden.model("release", "hybrid").to(DEVICE)
    state = read(model)
    twin = state.copy()
    base = RecordedStep(FusedStep(model), twin).step(5, twin).clone()
    seen = set()
    for name, parameter in reversed(list(model.named_parameters())):
        kind = name.rpartition(".layers.")[2].partition(".")[2] or name
        if "embedding_model" in name or kind in seen:
            continue
        seen.add(kind)  # one layer of each type is enough: 16 names
        kept = parameter.data.clone()
        parameter.data += 0.05 * (1 + kept.abs())
        twin = state.copy()
        found = RecordedStep(FusedStep(model), twin).step(5, twin)
        assert (found - base).abs().max() > 1e-4, name
        parameter.data.copy_(kept)
    assert {"attention.wqkv.weight", "attention.conv1d.weight", "attention.dt_bias"} <= seen


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_the_runner_with_fused_kernels(variant):
    """Prefill in between, forks, export and import: the state is exact whoever steps."""
    model = golden.model("release_plain", variant).to(DEVICE)
    made = {"model_id": "x", "max_context": 32}
    fused = TorchRunner(model, **made, kernels="fused")
    plain = TorchRunner(model, **made, kernels="plain")
    states = []
    for runner in (fused, plain):
        rows = []
        _, state = runner.prefill(np.array(PROMPT))
        rows.append(runner.step(11, state)[0])
        fork = state.copy()
        rows.append(runner.step(12, state)[0])
        rows.append(runner.prefill(np.array([8, 9, 10]), None, state)[0])
        rows.append(runner.step(13, state)[0])
        rows.append(runner.step(14, fork)[0])
        again = runner.load_state(fork.arrays(), fork.tokens)
        rows.append(runner.step(15, fork)[0])
        np.testing.assert_array_equal(runner.step(15, again)[0], rows[-1])
        assert (state.tokens, fork.tokens, again.tokens) == (13, 10, 10)
        states.append((np.stack(rows), state.arrays(), fork.arrays()))
    (rows, *arrays), (want, *others) = states
    np.testing.assert_allclose(rows, want, **FUSED._asdict())
    for mine, other in zip(arrays, others, strict=True):
        assert mine.keys() == other.keys()
        for name, array in mine.items():
            np.testing.assert_allclose(array, other[name], **FUSED._asdict(), err_msg=name)


def test_logits_given_out_stay_what_they_are():
    runner = TorchRunner(
        golden.model("release_plain", "linear").to(DEVICE), model_id="x", kernels="fused"
    )
    _, state = runner.prefill(np.array(PROMPT))
    first, state = runner.step(11, state)
    kept = first.copy()
    runner.step(12, state)
    np.testing.assert_array_equal(first, kept)


def test_a_lone_image_token_is_refused_as_ever():
    model = golden.model("release_plain", "linear").to(DEVICE)
    runner = TorchRunner(model, model_id="x", kernels="fused")
    _, state = runner.prefill(np.array(PROMPT))
    with pytest.raises(UserError, match="image tokens"):
        runner.step(model.config.img_context_token_id, state)


def test_why_not_and_the_error(monkeypatch):
    model = golden.model("release_plain", "linear")
    if not CUDA:
        monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="kernels 'fused': the model is on cpu.*use 'plain'"):
        TorchRunner(model, model_id="x", kernels="fused")
    assert TorchRunner(model, model_id="x")._fused is None  # "auto"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_fused(model) is None
    assert "float64" in (why_not_fused(model.double()) or "")
    monkeypatch.setattr(fused_step.importlib.util, "find_spec", lambda name: None)
    assert why_not_fused(model) == "triton is not installed"


# --- on the device only -------------------------------------------------------------------------


def half_size(hybrid: bool) -> MMMamba:
    """Two layers a half at the released layers' shape, where tiles are what they are in use."""
    from mmmamba_edge.config import Config, StackConfig

    def half(*types):
        return StackConfig(2048, 8192, 16, 8, 1e-5, 1e6, 32768, types)

    kinds = ("attention", "mamba2") if hybrid else ("mamba2", "mamba2")
    torch.manual_seed(0)
    config = Config(half(*kinds), half(*kinds), vocab_size=5003, image_size=28, patch_size=14)
    with torch.device(DEVICE):
        model = from_scratch(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 2
    return model


def error(found, want) -> float:
    """The norm of the difference over the norm."""
    return float((found.float() - want.float()).norm() / want.float().norm())


@gpu
@on_gpu
@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("hybrid", [False, True], ids=["linear", "hybrid"])
@torch.inference_mode()
def test_recorded_bfloat16_is_as_near_to_float32_as_plain(hybrid, pdl):
    """Over a prompt of 700 and 40 tokens; bfloat16's own error is the measure."""
    wide = half_size(hybrid)
    ids = torch.randint(10, 5000, (1, 700), device="cuda")
    answer = torch.randint(10, 5000, (40,), device="cuda")
    half = half_size(hybrid).bfloat16()
    for one, other in zip(wide.parameters(), half.parameters(), strict=True):
        one.data.copy_(other.data)  # the same weights: rounded ones

    def new(model):
        state = model.new_state(1, max_context=1024)
        model.prefill(ids, state)
        return state

    exact, plain = new(wide), new(half)
    fused = plain.copy()
    recorded = RecordedStep(FusedStep(half, Launch(pdl=pdl)), fused)
    errors = {"plain": 0.0, "fused": 0.0}
    for token in answer:
        want = wide.step(token[None], exact)[0][0]
        rows = {
            "plain": half.step(token[None], plain)[0][0].float(),
            "fused": recorded.step(int(token), fused),
        }
        for name, row in rows.items():
            errors[name] += error(row, want) / len(answer)
    assert int(fused.length) == 740
    assert errors["plain"] < 0.05, errors
    assert errors["fused"] < 1.2 * errors["plain"] + 1e-3, errors
    for mine, other, right in zip(fused.layers, plain.layers, exact.layers, strict=True):
        for name, tensor in mine.tensors().items():
            theirs = error(other.tensors()[name], right.tensors()[name])
            assert error(tensor, right.tensors()[name]) < 1.2 * theirs + 1e-3, name


@gpu
@on_gpu
@pytest.mark.parametrize("hybrid", [False, True], ids=["linear", "hybrid"])
@torch.inference_mode()
def test_replays_are_launches_bit_for_bit(hybrid):
    """Overlapping kernels (PDL) in a graph against the same kernels one after the other."""
    model = half_size(hybrid).bfloat16()
    start = model.new_state(1, max_context=256)
    model.prefill(torch.randint(10, 5000, (1, 100), device="cuda"), start)
    one, other = start.copy(), start.copy()
    overlapping = RecordedStep(FusedStep(model), one)
    apart = FusedStep(model, Launch(pdl=False))
    for token in range(20, 60):
        found = overlapping.step(token, one)
        apart.token.fill_(token)
        want = apart.launch(other)
        assert torch.equal(found, want), token
    assert_same_state(one, other, {"rtol": 0, "atol": 0})


@gpu
@on_gpu
@torch.inference_mode()
def test_tuning_ends_with_a_launch_that_computes_the_same():
    model = half_size(True).bfloat16()
    fused, default = FusedStep(model), FusedStep(model)
    assert step_tuning.tuned(fused) == fused.how
    state = model.new_state(1, max_context=64)
    model.prefill(torch.tensor([PROMPT], device="cuda"), state)
    other = state.copy()
    found = RecordedStep(fused, state).step(5, state).clone()
    assert error(found, RecordedStep(default, other).step(5, other)) < 1e-2


@gpu
@on_gpu
@torch.inference_mode()
def test_a_prompt_in_pieces_on_cuda():
    """Attention over a cache in pieces: flash attention's causal order, not a mask."""
    model = half_size(True).bfloat16()
    ids = torch.randint(10, 5000, (1, 300), device="cuda")
    whole = model.new_state(1, max_context=512)
    want, _ = model.prefill(ids, whole)
    pieces, found = model.new_state(1, max_context=512), torch.empty(0)
    for part in ids.split(77, dim=1):
        found, _ = model.prefill(part, pieces)
    assert error(found, want) < 2e-2

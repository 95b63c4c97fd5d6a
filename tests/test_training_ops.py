"""Training with Triton kernels is plain training: on a GPU compiled, elsewhere interpreted."""

import os

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

import torch.nn.functional as F  # noqa: E402

from mmmamba_edge.config import StackConfig  # noqa: E402
from mmmamba_edge.distill.distill_recipe import MatchingConfig, SecondConfig  # noqa: E402
from mmmamba_edge.distill.layer_matching import MatchedMixer  # noqa: E402
from mmmamba_edge.distill.student import train_only  # noqa: E402
from mmmamba_edge.model import ssd, training_ops  # noqa: E402
from mmmamba_edge.model.mixer import (  # noqa: E402
    G_NORM_EPS,
    Mamba2Mixer,
    causal_conv,
    look_up_kernels,
)
from tolerances import TRAINING  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
EPS = G_NORM_EPS
# Triton's interpreter multiplies the bits of bfloat16 matrices, not their numbers.
PRODUCTS = ["float32", "float16", *(["bfloat16"] if CUDA else [])]
HALF = torch.bfloat16 if CUDA else torch.float16

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")


def random(*shape, seed, dtype="float32"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, getattr(torch, dtype))


def outcome(function, inputs, given, *, wide=False):
    """Results and gradients of `function`, in float32 if `wide`."""
    if wide:
        inputs, given = [x.float() for x in inputs], [x.float() for x in given]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return [*out, *torch.autograd.grad(out, leaves, given)]


def assert_close(got, want, dtype):
    """Each tensor to a share of its largest value, which counts as 1e-3 at least."""
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape, i
        off = (x.float() - y.float()).abs().max() / y.abs().max().clamp(min=1e-3)
        assert off <= TRAINING[dtype], (i, float(off))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("seq", "key_value", "hidden"), [(1, 8, 16), (33, 8, 16), (140, 16, 48)])
def test_conv_is_plain_conv(seq, key_value, hidden, dtype):
    widths = (key_value, key_value, hidden)

    def plain(z, weight, bias):
        return causal_conv(z, weight, bias, None, None)[0].split(widths, dim=-1)

    def ours(z, weight, bias):
        return training_ops.conv_silu(z, weight, bias, key_value)

    channels = sum(widths)
    z = random(2, seq, channels, seed=0, dtype=dtype)
    args = [z, random(channels, 1, 2, seed=1), random(channels, seed=2)]
    given = [random(2, seq, width, seed=3 + i, dtype=dtype) for i, width in enumerate(widths)]
    got, want = outcome(ours, args, given), outcome(plain, args, given, wide=True)
    assert got[0].dtype == got[3].dtype == z.dtype
    assert_close(got, want, dtype)
    # Weights alone, as in stage 1.
    weights = [x.clone().requires_grad_() for x in args[1:]]
    alone = torch.autograd.grad(ours(z, *weights), weights, given)
    assert_close(alone, want[4:], dtype)


def ssd_case(seq, heads, kv_heads, dim, dtype, *, batch=2):
    q = random(batch, seq, heads, dim, seed=0, dtype=dtype)
    k, v = (random(batch, seq, kv_heads, dim, seed=i, dtype=dtype) for i in (1, 2))
    dt = F.softplus(random(batch, seq, heads, seed=3) - 3)
    # From heads that remember everything to those that forget within a few tokens.
    a = -torch.logspace(-3, 2.5, heads, device=DEVICE)
    given = [random(batch, seq, heads, dim, seed=4, dtype=dtype)]
    return [q, k, v, dt, a], given


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(
    ("seq", "heads", "kv_heads"), [(1, 2, 1), (100, 4, 2), (128, 2, 2), (700, 3, 1)]
)
def test_ssd_is_plain_ssd(seq, heads, kv_heads, dtype):
    """Less than a chunk, one, and more than are asked for at once."""
    args, given = ssd_case(seq, heads, kv_heads, 16, dtype)
    want = outcome(lambda *x: ssd.chunked(*x)[0], args, given, wide=True)
    assert_close(outcome(training_ops.ssd_chunked, args, given), want, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_ssd_at_full_width(dim):
    dtype = "bfloat16"
    args, given = ssd_case(1000, 8, 4, dim, dtype)
    want = outcome(lambda *x: ssd.chunked(*x)[0], args, given, wide=True)
    assert_close(outcome(training_ops.ssd_chunked, args, given), want, dtype)


def test_positions_without_a_step_leave_no_trace_in_the_ssd():
    (q, k, v, dt, a), given = ssd_case(200, 2, 1, 16, "float32")
    dt[:, 150:] = 0
    want = outcome(training_ops.ssd_chunked, [x[:, :150] for x in (q, k, v, dt)] + [a],
                   [given[0][:, :150]])  # fmt: skip
    given[0][:, 150:] = 0
    got = outcome(training_ops.ssd_chunked, [q, k, v, dt, a], given)
    assert_close([x[:, :150] for x in got[:5]] + got[5:], want, "float32")
    assert not got[2][:, 150:].any() and not got[3][:, 150:].any()


def gated(y, gate, weight):
    u = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight
    return u * F.silu(gate.unflatten(-1, y.shape[2:]))


def gate_case(seq, heads, dim, dtype):
    y, gate = random(2, seq, heads, dim, seed=0, dtype=dtype), random(2, seq, heads * dim, seed=1)
    return [y, gate.to(y.dtype), random(dim, seed=2)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("seq", "heads", "dim"), [(1, 4, 16), (21, 3, 20)])
def test_norm_and_gate_are_plain(seq, heads, dim, dtype):
    args, given = gate_case(seq, heads, dim, dtype), [random(2, seq, heads, dim, seed=3)]
    given = [given[0].to(args[0].dtype)]
    want = outcome(gated, args, given, wide=True)
    got = outcome(lambda *x: training_ops.gated_norm(*x, EPS), args, given)
    assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("seq", "heads", "dim"), [(1, 4, 16), (21, 3, 20)])
def test_their_error_is_plain(seq, heads, dim, dtype):
    args, given = gate_case(seq, heads, dim, dtype), [random(2, seq, seed=3)]
    target = random(2, seq, heads * dim, seed=4, dtype=dtype)

    def plain(*x):
        return (gated(*x).flatten(2) - target.float()).square().mean(-1)

    want = outcome(plain, args, given, wide=True)
    got = outcome(lambda *x: training_ops.gated_norm_error(*x, EPS, target)[0], args, given)
    assert_close(got, want, dtype)
    _, power = training_ops.gated_norm_error(*args, EPS, target)
    assert_close([power], [target.float().square().mean(-1)], "float32")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_are_sound():
    """torch's own check of their declarations: fakes, gradients, no aliases."""
    z = random(1, 5, 16, seed=0).requires_grad_()
    weights = (random(16, 1, 2, seed=1).requires_grad_(), random(16, seed=2).requires_grad_())
    torch.library.opcheck(training_ops.conv_silu, (z, *weights, 4))
    (q, k, v, dt, _), _ = ssd_case(128, 2, 1, 16, "float32", batch=1)
    dt = dt.transpose(1, 2).contiguous()
    q, k, v, dt, decay = (x.clone().requires_grad_() for x in (q, k, v, dt, -dt.cumsum(-1)))
    torch.library.opcheck(training_ops.ssd, (q, k, v, dt, decay))
    y, gate, weight = (x.requires_grad_() for x in gate_case(3, 2, 16, "float32"))
    torch.library.opcheck(training_ops.gated_norm, (y, gate, weight, EPS))
    target = random(2, 3, 32, seed=5)
    torch.library.opcheck(training_ops.gated_norm_error, (y, gate, weight, EPS, target))


# --- the mixer that uses them ---------------------------------------------------------------------


@pytest.fixture
def mixer(monkeypatch):
    if not CUDA:  # serve there as well
        monkeypatch.setattr(
            training_ops, "serves", lambda x: x.dtype == HALF and torch.is_grad_enabled()
        )
    torch.manual_seed(0)
    config = StackConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=512, layer_types=("attention",),
    )  # fmt: skip
    mixer = Mamba2Mixer(config)
    torch.nn.init.normal_(mixer.g_norm.weight)
    torch.nn.init.constant_(mixer.dt_bias, -3.0)
    return mixer.to(DEVICE)


def learnt(mixer, loss):
    """The loss, and the gradients by name."""
    mixer.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_learns_the_same(got, want):
    torch.testing.assert_close(got[0].float(), want[0], rtol=2e-3, atol=0)
    assert got[1].keys() == want[1].keys()
    names = sorted(want[1])
    dtype = str(HALF).removeprefix("torch.")
    assert_close([got[1][name] for name in names], [want[1][name] for name in names], dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("config", "compiled"),
    [(MatchingConfig(), False), (SecondConfig(), False), (SecondConfig(), True)],
    ids=["stage1", "stage2", "compiled"],
)
def test_a_matched_mixer_learns_the_same(mixer, config, compiled, relative, monkeypatch):
    train_only({0: mixer}, config.train)
    u, target = random(2, 150, 64, seed=0), random(2, 150, 64, seed=1)
    lengths = torch.tensor([150, 99], device=DEVICE)
    weights = (torch.arange(150, device=DEVICE) < lengths[:, None]).float()
    mixer.fused = False
    want = learnt(mixer, MatchedMixer(mixer, "heads", relative)(u, lengths, target, weights))
    mixer.fused = True
    unit = MatchedMixer(mixer, "heads", relative)
    if compiled:
        look_up_kernels()  # as `Engine` does: torch.compile cannot
        training_ops.part_compile_caches()
        unit.compile(fullgraph=True)
    used = []
    kernel = training_ops._kernel
    monkeypatch.setattr(training_ops, "_kernel", lambda *x: used.append(x[1]) or kernel(*x))
    with torch.autocast(DEVICE, HALF):
        loss = unit(u.to(HALF), lengths, target.to(HALF), weights)
    got = learnt(mixer, loss)
    assert {"conv_silu_backward", "look_back", "look_ahead", "gated_norm_backward"} <= set(used)
    assert_learns_the_same(got, want)


def test_compile_caches_are_parted_once(monkeypatch):
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "a user's")
    training_ops.part_compile_caches()
    tag = torch.compiler.config.cache_key_tag
    training_ops.part_compile_caches()
    assert torch.compiler.config.cache_key_tag == tag
    assert tag.startswith("a user's") and tag != "a user's"


@pytest.mark.parametrize("frugal", [False, True])
def test_a_whole_mixer_learns_the_same(mixer, frugal, monkeypatch):
    """As in stage 3, with and without computing again; with a state, nothing is fused."""
    u, given = random(2, 140, 64, seed=0), random(2, 140, 64, seed=1)
    mixer.fused = False
    want = learnt(mixer, (mixer(u) * given).sum())
    mixer.fused, mixer.frugal = True, frugal
    used = []
    kernel = training_ops._kernel
    monkeypatch.setattr(training_ops, "_kernel", lambda *x: used.append(x[1]) or kernel(*x))
    with torch.autocast(DEVICE, HALF):
        state = mixer.new_state(2, u.device, u.dtype)
        mixer(u.to(HALF), None, state)
        assert not [name for name in used if name != "gated_norm"]
        loss = (mixer(u.to(HALF)) * given).sum()
    got = learnt(mixer, loss)
    assert used.count("conv_silu") == 1 + frugal
    names = sorted(want[1])
    assert_close([got[1][n] for n in names], [want[1][n] for n in names], str(HALF)[6:])

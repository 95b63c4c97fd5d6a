"""The three forms of the recurrence are one map: against a float64 oracle and each other."""

import inspect

import numpy as np
import pytest
import torch

import oracle
from mmmamba_edge.model import ssd
from mmmamba_edge.model.mixer import causal_conv
from tolerances import CHUNKED, CHUNKED_16, STEPS

LENGTHS = (1, 63, 64, 65, 130)


def inputs(length, *, batch=1, heads=2, key=8, value=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    dt = torch.rand(shape, generator=g, dtype=torch.float64) * 0.3
    a = -torch.linspace(0.1, 3.0, heads, dtype=torch.float64)
    tensors = draw(*shape, key), draw(*shape, key), draw(*shape, value), dt
    state = draw(batch, heads, key, value)
    return [t.to(dtype) for t in tensors], a, state


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_scan_is_the_oracle(length, batch):
    (q, k, v, dt), a, state = inputs(length, batch=batch)
    y, final = ssd.scan(q, k, v, dt, a, state)
    for b in range(batch):
        want, want_state = oracle.ssd(
            *(x[b].numpy() for x in (q, k, v, dt)), a.numpy(), state[b].numpy()
        )
        np.testing.assert_allclose(y[b], want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(final[b], want_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", list(CHUNKED))
def test_chunked_is_the_scan(length, name):
    dtype = getattr(torch, name)
    (q, k, v, dt), a, state = inputs(length, batch=3, dtype=dtype)
    want, want_state = ssd.scan(*(x.double() for x in (q, k, v, dt)), a, state)
    y, final = ssd.chunked(q, k, v, dt.float() if name != "float64" else dt, a, state)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, **CHUNKED[name]._asdict())
    torch.testing.assert_close(final.double(), want_state, **CHUNKED[name]._asdict())


@pytest.mark.parametrize("name", list(STEPS))
def test_steps_are_one_pass(name):
    dtype = getattr(torch, name)
    (q, k, v, dt), a, state = inputs(65, dtype=dtype)
    state = state.to(dtype)
    want, want_state = ssd.chunked(q, k, v, dt, a.to(dtype), state)
    s, rows = state, []
    for t in range(65):
        y, s = ssd.step(q[:, t], k[:, t], v[:, t], dt[:, t], a.to(dtype), s)
        rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), want, **STEPS[name]._asdict())
    torch.testing.assert_close(s, want_state, **STEPS[name]._asdict())


@pytest.mark.parametrize("split", [1, 40, 63, 64, 65, 129])
def test_any_split_of_the_sequence(split):
    (q, k, v, dt), a, state = inputs(130)
    want, want_state = ssd.chunked(q, k, v, dt, a, state)
    first, middle = ssd.chunked(*(x[:, :split] for x in (q, k, v, dt)), a, state)
    second, final = ssd.chunked(*(x[:, split:] for x in (q, k, v, dt)), a, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, want_state, rtol=1e-10, atol=1e-10)


def test_dt_zero_leaves_the_state_alone():
    (q, k, v, dt), a, state = inputs(70)
    _, want = ssd.chunked(*(x[:, :50] for x in (q, k, v, dt)), a, state)
    dt[:, 50:] = 0
    _, final = ssd.chunked(q, k, v, dt, a, state)
    torch.testing.assert_close(final, want, rtol=1e-12, atol=1e-12)


def test_long_decay_does_not_overflow():
    (q, k, v, dt), a, state = inputs(128)
    y, final = ssd.chunked(q.float(), k.float(), v.float(), (dt * 1000).float(), a.float(), state)
    assert torch.isfinite(y).all() and torch.isfinite(final).all()


@pytest.mark.parametrize("length", [5, 64, 300])
def test_the_carried_state_is_the_same_at_once(length, monkeypatch):
    """What torch.compile is given in place of the loop, with its gradients."""
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda c=compiling: c)
        tensors, a, _ = inputs(length, batch=2)
        given = [x.requires_grad_() for x in (*tensors, a)]
        y, state = ssd.chunked(*given)
        (y.square().sum() + state.square().sum()).backward()
        results.append((y, state, *(x.grad for x in given)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_the_forms_are_different_code():
    """Anti-vacuity: a parity test of one function with itself proves nothing."""
    assert "cumsum" in inspect.getsource(ssd.chunked_products)
    assert "cumsum" not in inspect.getsource(ssd.scan) + inspect.getsource(ssd.step)
    assert "step(" in inspect.getsource(ssd.scan)
    assert "step(" not in inspect.getsource(ssd.chunked_products)


@pytest.mark.parametrize("which", range(4))
def test_a_perturbed_input_is_noticed(which):
    tensors, a, state = inputs(65)
    want, _ = ssd.chunked(*tensors, a, state)
    tensors[which][:, 30] += 0.05
    y, _ = ssd.scan(*tensors, a, state)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(y, want, **CHUNKED["float32"]._asdict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_cuda_is_the_oracle(length, name):
    """On CUDA, half precision is mamba-ssm's kernel where that is installed."""
    dtype = getattr(torch, name)
    (q, k, v, dt), a, state = inputs(length, key=16, value=16)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    want, want_state = ssd.scan(*(x.double() for x in (q, k, v)), dt, a, state)
    moved = [x.cuda() for x in (q, k, v, dt.float())]
    y, final = ssd.chunked(*moved, a.float().cuda(), state.float().cuda())
    tolerance = CHUNKED_16[name]._asdict()
    torch.testing.assert_close(y.cpu().double(), want, **tolerance)
    torch.testing.assert_close(final.cpu().double(), want_state, **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
def test_the_conv_on_cuda_is_the_one_on_the_cpu(name, given):
    """On CUDA it is causal-conv1d's kernel where that is installed."""
    generator = torch.Generator().manual_seed(0)
    z, weight, bias, column = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 65, 32), (32, 1, 2), (32,), (3, 32, 1))
    )
    lengths, state = torch.tensor([65, 1, 40]), column if given else None
    dtype = getattr(torch, name)
    rounded = [x if x is None else x.to(dtype) for x in (z, weight, bias, state)]
    want, last = causal_conv(*(x if x is None else x.double() for x in rounded), lengths)
    moved = [x if x is None else x.cuda() for x in (*rounded, lengths)]
    y, columns = causal_conv(*moved)
    torch.testing.assert_close(y.cpu().double(), want, **CHUNKED[name]._asdict())
    torch.testing.assert_close(columns.cpu().double(), last, rtol=0, atol=0)

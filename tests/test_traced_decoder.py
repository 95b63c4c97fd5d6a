"""The decoder for other exporters: the same map as the model, also when TorchScript has written it.

optimum and transformers are not installed here; adapters/optimum/check.sh tries what needs them.
"""

import inspect
import warnings
from functools import cache

import onnxruntime
import pytest
import torch
from torch import nn

from exported import checkpoint
from mmmamba_edge.errors import CheckFailed, UserError
from mmmamba_edge.export.traced_decoder import empty_state, quadratic, read, state_names
from mmmamba_edge.export.verify import EXACT_DB, sqnr_db
from mmmamba_edge.export.verify_traced import main, verify_traced
from mmmamba_edge.manifest import is_cache
from mmmamba_edge.model import ssd
from mmmamba_edge.model.checkpoints import load_model, save_model
from tolerances import CHUNKED

LENGTHS = (1, 2, 63, 64, 65, 130)
MODELS = [("release_plain", "linear"), ("release_plain", "hybrid"), ("small", "hybrid")]
TOKENS = ("input_ids", "inputs_embeds")


def inputs(length, dtype=torch.float64, *, batch=3, heads=2, key=8, value=6):
    """Tensors of a sequence, `a`, and a state."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = (batch, length, heads)
    dt = torch.rand(shape, generator=g, dtype=torch.float64) * 0.3
    tensors = draw(*shape, key), draw(*shape, key), draw(*shape, value), dt
    a = -torch.linspace(0.1, 3.0, heads, dtype=torch.float64)
    return [x.to(dtype) for x in tensors], a.to(dtype), draw(batch, heads, key, value).to(dtype)


# --- the recurrence ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["float64", "float32"])
@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
def test_quadratic_is_the_scan(length, name, given):
    tensors, a, state = inputs(length, getattr(torch, name))
    state = state * given
    want, want_state = ssd.scan(*(x.double() for x in tensors), a.double(), state.double())
    y, final = quadratic(*tensors, a, state)
    assert y.dtype == final.dtype == state.dtype
    torch.testing.assert_close(y.double(), want, **CHUNKED[name]._asdict())
    torch.testing.assert_close(final.double(), want_state, **CHUNKED[name]._asdict())


def test_long_decay_does_not_overflow():
    (q, k, v, dt), a, state = inputs(128, torch.float32)
    y, final = quadratic(q, k, v, dt * 1000, a, state)
    assert torch.isfinite(y).all() and torch.isfinite(final).all()


def test_the_forms_are_different_code():
    """Anti-vacuity: a parity test of one function with itself proves nothing."""
    assert "ssd." not in inspect.getsource(quadratic)


@pytest.mark.parametrize("which", range(4))
def test_a_perturbed_input_is_noticed(which):
    tensors, a, state = inputs(65)
    want, _ = ssd.scan(*tensors, a, state)
    tensors[which][:, 30] += 0.05
    y, _ = quadratic(*tensors, a, state)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(y, want, **CHUNKED["float32"]._asdict())


# --- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part, variant", MODELS)
@pytest.mark.parametrize("cuts", [(), (1,), (30, 31, 32)], ids=str)
@torch.inference_mode()
def test_read_is_the_model(part, variant, cuts):
    model = load_model(checkpoint(part, variant))
    ids = torch.arange(2 * 70).reshape(2, 70) % 100 + 8
    want, state = model(ids), model.new_state(2, max_context=70)
    model.prefill(ids, state)
    x = model.embedding_model.llm_text_embeddings(ids)

    after, rows = empty_state(model.config, 2), []
    for start, stop in zip((0, *cuts), (*cuts, 70), strict=True):
        logits, after = read(model, x[:, start:stop], after)
        rows.append(logits)
    assert sqnr_db(torch.cat(rows, 1).numpy(), want.numpy()) > EXACT_DB
    kept = [tensor for layer in state.layers for tensor in layer.tensors().values()]
    for got, expected in zip(after, kept, strict=True):
        assert sqnr_db(got.numpy(), expected.numpy()) > EXACT_DB


@torch.inference_mode()
def test_read_leaves_the_state_it_is_given():
    model = load_model(checkpoint("small", "hybrid"))
    x = torch.randn(1, 4, model.config.hidden_size)
    _, before = read(model, x, empty_state(model.config))
    copies = [tensor.clone() for tensor in before]
    read(model, x, before)
    assert all(map(torch.equal, before, copies))


# --- the graph -----------------------------------------------------------------------------------


class Traced(nn.Module):
    """What an exporter is given; adapters/optimum has the same for transformers."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, x, *state):
        if self.tokens == "input_ids":
            x = self.model.embedding_model.llm_text_embeddings(x)
        logits, after = read(self.model, x, list(state))
        return logits, *after


@cache
def graph(part, variant, tokens):
    """The decoder as the TorchScript exporter writes it, traced with two rows of 16 tokens."""
    folder = checkpoint(part, variant)
    model = load_model(folder)
    out = folder.with_name(f"{folder.name}-{tokens}.onnx")
    names = state_names(model.config)
    if tokens == "input_ids":
        x = torch.ones(2, 16, dtype=torch.int64)
    else:
        x = torch.rand(2, 16, model.config.hidden_size)
    past = [torch.rand([size or 5 for size in t.shape]) for t in empty_state(model.config, 2)]
    axes = {tokens: {0: "batch", 1: "tokens"}, "logits": {0: "batch", 1: "tokens"}}
    for name in names:
        rows = {0: "batch", 2: "rows"} if is_cache(name) else {0: "batch"}
        axes[f"past_state.{name}"] = rows
        axes[f"present_state.{name}"] = {i: f"new_{axis}" for i, axis in rows.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and traces
        torch.onnx.export(
            Traced(model, tokens), (x, *past), out, dynamo=False, opset_version=18,
            input_names=[tokens, *(f"past_state.{name}" for name in names)],
            output_names=["logits", *(f"present_state.{name}" for name in names)],
            dynamic_axes=axes,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("part, variant", MODELS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_graph_is_the_model(part, variant, tokens):
    figures = verify_traced(graph(part, variant, tokens), checkpoint(part, variant))
    assert figures["pictures"] == (2 if tokens == "inputs_embeds" else 0)
    assert figures["positions"] > 80 and figures["worst_state_sqnr_db"] > 75


@pytest.mark.parametrize("layer", ["embedding_model.encoder.0", "language_model.model.layers.1"])
def test_another_weight_is_noticed(tmp_path, layer, capsys):
    model = load_model(checkpoint("small", "hybrid"))
    with torch.no_grad():
        model.get_parameter(f"{layer}.feed_forward.w1.weight")[0, 0] += 1e-2
    other = save_model(model, tmp_path / "other")
    with pytest.raises(CheckFailed, match="sqnr_db is .*, below 75"):
        verify_traced(graph("small", "hybrid", "input_ids"), other)
    assert main([str(graph("small", "hybrid", "input_ids")), str(other)]) == 1
    assert "below 75" in capsys.readouterr().err


def test_the_command_prints_the_figures(capsys):
    arguments = graph("small", "hybrid", "input_ids"), checkpoint("small", "hybrid")
    assert main([str(argument) for argument in arguments]) == 0
    assert "worst_state_sqnr_db" in capsys.readouterr().out


def test_a_graph_of_another_model(tmp_path, capsys):
    with pytest.raises(UserError, match=r"past_state\.0\.conv is .*, expected \['batch', "):
        verify_traced(graph("small", "hybrid", "input_ids"), checkpoint("release_plain", "linear"))
    folder = checkpoint("small", "hybrid")
    assert main([str(tmp_path), str(folder)]) == 2
    assert "model.onnx: not found" in capsys.readouterr().err


def test_a_folder_is_its_model_onnx(tmp_path):
    (tmp_path / "model.onnx").write_bytes(graph("small", "hybrid", "input_ids").read_bytes())
    assert verify_traced(tmp_path, checkpoint("small", "hybrid"))["prompts"] == 4


@torch.inference_mode()
def test_no_size_of_the_example_is_left_in_the_graph():
    """Other numbers of rows, tokens and cached tokens than the tracer has seen, at once."""
    model = load_model(checkpoint("small", "hybrid"))
    x = torch.randn(3, 7, model.config.hidden_size)
    _, state = read(
        model, torch.randn(3, 9, model.config.hidden_size), empty_state(model.config, 3)
    )
    want, after = read(model, x, state)
    session = onnxruntime.InferenceSession(graph("small", "hybrid", "inputs_embeds"))
    feed = [x, *state]
    got = session.run(
        None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), feed, strict=True)}
    )
    for array, tensor in zip(got, [want, *after], strict=True):
        assert sqnr_db(array, tensor.numpy()) > EXACT_DB

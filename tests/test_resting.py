"""States that wait: what they keep, who may wait so, and how long heads remember."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exported import bundle, checkpoint
from fake_runner import FakeRunner, write_tokenizer
from mmmamba_edge.cli import main
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.to_onnx import export_onnx
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.model.checkpoints import open_checkpoint
from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.quant.check_run import check
from mmmamba_edge.quant.head_memory import EDGES, fading, histogram
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.quant.thresholds import read
from mmmamba_edge.resting import check_heads, stagnating
from mmmamba_edge.runtimes import open_bundle
from mmmamba_edge.session import Session


@pytest.fixture
def make(tmp_path):
    """A fake runner whose heads remember so many tokens."""
    folder = write_tokenizer(tmp_path / "tokenizer")

    def runner(*tokens, **options):
        found = FakeRunner(folder, **options)
        memory = {"0": list(tokens), "1": [10.0, 10.0]}
        found.manifest = SimpleNamespace(settings={"head_memory": memory} if tokens else {})
        return found

    return runner


def words(answer):
    return "".join(answer)


def state_of(session):
    assert session._answer is not None
    return session._answer.position.state


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_context", [None, 400])
@pytest.mark.parametrize("precision", ["int16", "float16"])
def test_a_session_waits_in_half_its_bytes_and_goes_on(make, precision, max_context):
    session = Session(make(20.0, 30.0, max_context=max_context))
    words(session.ask("one", max_new_tokens=9))
    twin, before = session.fork(), state_of(session)
    exact, room = before.arrays(), sum(a.nbytes for a in before.arrays().values())
    session.rest(precision)
    waiting = state_of(session)
    assert waiting.nbytes < 0.8 * room and waiting.tokens == before.tokens
    for name, array in waiting.arrays().items():
        assert np.abs(array - exact[name]).max() <= 1e-3 * np.abs(exact[name]).max()
    session.rest(precision)  # already
    assert state_of(session) is waiting
    fork = session.fork()
    assert words(fork.ask("two", max_new_tokens=9)) == words(session.ask("two", max_new_tokens=9))
    assert session.stats.context_tokens == fork.stats.context_tokens
    words(twin.ask("two", max_new_tokens=9))
    assert twin.stats.context_tokens == session.stats.context_tokens


def test_an_answer_goes_on_where_its_state_was_put_by(make, tmp_path):
    session = Session(make(20.0, 30.0))
    answer = session.ask("one", max_new_tokens=9)
    first = next(answer)
    session.rest()
    session.save(tmp_path / "s")
    rest = words(answer)
    again = Session.load(tmp_path / "s", session.runner)
    assert first and rest and words(again.resume()) == rest


def test_float32_and_nothing_asked_change_nothing(make):
    session = Session(make())
    session.rest()
    words(session.ask("one", max_new_tokens=3))
    state = state_of(session)
    session.rest("float32")
    assert state_of(session) is state


def test_heads_that_would_stagnate_are_named_and_the_session_is_whole(make):
    session = Session(make(20.0, 3000.0))
    words(session.ask("one", max_new_tokens=3))
    state = state_of(session)
    with pytest.raises(UserError, match=r"memory of 1,024 tokens.*layer 0 head 1 \(3,000\)"):
        session.rest("float16")
    assert state_of(session) is state
    session.rest("int16")  # follows 65,536


def test_a_model_that_does_not_say_is_refused(make):
    with pytest.raises(UserError, match="does not say how long its heads remember"):
        check_heads(make(), "int16")
    check_heads(make(), "float32")
    with pytest.raises(UserError, match="known are float32, int16, float16"):
        check_heads(make(1.0), "int4")


def test_prefixes_are_kept_so_too(make):
    ids = np.array([1, 2, 3, 30, 31], np.int64)
    sizes, logits = {}, {}
    for precision in ("float32", "int16"):
        cache, runner = PrefixCache(precision=precision), make(20.0, 30.0)
        cache.prefill(runner, ids, None, opening=3)
        logits[precision], _, reused = cache.prefill(runner, ids, None, opening=3)
        logits[precision] = logits[precision].copy()
        assert reused == 3
        sizes[precision] = cache.nbytes
    assert sizes["int16"] < 0.8 * sizes["float32"]
    difference = np.abs(logits["int16"] - logits["float32"]).max()
    assert 0 < difference < 1e-2 * np.abs(logits["float32"]).max()
    with pytest.raises(UserError, match="heads remember longer"):
        PrefixCache(precision="float16").prefill(make(20.0, 3000.0), ids, None, opening=3)


def test_files_of_one_precision_are_not_read_as_another(make, tmp_path):
    ids = np.array([1, 2, 3, 30, 31], np.int64)
    for precision in ("int16", "float32", "int16"):
        cache = PrefixCache(folder=tmp_path / "p", precision=precision)
        _, _, reused = cache.prefill(make(20.0, 30.0), ids, None, opening=3)
    assert reused == 3 and len(list((tmp_path / "p").iterdir())) == 2


# --- how long heads remember ----------------------------------------------------------------------


def test_memory_is_one_over_the_mean_decay():
    """dt the same at every token: what was written fades to 1/e after so many tokens."""
    config = open_checkpoint(checkpoint("small", "linear")).config
    layer = DecoderLayer(config.llm, "mamba2")
    mixer, heads = layer.attention, config.llm.num_attention_heads
    wanted = torch.logspace(0.5, 4.5, heads).double()
    with torch.no_grad():
        mixer.in_proj.weight.zero_()
        mixer.A_log_bias.fill_(math.log(0.5))
        mixer.dt_bias.copy_((2 / wanted).expm1().log())  # softplus gives 2 / wanted
    with fading(layer) as found, torch.no_grad():
        for tokens in (5, 1, 30):
            layer(torch.randn(1, tokens, config.hidden_size), None)
    assert found is not None
    np.testing.assert_allclose(found.memory(), wanted, rtol=1e-4)
    decay = torch.exp(-2 / wanted * 0.5) ** wanted
    np.testing.assert_allclose(decay, math.exp(-1), rtol=1e-9)


def test_every_head_is_in_one_bucket():
    memory = {"0": [0.5, 4.0, 15.9], "3": [1e6, 65_537.0, 65_536.0]}
    buckets = histogram(memory)
    assert [b["heads"] for b in buckets] == [1, 2, 0, 0, 0, 0, 0, 0, 3]
    assert buckets[-1]["first"] == EDGES[-1] and buckets[-1]["stop"] is None
    assert stagnating(memory, "int16") == [(3, 0, 1e6), (3, 1, 65_537.0)]


def slow_checkpoint(tmp_path, tokens):
    """The small model, one head of which remembers `tokens` tokens."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "slow"
    shutil.copytree(checkpoint("small", "linear"), folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("layers.1.attention.A_log_bias"):
                tensor[1] -= math.log(tokens)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_check_names_the_head_that_would_stagnate(tmp_path):
    source = slow_checkpoint(tmp_path, 1e6)
    folder = tmp_path / "bundle"
    export_onnx(source, folder, quant="int8")
    report = check(folder, source, tokens=400, timed=False, state="int16", thresholds={"top1": 0.5})
    memory = report["state"]["memory"]
    slow = max(memory, key=lambda layer: memory[layer][1])
    line = next(line for line in report["judged"] if line["key"] == "drift_memory")
    assert line["state"] == "failed" and line["place"] == f"layer {slow}, head 1"
    assert any(f"layer {slow}, head 1: longest memory" in said for said in report["failures"])
    assert sum(b["heads"] for b in report["state"]["memory_histogram"]) == sum(
        map(len, memory.values())
    )
    session_runner = open_bundle(folder)
    with pytest.raises(UserError, match=f"layer {slow} head 1"):
        check_heads(session_runner, "int16")
    assert main(["chat", str(folder), "--prompt", "x", "--state-memory", "int16"]) == 2


def test_the_bundle_s_own_heads_fit(tmp_path):
    runner = open_bundle(bundle("small", "linear", "int8"))
    memory = runner.manifest.settings["head_memory"]
    layers = Weights(open_checkpoint(checkpoint("small", "linear")), SCHEMES["none"]).config
    assert list(memory) == [str(i) for i in range(len(layers.layer_types))]
    check_heads(runner, "int16")


# --- limits that a bundle carries -----------------------------------------------------------------


def test_export_puts_limits_into_the_bundle(tmp_path, capsys):
    limits = tmp_path / "limits.toml"
    limits.write_text("top1 = 0.5\nmean_kld = 0.9\n")
    folder = tmp_path / "bundle"
    source = checkpoint("small", "linear")
    command = ["export", str(source), "--to", "onnx", "--quant", "int4", "--no-report"]
    assert main([*command, "--out", str(folder), "--thresholds", str(limits)]) == 0
    report = check(folder, source, tokens=400, timed=False)
    assert report["limits"]["values"]["mean_kld"] == 0.9
    assert report["limits"]["from"]["mean_kld"] == "the bundle's own"
    limits.write_text("top2 = 0.5\n")
    assert main([*command, "--out", str(tmp_path / "other"), "--thresholds", str(limits)]) == 2
    assert "unknown limit 'top2'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.toml")

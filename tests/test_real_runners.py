"""Sessions on the real runtimes: a tiny random model in PyTorch, and its bundles for the others."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import mmmamba_edge as mm
from fake_runner import tiny_config, write_tokenizer
from mmmamba_edge import cli
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.session import Session

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

ROOT = Path(__file__).parents[1]
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def folders(request, tmp_path_factory):
    """A checkpoint and the bundle exported from it, each with its tokenizer."""
    from mmmamba_edge.distill.scratch import from_scratch
    from mmmamba_edge.export.to_onnx import export_onnx
    from mmmamba_edge.model.checkpoints import save_model

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    small = tiny_config(hybrid=request.param == "hybrid", vocab_size=512)
    wide = {"hidden_size": 64, "intermediate_size": 96}
    config = replace(
        small, embedding=replace(small.embedding, **wide), llm=replace(small.llm, **wide)
    )
    model = from_scratch(config)
    for parameter in model.parameters():  # livelier than a fresh initialisation: answers differ
        parameter.data *= 3
    tokenizer = write_tokenizer(folder / "tokenizer", 512) / "tokenizer.json"
    checkpoint = save_model(model, folder / "checkpoint", extra_files=[tokenizer])
    limit = 400 if request.param == "hybrid" else None
    export_onnx(checkpoint, folder / "bundle", max_context=limit)
    return checkpoint, folder / "bundle"


@pytest.fixture(scope="module")
def onnx(folders) -> Runner:
    return mm.open_bundle(folders[1], threads=1)


@pytest.fixture(scope="module")
def pte(folders) -> Runner:
    pytest.importorskip("executorch")
    from mmmamba_edge.export.to_executorch import export_executorch

    limit = 400 if "attention" in mm.open_bundle(folders[1]).config.layer_types else None
    export_executorch(folders[0], folders[1].parent / "pte", max_context=limit)
    return mm.open_bundle(folders[1].parent / "pte")


@pytest.fixture(params=["onnx", "pte"])
def exported(request, folders) -> Runner:
    """Each runtime's runner in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pytorch(folders) -> Runner:
    return mm.open_bundle(folders[0], runtime="torch")


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 56, 3), np.uint8)
    return Image.fromarray(pixels)


def talk(session, **sampling):
    return [
        "".join(session.ask("What is this?", [picture(1)], max_new_tokens=8, **sampling)),
        "".join(session.ask("And these?", [picture(2), picture(3)], max_new_tokens=8, **sampling)),
        "".join(session.ask("Thanks", max_new_tokens=8, **sampling)),
    ]


def test_all_runtimes_hold_the_same_conversation(exported, pytorch):
    assert exported.model_id == pytorch.model_id
    answers = talk(Session(exported, system="s"))
    assert answers == talk(Session(pytorch, system="s"))
    assert len(set(answers)) == 3 and all(answers)


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_a_file_goes_on_exactly_where_the_session_stood(exported, tmp_path, sampling):
    session = Session(exported, system="s")
    answer = session.ask("What is this?", [picture(1)], max_new_tokens=12, **sampling)
    for _ in range(4):
        next(answer)
    session.save(tmp_path / "s")
    twin, fork = Session.load(tmp_path / "s", exported), session.fork()
    rest = list(answer)
    assert rest and rest == list(twin.resume()) == list(fork.resume())
    assert talk(session, **sampling) == talk(twin, **sampling) == talk(fork, **sampling)
    for one, other in ((session, twin), (session, fork)):
        assert one._answer and other._answer
        np.testing.assert_array_equal(one._answer.position.logits, other._answer.position.logits)


def test_a_file_moves_between_runtimes(exported, pytorch, tmp_path):
    session = Session(exported, system="s")
    list(session.ask("What is this?", [picture(1)], max_new_tokens=8))
    session.save(tmp_path / "s")
    moved = Session.load(tmp_path / "s", pytorch)
    assert "".join(moved.ask("More?", max_new_tokens=8)) == "".join(
        session.ask("More?", max_new_tokens=8)
    )


def test_two_sessions_on_one_runner_do_not_disturb_each_other(exported):
    alone = talk(Session(exported, system="s"))
    one, other = Session(exported, system="s"), Session(exported, system="t")
    answer = one.ask("What is this?", [picture(1)], max_new_tokens=8)
    pieces = []
    for piece in answer:
        pieces.append(piece)
        list(other.ask("Something", max_new_tokens=2))
    assert "".join(pieces) == alone[0]


def test_snapshots_save_reading_and_change_nothing(exported):
    cache = mm.PrefixCache()
    for question in ("What?", "How many?"):
        session = Session(exported, prefix_cache=cache)
        text = "".join(session.ask(question, [picture(1)], max_new_tokens=8))
        assert text == "".join(Session(exported).ask(question, [picture(1)], max_new_tokens=8))
    assert session.stats.reused_tokens > 12


def test_chat_on_both(folders, capsys):
    answers = []
    for folder, runtime in zip(folders, ("torch", "auto"), strict=True):
        flags = ["--runtime", runtime, "--prompt", "Hi", "--json", "--max-new-tokens", "6"]
        assert cli.main(["chat", str(folder), *flags]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != ""


def chat_without(packages, *args):
    """`chat` in a fresh interpreter where these packages are not installed."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in packages)
    code = f"import sys\n{blocked}from mmmamba_edge.cli import main\nsys.exit(main(sys.argv[1:]))"
    flags = ["--prompt", "Hi", "--max-new-tokens", "6"]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "chat", *map(str, args), *flags],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip


def test_a_device_needs_one_runtime_and_no_torch(folders, onnx):
    done = chat_without(["torch", "onnx", "executorch", "transformers"], folders[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(mm.stream(onnx, "Hi", max_new_tokens=6)) + "\n"


def test_a_missing_runtime_is_named_with_its_extra(folders):
    for package, args in (
        ("onnxruntime", [folders[1]]),
        ("torch", [folders[0], "--runtime", "torch"]),
    ):
        done = chat_without([package], *args)
        assert done.returncode == 2 and done.stdout == ""
        assert (
            f"needs {package}, which is not installed: pip install 'mmmamba-edge[{package}]'"
            in (done.stderr)
        )
        assert "Traceback" not in done.stderr


def test_only_a_hybrid_has_a_limit(onnx):
    session = Session(onnx)
    if onnx.max_context is None:
        list(session.ask("word " * 400, max_new_tokens=1))
        assert session.stats.context_tokens > 1600
    else:
        with pytest.raises(mm.UserError, match="of the model's context of 400 are taken"):
            session.ask("word " * 400)


@pytest.mark.slow
def test_memory_on_onnxruntime_does_not_grow_with_the_answer(onnx):
    count = 20_000 if onnx.max_context is None else 200
    answer = Session(onnx, system="s").ask("Go on", max_new_tokens=count, temperature=2.0)
    answer.generation.stop_ids = frozenset()
    process = psutil.Process(os.getpid())
    for _ in range(100):
        next(answer)
    memory, state = process.memory_info().rss, answer.position.state.nbytes
    for _ in answer:
        pass
    assert answer.stats.generated_tokens == count
    assert answer.position.state.nbytes == state
    assert process.memory_info().rss - memory < 2 << 20

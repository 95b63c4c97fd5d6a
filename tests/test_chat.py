"""The chat verb with a fake model: one question, a pipe, a terminal, a session file."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fake_runner import IMAGE, FakeRunner, write_tokenizer
from mmmamba_edge import chat, cli, dialogue, terminal
from mmmamba_edge.errors import UserError

ROOT = Path(__file__).parents[1]
END = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def runner(folder, monkeypatch):
    runner = FakeRunner(folder)
    monkeypatch.setattr(chat, "open_model", lambda args: runner)
    return runner


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a cat.png"
    pixels = np.random.default_rng(1).integers(0, 256, (28, 28, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def say(runner, monkeypatch, capsys):
    """Runs `chat` with arguments and lines on stdin; gives (code, stdout, stderr)."""

    def say(*args, stdin=b"", script=()):
        runner.script = list(script)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "ascii"))
        code = cli.main(["chat", "--max-new-tokens", "6", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return say


def test_one_question(say):
    assert say("--prompt", "Hi", script=[300, 301, END]) == (0, " word300 word301\n", "")


def test_pictures_change_the_answer(say, picture):
    answers = {
        say("--prompt", "What?")[1],
        say("--prompt", "What?", "--image", picture)[1],
        say("--prompt", "What?", "--image", picture, "--image", picture)[1],
    }
    assert len(answers) == 3


def test_the_flags_of_sampling_arrive(say):
    flags = [
        "--temperature",
        "2",
        "--top-p",
        "0.9",
        "--top-k",
        "500",
        "--repetition-penalty",
        "1.2",
    ]
    answers = [say("--prompt", "Hi", *flags, "--seed", seed)[1] for seed in "112"]
    assert answers[0] == answers[1] != answers[2]
    code, _, err = say("--prompt", "Hi", "--temperature", "-1")
    assert code == 2 and "temperature is -1.0; expected 0 or more" in err


def test_json_is_one_object_and_the_only_output(say, picture):
    code, out, _ = say("--prompt", "Hi", "--image", picture, "--json", script=[300, END])
    data = json.loads(out)
    assert code == 0 and data["answer"] == "word300"
    assert data["model"] == {"model_id": "a" * 64, "quant": "none", "variant": "linear"}
    (turn,) = data["turns"]
    assert turn["prompt"] == "Hi" and turn["images"] == [picture]
    assert turn["finish_reason"] == "stop" and turn["stats"]["generated_tokens"] == 1
    assert turn["stats"]["state_bytes"] > 0


def test_a_pipe_asks_line_by_line_in_one_conversation(say, runner):
    code, out, _ = say(stdin=b"One\n\nTwo\n", script=[300, END, 301, END])
    assert (code, out) == (0, " word300\n word301\n")
    assert runner.calls[-1][0] == END  # the second turn went on from the first


def test_a_pipe_takes_commands_too(say, runner, picture, tmp_path):
    kept = tmp_path / "kept"
    lines = f"/image '{picture}'\nWhat?\n/stats\n/save {kept}\n/reset\n/load {kept}\n/quit\nNo\n"
    code, out, err = say(stdin=lines.encode())
    # One turn, in three parts: the system message, the picture, the question.
    assert code == 0 and [call.count(IMAGE) for call in runner.calls] == [0, 4, 0]
    assert out.count("\n") == 1 and kept.exists()
    for text in ("1 picture will go with", "6 tokens at", "kept in", "forgotten", "going on after"):
        assert text in err


def test_a_cut_answer_continues(say):
    whole = say("--max-new-tokens", "12", "--prompt", "Hi")[1]
    _, out, _ = say("--max-new-tokens", "6", stdin=b"Hi\n/continue\n")
    assert out.replace("\n", "") == whole.replace("\n", "")


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"/dance\n", "unknown command /dance; known are /image, /continue, /stats"),
        (b"/save\n", "/save takes one file name"),
        (b"/image 'a.png\n", "/image: no closing quotation; quote names with spaces"),
        (b"/image no/such.png\n", "no/such.png: not found"),
        (b"/load no/such\n", "no/such: not found"),
        (b"/continue\n", "there is no unfinished answer"),
        (b"caf\xe9?\n", "prompt: not UTF-8 (byte 0xe9 at 3)"),
    ],
)
def test_bad_lines(say, stdin, message):
    code, out, err = say(stdin=stdin)
    assert (code, out) == (2, "") and f"mmmamba-edge: error: {message}" in err


def test_a_prompt_argument_that_is_not_utf8(say):
    code, _, err = say("--prompt", os.fsdecode(b"caf\xe9"))
    assert code == 2 and "prompt: not UTF-8 (byte 0xe9 at 3); save or type it as UTF-8" in err


def test_a_prompt_longer_than_a_hybrids_context(say, runner):
    runner.max_context = 40
    code, out, err = say("--prompt", "word " * 50)
    assert code == 2 and "of the model's context of 40 are taken" in err and out == ""


# --- session files -------------------------------------------------------------------------------


def test_a_session_file_is_made_and_gone_on_from(say, runner, tmp_path):
    kept = str(tmp_path / "talk")
    say("--session", kept, "--prompt", "One", script=[300, END])
    code, out, _ = say("--session", kept, "--prompt", "Two", script=[301, END])
    assert (code, out) == (0, " word301\n")
    assert runner.calls[-1][0] == END and runner.ids_read == sum(map(len, runner.calls)) + 2


def test_a_session_keeps_its_system_message(say, tmp_path):
    flags = ["--session", str(tmp_path / "talk"), "--prompt", "Hi", "--system"]
    assert [say(*flags, "Be brief.")[0] for _ in range(2)] == [0, 0]
    code, _, err = say(*flags, "Be long.")
    assert code == 2 and "begun with another system message; leave --system out" in err


def test_a_session_of_another_model_or_quantisation(say, runner, tmp_path):
    kept = str(tmp_path / "talk")
    say("--session", kept, "--prompt", "One")
    runner.quant = "int8"
    code, _, err = say("--session", kept, "--prompt", "Two")
    assert code == 2 and "--allow-other-quant" in err
    assert say("--session", kept, "--prompt", "Two", "--allow-other-quant")[0] == 0
    runner.model_id = "b" * 64
    code, _, err = say("--session", kept, "--prompt", "Two", "--allow-other-quant")
    assert code == 2 and f"held with model {'a' * 64}" in err


def test_an_unwritable_session_file_is_noticed_before_anything_is_read(say, runner, tmp_path):
    code, _, err = say("--session", str(tmp_path / "missing" / "talk"), "--prompt", "Hi")
    assert code == 2 and "there is no folder" in err and runner.ids_read == 0
    code, _, err = say("--session", str(tmp_path), "--prompt", "Hi")
    assert code == 2 and "a folder; give the name of a file" in err


def test_an_interrupted_answer_is_kept(say, runner, tmp_path):
    kept = str(tmp_path / "talk")

    def interrupt():
        if len(runner.steps) == 2:
            signal.raise_signal(signal.SIGINT)

    runner.during_step = interrupt
    code, out, err = say("--session", kept, "--prompt", "One")
    assert code == 130 and "word" in out and "Traceback" not in err
    runner.during_step = None
    read = runner.ids_read
    assert say("--session", kept, "--prompt", "Two")[0] == 0
    assert runner.calls[-1][0] == END  # the interrupted step was finished: nothing is pending
    assert runner.ids_read == read + len(runner.calls[-1]) + 5


# --- which model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such"], "no/such: not found; give the folder of a bundle"),
        (["{checkpoint}"], "a checkpoint, not a bundle; serve it with --runtime torch, or make"),
        (["{bundle}", "--runtime", "torch"], "not a checkpoint, and --runtime torch serves those"),
    ],
)
def test_models_that_cannot_be_opened(tmp_path, capsys, args, message):
    for kind, name in (("checkpoint", "config.json"), ("bundle", "manifest.json")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text("{}")
    folders = {kind: tmp_path / kind for kind in ("checkpoint", "bundle")}
    args = [arg.format(**folders) for arg in args]
    assert cli.main(["chat", *args, "--prompt", "Hi"]) == 2
    assert message in capsys.readouterr().err


def test_without_the_embedded_model_a_bundle_must_be_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(chat, "DEFAULT_BUNDLE", tmp_path / "default")
    assert cli.main(["chat", "--prompt", "Hi"]) == 2
    assert "this installation has no embedded model" in capsys.readouterr().err


# --- sample pictures -----------------------------------------------------------------------------


def test_sample_pictures_have_names(monkeypatch, tmp_path, picture):
    monkeypatch.setattr(dialogue, "SAMPLES", tmp_path)
    assert dialogue.sample_names() == ["a cat"]
    assert dialogue.find_picture("sample:a cat") == Path(picture)
    assert dialogue.find_picture("a cat") == Path(picture)
    assert dialogue.find_picture(picture) == Path(picture)
    assert dialogue.find_picture("dog.png") == Path("dog.png")
    assert dialogue.find_picture("holidays/a cat.jpg") == Path("holidays/a cat.jpg")  # not there
    assert dialogue.find_picture("~no-such-user/x.png") == Path("~no-such-user/x.png")
    with pytest.raises(UserError, match="sample:dog: no such sample; there are a cat"):
        dialogue.find_picture("sample:dog")


# --- terminals -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_answers_cannot_steer_a_terminal(monkeypatch):
    screen, pipe = Terminal(), io.StringIO()
    for out in (screen, pipe):
        monkeypatch.setattr(sys, "stdout", out)
        terminal.write("a\x1b[2J\x07\x9b\tb\né")
    assert screen.getvalue() == "a[2J\tb\né"
    assert pipe.getvalue() == "a\x1b[2J\x07\x9b\tb\né"


def test_slow_reading_shows_how_far_it_is(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "PATIENCE_S", 0)
    with terminal.reading() as progress:
        assert progress is not None
        progress(512, 3328)
    assert "reading 512 of 3328 tokens" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (2048, "2 KiB"), (33554432, "32 MiB")])
def test_sizes_for_people(count, text):
    assert terminal.size(count) == text


CHAT = """
import sys, time
from pathlib import Path
from fake_runner import FakeRunner
from mmmamba_edge import chat, cli
runner = FakeRunner(Path(sys.argv[1]))
runner.during_step = lambda: time.sleep({pause})
chat.open_model = lambda args: runner
sys.exit(cli.main(["chat", *sys.argv[2:]]))
"""


def start(folder, *args, pause=0.0, **options):
    environment = options.pop("env", os.environ)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", CHAT.format(pause=pause), str(folder), *args],
        env={**environment, "PYTHONPATH": path},
        **options,
    )


def test_a_real_terminal_with_ctrl_c_in_an_answer(folder):
    """Ctrl-C ends the answer, not the chat, and what follows is a normal turn."""
    master, slave = pty.openpty()
    process = start(
        folder, "--max-new-tokens", "2000", pause=0.005, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    shown = b""

    def wait_for(text, interrupting=False):
        nonlocal shown
        end = time.monotonic() + 20
        while text not in shown:
            assert time.monotonic() < end, shown
            if select.select([master], [], [], 0.2)[0]:
                shown += os.read(master, 4096)
            elif interrupting:  # again, for a signal just before readline waits is seen too late
                os.kill(process.pid, signal.SIGINT)
        shown = shown[shown.index(text) + len(text) :]

    wait_for(b"> ")
    os.write(master, b"Tell me\n")
    wait_for(b"word")
    os.kill(process.pid, signal.SIGINT)
    wait_for(b"stopped, /continue goes on")
    wait_for(b"> ")
    wait_for(b"Ctrl-D or /quit ends", interrupting=True)
    os.write(master, b"/nonsense\n")
    wait_for(b"unknown command /nonsense")
    os.write(master, b"/stats\n")
    wait_for(b"tok/s")
    os.write(master, b"/quit\n")
    assert process.wait(20) == 0
    os.close(master)


def test_any_language_in_a_plain_locale(folder):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin"}
    process = start(
        folder, "--json", "--prompt", "你好 é", "--max-new-tokens", "2", env=plain,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == b""
    assert json.loads(out)["turns"][0]["prompt"] == "你好 é"

"""The command line around the verbs: help, exit codes, messages, and what is not imported."""

import logging
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from mmmamba_edge import cli
from mmmamba_edge.errors import CheckFailed, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def verb(monkeypatch):
    """A verb `try` whose work is the given function."""

    def install(work):
        module = types.SimpleNamespace(
            add_arguments=lambda parser: parser.add_argument("--size", type=int), run=work
        )
        monkeypatch.setitem(sys.modules, "a_verb", module)
        monkeypatch.setitem(cli.VERBS, "try", ("a_verb", "try something"))

    return install


def python(code, *, blocked=(), stdin=None, **environment):
    """Run code in a fresh interpreter where the `blocked` packages cannot be imported."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked), code]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        input=stdin,
        capture_output=True,
        timeout=60,
    )


def test_the_overview_lists_every_verb_and_an_example(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in cli.VERBS.items():
        assert name in out and summary in out
    assert "example: mmmamba-edge chat" in out


def test_no_verb_is_wrong_use(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: mmmamba-edge VERB" in captured.err


def test_an_unknown_verb_lists_the_known_ones(capsys):
    assert cli.main(["tchat"]) == 2
    err = capsys.readouterr().err
    assert "unknown command 'tchat'; known are chat, " in err and "Traceback" not in err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmmamba-edge ")


def test_arguments_reach_the_verb_and_its_code_comes_back(verb, capsys):
    verb(lambda args: args.size)
    assert cli.main(["try", "--size", "0"]) == 0
    assert cli.main(["try", "--size", "1"]) == 1
    assert cli.main(["try", "--size", "big"]) == 2
    assert "invalid int value: 'big'" in capsys.readouterr().err
    assert cli.main(["try", "--help"]) == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x.bin: not found"), 2, "mmmamba-edge: error: x.bin: not found\n"),
        (CheckFailed("too far apart"), 1, "mmmamba-edge: error: too far apart\n"),
        (
            PermissionError(13, "Permission denied", "photos/cat.png"),
            2,
            "mmmamba-edge: error: photos/cat.png: Permission denied\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (
            ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
            2,
            "mmmamba-edge: error: this needs onnxruntime, which is not installed: "
            "pip install 'mmmamba-edge[onnxruntime]'\n",
        ),
    ],
)
def test_errors_are_messages_and_exit_codes(verb, capsys, error, code, message):
    def work(args):
        raise error

    verb(work)
    assert cli.main(["try"]) == code
    captured = capsys.readouterr()
    assert captured.err == message and captured.out == ""


def test_other_missing_modules_are_our_own_mistakes(verb):
    def work(args):
        raise ModuleNotFoundError("No module named 'mmmamba_edge.nonsense'", name="mmmamba_edge.x")

    verb(work)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["try"])


def test_warnings_and_log_are_plain_lines_on_stderr(verb, capsys):
    def work(args):
        warnings.warn("an odd key", stacklevel=1)
        logging.getLogger("mmmamba_edge.image").info("a.png: downscaled")
        print("result")
        return 0

    verb(work)
    assert cli.main(["try"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: an odd key\na.png: downscaled\n"
    assert captured.out == "result\n"


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_help_of_each_verb_needs_no_torch_and_shows_an_example(name):
    code = f"from mmmamba_edge.cli import main; sys.exit(main([{name!r}, '--help']))"
    done = python(code, blocked=["torch", "onnxruntime", "onnx", "executorch"])
    assert done.returncode == 0 and b"example: mmmamba-edge " in done.stdout, done.stderr


def test_importing_the_package_imports_no_runtime():
    done = python(
        "import mmmamba_edge, mmmamba_edge.session, mmmamba_edge.chat\n"
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == b"[]", done.stderr


def test_python_m_is_the_same_program():
    for module in (["mmmamba_edge", "chat"], ["mmmamba_edge.chat"]):
        done = subprocess.run(
            [sys.executable, "-m", *module, "--help"],
            cwd=ROOT, capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.startswith(b"usage: mmmamba-edge chat")


def test_a_reader_that_has_gone_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "mmmamba_edge", "--help"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141

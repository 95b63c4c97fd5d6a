"""The C++ runner, built here, gives Python's tokens: words, pictures, answers, sessions, errors."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import mmmamba_edge as mm
from fake_runner import SPECIAL, tiny_config
from mmmamba_edge.dialogue import SAMPLES, find_picture
from mmmamba_edge.image import load_image, normalise, tile_image
from mmmamba_edge.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")
pytest.importorskip("torchao")

ROOT = Path(__file__).parents[1]
CONTEXT = 400  # tokens
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13  # resizes tall pictures in another order


@contextmanager
def shared(tmp_path_factory, name: str):
    """A folder of that name, one for all workers of a test run: what is slow is made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder with mmmamba_chat and parts_check, built from runtimes/cpp."""
    for tool in ("cmake", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"the C++ runner needs {tool}")
    with shared(tmp_path_factory, "cpp") as folder:
        configure = ["cmake", "-S", ROOT / "runtimes/cpp", "-B", folder / "build"]
        configure += [f"-DPython3_EXECUTABLE={sys.executable}", "-DMMMAMBA_TESTS=ON"]
        configure += ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-Werror -D_GLIBCXX_ASSERTIONS"]
        done = subprocess.run(configure, capture_output=True, text=True)
        words = " ".join(done.stderr.split())
        if missing := re.search(r"(nlohmann/json|libpng|libjpeg|ExecuTorch) is missing.*", words):
            pytest.skip(missing[0])
        assert done.returncode == 0, done.stderr
        build = ["cmake", "--build", folder / "build"]
        done = subprocess.run(build, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / "build"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny random hybrid of template internlm2-chat with a BPE of its own, as a .pte."""
    from mmmamba_edge.distill.scratch import from_scratch
    from mmmamba_edge.export.to_executorch import export_executorch
    from mmmamba_edge.model.checkpoints import save_model

    with shared(tmp_path_factory, "talking") as folder:
        if not (folder / "bundle").exists():
            small = tiny_config(hybrid=True, vocab_size=512)
            wide = {"hidden_size": 64, "intermediate_size": 96}
            config = replace(
                small, embedding=replace(small.embedding, **wide), llm=replace(small.llm, **wide)
            )
            torch.manual_seed(0)
            model = from_scratch(config)
            for parameter in model.parameters():  # livelier than a fresh one: answers differ
                parameter.data *= 3 if parameter.ndim > 1 else 1
            tokenizer = _train_tokenizer(folder / "tokenizer.json")
            made = save_model(model, folder / "checkpoint", extra_files=[tokenizer])
            export_executorch(made, folder / "bundle", max_context=CONTEXT)
        return folder / "bundle"


@pytest.fixture(scope="module")
def runner(bundle):
    return mm.open_bundle(bundle)


def _train_tokenizer(path: Path) -> Path:
    """A byte-level BPE of 512 tokens, merges of README's words among them."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    tokenizer.save(str(path))
    return path


def call(*command, text=None):
    """A finished program; its output as text."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, encoding="utf-8", input=text)


def chat(programs, bundle, prompts, images=(), **flags):
    """What mmmamba_chat --json says of each turn: ids and reason."""
    command = [programs / "mmmamba_chat", bundle / "model.pte", "--json"]
    for name, values in {"image": images, "prompt": prompts, **flags}.items():
        for value in values if isinstance(values, list | tuple) else [values]:
            command += ["--" + name.replace("_", "-"), value]
    done = call(*command)
    assert done.returncode == 0, done.stderr
    return [
        (turn["token_ids"], turn["answer"], turn["finish_reason"], turn["stats"]["context_tokens"])
        for turn in json.loads(done.stdout)["turns"]
    ]


def python_chat(session, prompts, images=(), max_new_tokens=512):
    """The same of a Session."""
    turns = []
    for i, prompt in enumerate(prompts):
        answer = session.ask(prompt, [] if i else images, max_new_tokens=max_new_tokens)
        ids, sample = [], answer.generation.sampler.sample
        answer.generation.sampler.sample = lambda x, ids=ids, f=sample: ids.append(f(x)) or ids[-1]
        said = "".join(answer).strip()
        said_ids = ids[: answer.generation.given]
        turns.append((said_ids, said, answer.reason, session.stats.context_tokens))
    return turns


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_pythons(programs, bundle, runner):
    """Each sample picture, questions before and behind it, several turns, and every ending."""
    reasons = set()
    for number, sample in enumerate(sorted(SAMPLES.glob("*.png"))):
        prompts = ["What is it?", "And <image>?" if number % 2 else "Why? été 🐼 it's  <|im_end|>"]
        prompts = prompts[:: -1 if number % 2 else 1]
        limit = 6 + number
        want = python_chat(mm.Session(runner), prompts, [sample], limit)
        assert chat(programs, bundle, prompts, [sample], max_new_tokens=limit) == want
        reasons |= {turn[2] for turn in want}
    two = [find_picture("fruit"), find_picture("panda")]
    long = ["<image> or <image>? " + "What is in the picture? " * 12]  # two chunks
    want = python_chat(mm.Session(runner), long, two)
    assert chat(programs, bundle, long, two) == want
    assert reasons | {turn[2] for turn in want} >= {"length", "context"}


def test_the_finished_bundle(programs):
    """Where MMMAMBA_PTE names the default model's bundle: 3 questions a sample, as in Python."""
    if "MMMAMBA_PTE" not in os.environ:
        pytest.skip("MMMAMBA_PTE names no bundle folder")
    bundle = Path(os.environ["MMMAMBA_PTE"])
    runner = mm.open_bundle(bundle)
    for sample in sorted(SAMPLES.glob("*.png")):
        for prompt in ("What is in the picture?", "Describe the picture.", "What colour is it?"):
            want = python_chat(mm.Session(runner), [prompt], [sample])
            assert chat(programs, bundle, [prompt], [sample]) == want


def test_lines_from_stdin_and_plain_output(programs, bundle):
    program, sample = programs / "mmmamba_chat", SAMPLES / "panda.png"
    model, flags = bundle / "model.pte", ["--max-new-tokens", "5", "--threads", "1"]
    asked = call(program, model, *flags, "--image", sample, "--prompt", "Why?", "--prompt", "So?")
    lines = f"/image {sample}\n\nWhy?\nSo?\n"
    typed = call(program, model, *flags, text=lines)
    assert typed.returncode == asked.returncode == 0
    assert typed.stdout == asked.stdout and typed.stdout.count("\n") >= 2
    assert re.search(r"5 tokens at [\d.]+ tok/s; prompt \d+ tokens", typed.stderr)


def test_sessions_go_from_python_to_cpp_and_back(programs, bundle, runner, tmp_path):
    prompts, sample = ["Why?", "So? 🐼", "And then?"], SAMPLES / "fruit.png"
    file = tmp_path / "talk"
    want = python_chat(mm.Session(runner), prompts, [sample], 5)

    session = mm.Session(runner)
    python_chat(session, prompts[:1], [sample], 5)
    session.save(file)
    flags = {"max_new_tokens": 5, "session": file}
    assert chat(programs, bundle, prompts[1:2], **flags) == want[1:2]
    assert file.stat().st_mode & 0o777 == 0o600
    assert python_chat(mm.Session.load(file, runner), prompts[2:], (), 5) == want[2:]
    assert chat(programs, bundle, prompts[2:], **flags) == want[2:]

    for precision in ("int16", "float16"):  # read, and written back in float32
        python_chat(session, prompts[:1], [sample], 5)
        session.save(file, precision)
        want = python_chat(mm.Session.load(file, runner), prompts[1:2], (), 5)
        assert chat(programs, bundle, prompts[1:2], **flags) == want

    for damage in (lambda b: b[:-5], lambda b: b[:-5] + b"12345", lambda b: b"", lambda b: b[:99]):
        broken = tmp_path / "broken"
        broken.write_bytes(damage(file.read_bytes()))
        match = "session file|do not match their hash"
        _refused(programs, bundle, "--session", broken, match=match)


# --- errors ---------------------------------------------------------------------------------------


def _refused(programs, bundle, *words, match, model="model.pte", prompt="Why?"):
    done = call(programs / "mmmamba_chat", bundle / model, *words, "--prompt", prompt)
    assert done.returncode == 2, done
    lines = [x for x in done.stderr.splitlines() if "cpuinfo" not in x]  # where /sys is incomplete
    assert len(lines) == 1 and re.search(match, lines[0]), done.stderr
    assert done.stdout == ""


def _jpeg(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def test_bad_input_is_one_line_and_exit_code_2(programs, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "b")
    data = (copy / "model.pte").read_bytes()

    def refused(match, *words, **more):
        _refused(programs, copy, *words, match=match, **more)

    def changed(new, match):
        (copy / "bad.pte").write_bytes(new)
        assert new != data
        refused(match, model="bad.pte")

    refused("no such file", model="absent.pte")
    changed(data[:-1000], "truncated, .* bytes of")
    changed(data[:20], "not an ExecuTorch program")
    changed(b"x" * 1000, "not an ExecuTorch program")
    changed(data.replace(b'"format": 1', b'"format": 2'), "bundle format 2; this release reads 1")
    changed(data.replace(b'"producer"', b'"inventor"'), "unknown key inventor")
    for name in (b"vision_encoder", b"mmmamba_manifest"):
        changed(data.replace(name, name[:-1] + b"x"), f"has no method {name.decode()}")

    picture = tmp_path / "picture"
    refused("cannot be read", "--image", tmp_path)
    refused("cannot be read", "--image", tmp_path / "absent.png")
    for content, match in (
        (b"", "empty"), (b"words", "not a picture"), (b"P6 9 9 255\n", "truncated or damaged"),
        (b"P6 9999 9999 255\n", "more than 50 megapixels"),
        (b"P6 9 9 65535\n", "other than 8 bits"),
        ((SAMPLES / "panda.png").read_bytes()[:3000], "truncated or damaged"),
        (_jpeg(Image.new("RGB", (99, 99)))[:-9], "truncated or damaged"),
        (_jpeg(Image.new("CMYK", (9, 9))), "a JPEG in CMYK"),
    ):  # fmt: skip
        picture.write_bytes(content)
        refused(match, "--image", picture)

    refused("the prompt is empty", prompt=" ")
    refused("1 <image> for 0 pictures", prompt="<image>?")
    refused(r"tokens exceed the context of 400", prompt="word " * 500)
    refused("unknown flag --colour", "--colour", "red")
    refused("expected a whole number above 0", "--max-new-tokens", "0")
    done = subprocess.run(
        [programs / "mmmamba_chat", copy / "model.pte", "--prompt", b"caf\xe9"], capture_output=True
    )
    assert done.returncode == 2 and b"not UTF-8 (byte 0xe9 at 3)" in done.stderr

    tokenizer = copy / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    refused("another tokenizer; this model was exported with one of sha256")
    tokenizer.unlink()
    refused("tokenizer.json: cannot be read")


# --- parts ----------------------------------------------------------------------------------------

TEXTS = [
    "What is in the picture?", "", " ", "a  b   c \n\n d\t\te  ",
    "it's I'll THEY'RE 'twas ''s can't've", "x1234 5.6e-7 ²³ ٣٤ Ⅷ",
    "été naïve Ωμέγα Привет 你好，世界 日本語 ǅ ª", "🐼🏳️\u200d🌈 \u00a0\u3000 e\u0301 \u200b",
    "<s><|im_end|><IMG_CONTEXT>", "\x00\x01\x7f\x85",
]  # fmt: skip


def test_words_become_pythons_tokens(programs, bundle, tmp_path):
    rng = np.random.default_rng(0)
    alphabet = list("aé中1 \n'stTmre²🐼\u00a0-!")
    texts = [*TEXTS, *("".join(rng.choice(alphabet, 200)) for _ in range(10))]
    for folder in (bundle / "tokenizer", ROOT / "mmmamba_edge/assets/default/tokenizer"):
        tokenizer = load_tokenizer(folder)
        for text in texts:
            file = tmp_path / "text"
            file.write_bytes(text.encode())
            done = call(programs / "parts_check", "ids", folder / "tokenizer.json", file)
            assert json.loads(done.stdout) == tokenizer.encode_text(text), text
        ids = rng.integers(0, 512, 400).tolist()  # bytes that are no UTF-8 among them
        done = call(programs / "parts_check", "text", folder / "tokenizer.json", *ids)
        assert done.stdout == tokenizer.decode(ids).replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t["model"].update(type="WordPiece"), "model WordPiece; .* byte-level BPE only"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer NFC"),
        (lambda t: t["pre_tokenizer"].update(type="Metaspace"), "pre_tokenizer Metaspace"),
        (lambda t: t["model"].pop("vocab"), "damaged"),
        (lambda t: t["model"]["merges"].append(["xq", "zj"]), "merges make"),
    ],
)
def test_other_tokenizers_are_refused(programs, bundle, tmp_path, change, match):
    data = json.loads((bundle / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))
    done = call(programs / "parts_check", "ids", file, file)
    assert done.returncode == 2 and re.search(match, done.stderr), done.stderr


def test_pictures_become_pythons_pixels(programs, tmp_path):
    """To the last bit."""
    rng = np.random.default_rng(0)
    sizes = [(112, 112), (300, 200), (37, 41), (1, 1), (500, 90), (640, 480)]
    for width, height in sizes + [(90, 500), (200, 337)] * PILLOW_13:
        noise = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 4), dtype=np.uint8)
        rgba = Image.fromarray(noise).resize((width, height))
        rgb = rgba.convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(2, 9))  # turned or mirrored
        cases = {
            "a.png": (rgba, {}), "b.png": (rgb, {}), "c.png": (rgba.convert("LA"), {}),
            "d.png": (rgb.convert("P"), {"transparency": 3}), "e.png": (rgb.convert("1"), {}),
            "f.ppm": (rgb, {}),
            "g.pgm": (rgb.convert("L"), {}), "h.jpg": (rgb, {"quality": 90, "exif": exif}),
            "i.jpg": (rgb.convert("L"), {"progressive": True}), "j.jpg": (rgb, {"subsampling": 1}),
        }  # fmt: skip
        for name, (image, options) in cases.items():
            file = tmp_path / name
            image.save(file, **options)
            tiles = tile_image(
                load_image(file), tile=56, min_tiles=1, max_tiles=6, use_thumbnail=True
            )
            done = subprocess.run(
                [programs / "parts_check", "tiles", file, "56", "1", "6"], capture_output=True
            )
            pixels = np.frombuffer(done.stdout, np.float32)
            np.testing.assert_array_equal(pixels, normalise(tiles).ravel(), f"{name} {image.size}")


@pytest.mark.parametrize("size", [0, 55, 56, 63, 64, 1000])
def test_sha256(programs, tmp_path, size):
    (tmp_path / "file").write_bytes(bytes(i % 251 for i in range(size)))
    done = call(programs / "parts_check", "sha256", tmp_path / "file")
    assert done.stdout == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()

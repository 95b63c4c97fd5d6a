"""The bundle folder: FORMAT.md byte for byte, and every way in which one can be wrong."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmmamba_edge.bundle import new_bundle, read_manifest, verify_files, write_manifest
from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.manifest import FileRecord, Manifest, StateTensor

FORMAT_MD = Path(__file__).parents[1] / "FORMAT.md"
CONTENT = {"vision.onnx": b"pixels", "embed.onnx": b"ids", "decoder.onnx": b"state" * 9}
GRAPHS = {"vision": "vision.onnx", "embed": "embed.onnx", "decoder": "decoder.onnx"}


def manifest() -> Manifest:
    """A hybrid of two layers."""
    embedding = StackConfig(64, 96, 4, 2, 1e-5, 10000.0, 256, ("mamba2",))
    config = Config(
        embedding=embedding,
        llm=replace(embedding, layer_types=("attention",)),
        vocab_size=199,
        image_size=56,
        img_context_token_id=7,
    )
    comparison = {
        "sqnr_db": 111.5,
        "worst_sqnr_db": 108.2,
        "max_abs": 2.5e-05,
        "mean_kld": 1.6e-12,
        "top1": 1.0,
        "worst_state_sqnr_db": 112.7,
    }
    return Manifest(
        producer="mmmamba-edge 0.1.0",
        model_id=hashlib.sha256(b"weights").hexdigest(),
        model=config,
        quant="int8",
        ops="com.microsoft",
        opset={"": 23, "com.microsoft": 1},
        graphs=GRAPHS,
        state=(
            StateTensor("0.conv", (1, 128, 1)),
            StateTensor("0.ssm", (1, 4, 16, 16)),
            StateTensor("1.key", (1, 2, 256, 16)),
            StateTensor("1.value", (1, 2, 256, 16)),
        ),
        max_context=256,
        tokenizer=("tokenizer.json",),
        settings={"accuracy_level": 4, "block": 64},
        verification={"prompts": 4, "positions": 81, "pictures": 2, "exact": comparison},
    )


def written(folder: Path) -> Path:
    """A bundle on disk, with files that no runtime would open."""
    with new_bundle(folder) as part:
        for name, data in CONTENT.items():
            (part / name).write_bytes(data)
        (part / "tokenizer").mkdir()
        (part / "tokenizer/tokenizer.json").write_text("{}")
        write_manifest(part, manifest())
    return folder


@pytest.fixture
def bundle(tmp_path) -> Path:
    return written(tmp_path / "bundle")


def edit(bundle: Path, change) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- the format ----------------------------------------------------------------------------------


def test_manifest_is_format_md_byte_for_byte(bundle):
    blocks = re.findall(r"```json\n(.*?)```", FORMAT_MD.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks == [(bundle / "manifest.json").read_text(encoding="utf-8")]


def test_format_md_has_a_row_for_every_key(bundle):
    keys = list(json.loads((bundle / "manifest.json").read_text()))
    rows = re.findall(r"^\| `(\w+)` \|", FORMAT_MD.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == keys


def test_manifest_comes_back_as_it_was(bundle):
    found = read_manifest(bundle)
    assert replace(found, files={}) == manifest()
    assert found.files["embed.onnx"] == FileRecord(hashlib.sha256(b"ids").hexdigest(), 3)
    assert found.state_bytes == 4 * (128 + 4 * 16 * 16 + 2 * 2 * 256 * 16)
    assert Manifest.from_json(found.to_json(), "there") == found


def test_same_input_gives_same_bytes(tmp_path):
    a, b = (written(tmp_path / name) / "manifest.json" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


# --- opening what is wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("hashes", [None, True, False])
def test_whole_bundle_passes(bundle, hashes):
    verify_files(bundle, hashes=hashes)


def test_hashing_tells_how_far_it_is(bundle):
    told = []
    verify_files(bundle, hashes=True, progress=lambda *at: told.append(at))
    assert told[-1][0] == told[-1][1] == sum(map(len, CONTENT.values())) + 2
    assert len(told) == 4


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder; a bundle is a folder"):
        read_manifest(tmp_path / "nowhere")


def test_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match="no manifest.json, so this is not a bundle; make one"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b""])
def test_manifest_that_is_not_json(bundle, data):
    (bundle / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest.json: (not valid JSON|cannot be read)"):
        read_manifest(bundle)


def test_manifest_of_something_else(bundle):
    (bundle / "manifest.json").write_text('{"name": "app"}')
    with pytest.raises(UserError, match="no format number; this is not a bundle's manifest"):
        read_manifest(bundle)


@pytest.mark.parametrize("number", [2, 99])
def test_newer_format_is_refused_before_its_keys(bundle, number):
    edit(bundle, lambda data: data.update(format=number, novelty=True))
    with pytest.raises(UserError, match=f"bundle format {number}; this release reads 1. Export"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(extra=1), "manifest.json: unknown key extra; known are"),
        (lambda d: d.pop("graphs"), "manifest.json: missing key graphs"),
        (lambda d: d["state"].update(more=1), "manifest.json state: unknown key more"),
        (lambda d: d["state"]["tensors"][0].pop("dtype"), "state tensors: missing key dtype"),
        (lambda d: d["files"]["embed.onnx"].update(mode=1), "files: unknown key mode"),
        (lambda d: d["model"].update(n_heads=1), "manifest.json model: unknown key n_heads"),
        (lambda d: d["model"]["llm"].update(x=1), "model.llm: unknown key x"),
        (lambda d: d.update(files=[]), "manifest.json: files is []; expected another kind"),
        (lambda d: d["state"]["tensors"][0].update(shape=[1, "a"]), "no such shape or dtype"),
        (lambda d: d["state"]["tensors"][0].update(dtype="int3"), "no such shape or dtype"),
        (lambda d: d["state"].update(bytes=1), "state contradicts the rest; expected {'bytes'"),
        (lambda d: d.update(template="x"), "template contradicts the rest; expected 'internlm2"),
        (lambda d: d["graphs"].pop("embed"), "manifest.json: missing key embed"),
        (lambda d: d["graphs"].update(decoder="no.onnx"), "names no.onnx, but its files do not"),
        (lambda d: d.update(tokenizer=["t.model"]), "names tokenizer/t.model, but its files"),
    ],
)
def test_manifest_with_unknown_or_missing_keys(bundle, change, message):
    edit(bundle, change)
    with pytest.raises(UserError, match=re.escape(message)):
        read_manifest(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_file_names_stay_inside(bundle, name):
    edit(bundle, lambda d: d["files"].update({name: d["files"]["embed.onnx"]}))
    with pytest.raises(UserError, match="leads out of the bundle"):
        read_manifest(bundle)


def test_missing_file_is_named_with_its_hash(bundle):
    (bundle / "decoder.onnx").unlink()
    digest = hashlib.sha256(CONTENT["decoder.onnx"]).hexdigest()
    with pytest.raises(UserError, match=rf"decoder.onnx: missing; .*sha256 {digest}.* again"):
        verify_files(bundle, hashes=False)


@pytest.mark.parametrize("data, word", [(b"st", "truncated, 2"), (b"s" * 99, "too long, 99")])
def test_file_of_another_size_is_named(bundle, data, word):
    (bundle / "decoder.onnx").write_bytes(data)
    with pytest.raises(UserError, match=rf"decoder.onnx: {word} bytes of 45 \(sha256 [0-9a-f]+\)"):
        verify_files(bundle, hashes=False)


def test_corrupt_file_is_named_with_both_hashes(bundle):
    changed = b"statE" + CONTENT["decoder.onnx"][5:]
    (bundle / "decoder.onnx").write_bytes(changed)
    digests = [hashlib.sha256(d).hexdigest() for d in (changed, CONTENT["decoder.onnx"])]
    with pytest.raises(UserError, match=f"corrupt, sha256 is {digests[0]}; .* says {digests[1]}"):
        verify_files(bundle)
    verify_files(bundle, hashes=False)  # sizes alone cannot tell


def test_large_bundles_are_hashed_only_when_asked(bundle, monkeypatch):
    (bundle / "embed.onnx").write_bytes(b"IDS")
    monkeypatch.setattr("mmmamba_edge.bundle.SMALL", 10)
    verify_files(bundle)
    with pytest.raises(UserError, match="embed.onnx: corrupt"):
        verify_files(bundle, hashes=True)


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_failure_leaves_nothing(tmp_path, error):
    raised = UserError if error is OSError else error
    with pytest.raises(raised), new_bundle(tmp_path / "out") as part:
        (part / "half").write_bytes(b"x")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"out: not written \(No space left on device\)"):
        with new_bundle(tmp_path / "out"):
            raise OSError(28, "No space left on device")


def test_bundle_is_replaced_whole_and_kept_on_failure(bundle):
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(RuntimeError), new_bundle(bundle):
        raise RuntimeError
    assert (bundle / "manifest.json").read_bytes() == before
    with new_bundle(bundle) as part:
        (part / "only.onnx").write_bytes(b"")
    assert [p.name for p in bundle.iterdir()] == ["only.onnx"]
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_other_things_in_the_way_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/manifest.json").write_text('{"name": "a web page has one too"}')
    for name, kind in (("photos", "a bundle"), ("file", "a folder"), ("site", "a bundle")):
        with pytest.raises(UserError, match=f"{name}: exists and is not {kind}; choose another"):
            with new_bundle(tmp_path / name):
                pass
    assert (tmp_path / "photos/cat.png").read_bytes() == b"cat"
    assert (tmp_path / "site/manifest.json").exists()


def test_a_bundle_with_other_files_in_it_is_refused(bundle):
    (bundle / "talk.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds talk.safetensors, which is not the bundle's"):
        with new_bundle(bundle):
            pass
    assert (bundle / "talk.safetensors").read_bytes() == b"mine"


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with new_bundle(tmp_path / "out") as part:
        (part / "x").write_bytes(b"")
    assert (tmp_path / "out/x").exists()


def test_unwritable_place_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=r"out: cannot be written \("):
        with new_bundle(tmp_path / "file/out"):
            pytest.fail("the long work has begun")

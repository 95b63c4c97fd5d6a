"""`inspect`: the numbers of a checkpoint and of a bundle, in words and as JSON."""

import json

import pytest

import golden
from mmmamba_edge.bundle import DEFAULT_BUNDLE, read_manifest
from mmmamba_edge.cli import main
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint

HYBRID = golden.ROOT / "release_plain/hybrid/final"


def test_a_checkpoint_in_numbers(capsys):
    assert main(["inspect", "--json", str(HYBRID)]) == 0
    facts = json.loads(capsys.readouterr().out)
    source = open_checkpoint(HYBRID)
    sizes = {tensor["name"]: tensor["shape"] for tensor in facts["tensors"]}
    assert sizes == {name: list(shape) for name, _, shape in source.stored()}
    assert facts["variant"] == "hybrid" and facts["layout"] == "released"
    model = load_model(source)
    states = [model.new_state(1, max_context=context).nbytes for context in (10, 20)]
    fixed, growth = facts["state_bytes"], facts["state_bytes_per_token"]
    bookkeeping = states[0] - (fixed + 10 * growth)
    assert states[1] - states[0] == 10 * growth and 0 <= bookkeeping < 100


def test_other_files_beside_the_weights_do_not_count(tmp_path, capsys):
    for file in HYBRID.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "progress.safetensors").write_bytes((HYBRID / "model.safetensors").read_bytes())
    counted = []
    for folder in (HYBRID, tmp_path):
        assert main(["inspect", "--json", str(folder)]) == 0
        counted.append(json.loads(capsys.readouterr().out)["parameters"])
    assert counted[0] == counted[1]


def test_a_checkpoint_in_words(capsys):
    assert main(["inspect", str(HYBRID)]) == 0
    text = capsys.readouterr().out
    stack = open_checkpoint(HYBRID).config.llm
    assert "checkpoint of mmMamba hybrid" in text
    assert f"RoPE theta {stack.rope_theta:g}" in text and "template internlm2-chat" in text
    assert "wvkqgdt.weight" in text and "released layout" in text


def test_a_bundle(capsys):
    assert main(["inspect", str(DEFAULT_BUNDLE)]) == 0
    text = capsys.readouterr().out
    manifest = read_manifest(DEFAULT_BUNDLE)
    assert "quant int8" in text and manifest.model_id in text and "decoder.onnx" in text
    assert "at any context" in text and "Mamba-2 needs no RoPE" in text


@pytest.mark.parametrize("header", [b"[1,2]", b'{"a":{}}', b'{"a":5}', b"{"])
def test_a_damaged_header_is_named(header, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((HYBRID / "config.json").read_bytes())
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"{file}: not a safetensors file" in capsys.readouterr().err

"""Conversion: the original's stage files, GGUF, and one layout into another; nothing is lost."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import golden
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.convert import convert_layout, convert_stages
from mmmamba_edge.model.convert_command import add_arguments, run
from mmmamba_edge.model.gguf_llama import convert_gguf, pack_wqkv, unpermute
from mmmamba_edge.model.layers import split_wqkv
from tolerances import GOLDEN_LOGITS

TEACHER = golden.ROOT / "release_plain/teacher"


def stage_file(path, variant, *, without=()):
    """A .pt as the original's trainer saves it: trained mixer tensors, shadows, a step."""
    source = open_checkpoint(golden.ROOT / f"release_plain/{variant}/final")
    tensors = {
        name: source.get(name).clone()
        for name in source.names()
        if ".attention." in name
        and "o_proj" not in name
        and "wqkv" not in name
        and ".wo." not in name
    }
    tensors = {n: t for n, t in tensors.items() if not n.endswith(tuple(without))}
    shadow = "embedding_model.encoder.1.attention.q_proj_shadow.weight"
    torch.save({"model_state_dict": {**tensors, shadow: torch.ones(2)}, "step": 9}, path)
    return path


@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_stage_files_over_a_teacher(variant, tmp_path):
    second = stage_file(tmp_path / "stage2.pt", variant)
    third = stage_file(tmp_path / "stage3.pt", variant, without=("dt_bias", "A_log_bias"))
    config = convert_stages([second, third], TEACHER, tmp_path / "out", "released")
    assert config.variant == variant
    assert open_checkpoint(tmp_path / "out").layout == "released"
    args = golden.inputs("release_plain", "two_tiles")
    want = golden.outputs("release_plain", variant)["two_tiles.logits"]
    with torch.inference_mode():
        logits = load_model(tmp_path / "out")(**args)
    torch.testing.assert_close(logits, want, **GOLDEN_LOGITS._asdict())


def test_a_stage_3_file_alone_is_refused_with_the_reason(tmp_path):
    """The original fills dt_bias and A_log_bias anew here, silently (spec 9.1)."""
    third = stage_file(tmp_path / "stage3.pt", "linear", without=("dt_bias", "A_log_bias"))
    with pytest.raises(UserError, match="missing: .*dt_bias(.|\n)*give its stage-2 file first"):
        convert_stages([third], TEACHER, tmp_path / "out", "training")
    assert not (tmp_path / "out").exists()


class Evil:
    """Pickles into a call."""

    def __reduce__(self):
        return (print, ("executed",))


def test_no_pickle_is_executed(tmp_path, capsys):
    torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: not a \.pt file that torch's weights-only"):
        convert_stages([tmp_path / "evil.pt"], TEACHER, tmp_path / "out", "training")
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no 'model_state_dict'"):
        convert_stages([tmp_path / "list.pt"], TEACHER, tmp_path / "out", "training")


def test_layouts_there_and_back(tmp_path):
    convert_layout(golden.ROOT / "release_plain/hybrid/final", tmp_path / "a", "training")
    convert_layout(tmp_path / "a", tmp_path / "b", "released")
    before = load_file(golden.ROOT / "release_plain/hybrid/final/model.safetensors")
    after = load_file(tmp_path / "b/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrong_kinds_of_file(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for words, message in (
        (["x.txt"], "expected .pt files, one .gguf"),
        (["x.pt"], "give --teacher"),
        (["x.gguf"], r"x\.gguf: not found"),
    ):
        with pytest.raises(UserError, match=message):
            run(parser.parse_args([*words, "--out", str(tmp_path / "out")]))


# --- GGUF -----------------------------------------------------------------------------------------


def permute(weight, heads):
    """Half-split to interleaved rows, as llama.cpp's converter stores q and k."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def test_unpermute_restores_rotary_order():
    """Interleaved rotation of permuted rows is half-split rotation of the unpermuted ones."""
    weight = torch.arange(32.0).reshape(16, 2)
    stored = permute(weight, 2)
    assert not torch.equal(stored, weight)
    assert torch.equal(unpermute(stored, 2), weight)
    head = stored[:8]  # row pairs (0, 1), (2, 3), ... turn together
    assert torch.equal(torch.stack([head[0], head[1]]), torch.stack([weight[0], weight[4]]))


def test_pack_wqkv_is_the_inverse_of_split():
    config = open_checkpoint(TEACHER).config.llm
    wqkv = load_file(TEACHER / "model.safetensors")[
        "language_model.model.layers.1.attention.wqkv.weight"
    ]
    assert torch.equal(pack_wqkv(*split_wqkv(wqkv, config), config), wqkv)


def write_gguf(path, *, architecture="llama", rope_scaling=None, words="gpt2"):
    """The golden teacher's text half as a Llama GGUF (layers in order, embedding layers first)."""
    gguf = pytest.importorskip("gguf")
    source = open_checkpoint(TEACHER)
    c = source.config.llm
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(5)
    writer.add_context_length(256)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling))
    letters = [chr(33 + i) for i in range(94)]
    pieces = letters + [f"{a}{b}" for a in "ab" for b in letters][: 151 - 94]
    writer.add_tokenizer_model(words)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * 150 + [3])
    writer.add_token_merges([f"{w[0]} {w[1]}" for w in pieces[94:]])
    writer.add_eos_token_id(150)

    def add(name, tensor):
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))

    prefixes = [f"embedding_model.encoder.{i}." for i in range(2)]
    prefixes += [f"language_model.model.layers.{i}." for i in range(3)]
    for i, prefix in enumerate(prefixes):
        q, k, v = split_wqkv(source.get(f"{prefix}attention.wqkv.weight"), c)
        add(f"blk.{i}.attn_q.weight", permute(q, c.num_attention_heads))
        add(f"blk.{i}.attn_k.weight", permute(k, c.num_key_value_heads))
        add(f"blk.{i}.attn_v.weight", v)
        add(f"blk.{i}.attn_output.weight", source.get(f"{prefix}attention.wo.weight"))
        for theirs, ours in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            add(f"blk.{i}.ffn_{theirs}.weight", source.get(f"{prefix}feed_forward.{ours}.weight"))
        for name in ("attn", "ffn"):
            ours = "attention_norm" if name == "attn" else "ffn_norm"
            add(f"blk.{i}.{name}_norm.weight", source.get(f"{prefix}{ours}.weight"))
    add("token_embd.weight", source.get("embedding_model.llm_text_embeddings.weight"))
    add("output.weight", source.get("language_model.output.weight"))
    add("output_norm.weight", source.get("language_model.model.norm.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_keeps_every_text_tensor(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    config = convert_gguf(tmp_path / "m.gguf", tmp_path / "out", embedding_layers=2)
    assert (config.variant, config.vocab_size, config.img_context_token_id) == ("teacher", 154, 153)
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(TEACHER)
    for name in theirs.names():
        want, got = theirs.get(name), ours.get(name) if "vision" not in name else None
        if ".encoder." in name or ".layers." in name or name.endswith("model.norm.weight"):
            assert got is not None and torch.equal(got, want), name
        if name in ("language_model.output.weight", "embedding_model.llm_text_embeddings.weight"):
            assert got is not None and torch.equal(got[:151], want)
            torch.testing.assert_close(got[151], want.mean(0))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.token_to_id("<IMG_CONTEXT>") == 153
    assert tokenizer.encode("ab<img>").ids[-1] == 151


def test_gguf_with_another_kind_of_tokenizer_says_so(tmp_path):
    write_gguf(tmp_path / "m.gguf", words="llama")
    with pytest.warns(UserWarning, match=r"m\.gguf: its tokenizer is not byte-level BPE"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", embedding_layers=2)
    assert not (tmp_path / "out/tokenizer.json").exists()
    open_checkpoint(tmp_path / "out")


def test_gguf_with_what_the_decoder_does_not_compute_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", rope_scaling="linear")
    with pytest.raises(UserError, match=r"llama\.rope\.scaling\.type is 'linear'; .* 'none' only"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_of_another_architecture_and_garbage(tmp_path):
    write_gguf(tmp_path / "q.gguf", architecture="qwen2")
    with pytest.raises(UserError, match="architecture 'qwen2'; expected 'llama'"):
        convert_gguf(tmp_path / "q.gguf", tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"hello, this is not a GGUF file at all")
    with pytest.raises(UserError, match=r"bad\.gguf: not a readable GGUF file"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")

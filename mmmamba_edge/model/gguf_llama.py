"""A Llama-architecture GGUF as a teacher checkpoint: its text half exactly, a new vision stem.

The first layers become embedding layers, the rest language layers; as both halves are the same
pre-norm blocks, text logits stay the language model's own. Three tokens are added for images.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import save_checkpoint
from mmmamba_edge.model.tensor_names import DEAD, layer_prefix, training_shapes

IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")

# Pre-tokenisers, by GGUF's name for them, that this file knows how to rebuild: split digits or not.
BYTE_LEVEL = {"gpt-2": False, "default": False, "smollm": True, "starcoder": True, "refact": True}


def convert_gguf(
    path: Path, out: Path, embedding_layers: int | None = None, seed: int = 0
) -> Config:
    """Write the teacher checkpoint of a Llama GGUF, dequantised to float32, tensor by tensor.

    Args:
        path: the .gguf file; quantised tensors are dequantised (they stay on their grid).
        out: new checkpoint folder.
        embedding_layers: how many layers become embedding layers; None: a quarter.
        seed: of the vision stem and the image tokens' rows.

    Raises:
        UserError: not a GGUF, not a Llama, or with parts that the decoder does not compute.
    """
    reader = _open(path)
    config = _config(reader, path, embedding_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    get = _giver(tensors, config, path, seed)
    texts = {}
    tokenizer = _tokenizer(reader, config)
    if tokenizer is not None:
        special = {"bos_token": None, "eos_token": _token(reader, "eos_token_id")}
        texts["tokenizer.json"] = tokenizer.to_str()
        texts["tokenizer_config.json"] = json.dumps(special, indent=2) + "\n"
    else:
        warnings.warn(
            f"{path}: its tokenizer is not byte-level BPE, so the checkpoint gets none and takes "
            "token ids only; put the model's tokenizer.json beside it to chat",
            stacklevel=2,
        )
    save_checkpoint(out, config, get, extra_texts=texts)
    return config


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a GGUF q or k weight back from interleaved to half-split rotary order."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    )


def pack_wqkv(q: Tensor, k: Tensor, v: Tensor, config: StackConfig) -> Tensor:
    """q, k, v weights -> wqkv, rows grouped per kv head (spec 2.3)."""
    kv, width = config.num_key_value_heads, config.head_dim
    parts = [x.reshape(kv, -1, width, x.shape[1]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 2)


# --- reading ------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading GGUF needs the gguf package: pip install 'mmmamba-edge[train]'"
        ) from error
    if not path.is_file():
        raise UserError(f"{path}: not found")
    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error})") from error


def _field(reader: Any, key: str, default: Any = None) -> Any:
    found = reader.fields.get(key)
    return default if found is None else found.contents()


def _token(reader: Any, key: str) -> str | None:
    index = _field(reader, f"tokenizer.ggml.{key}")
    return None if index is None else _field(reader, "tokenizer.ggml.tokens")[index]


def _config(reader: Any, path: Path, embedding_layers: int | None) -> Config:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r}; expected 'llama'")
    names = {tensor.name for tensor in reader.tensors}
    unsupported = sorted(
        n for n in names if n.endswith(".bias") or "rope_freqs" in n or "exps" in n
    )
    if unsupported:
        raise UserError(
            f"{path}: {unsupported[0]} has no place in this decoder; expected plain Llama"
        )
    need = {
        key: _field(reader, f"llama.{key}")
        for key in (
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
        )
    }
    missing = [key for key, value in need.items() if value is None]
    if missing:
        raise UserError(f"{path}: no llama.{missing[0]}")
    layers, heads = need["block_count"], need["attention.head_count"]
    width = need["embedding_length"] // heads
    for key, plain in (
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.dimension_count", width),
        ("llama.attention.key_length", width),
        ("llama.attention.value_length", width),
    ):
        if (found := _field(reader, key, plain)) != plain:
            raise UserError(f"{path}: {key} is {found!r}; this reader knows {plain!r} only")
    if _field(reader, "tokenizer.ggml.tokens") is None:
        raise UserError(f"{path}: no tokenizer.ggml.tokens, so the vocabulary's size is unknown")
    first = layers // 4 if embedding_layers is None else embedding_layers
    if not 0 <= first <= layers:
        raise UserError(f"--embedding-layers {first}: this model has {layers} layers")
    shared = {
        "hidden_size": need["embedding_length"],
        "intermediate_size": need["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv", heads),
        "rms_norm_eps": float(_field(reader, "llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": float(_field(reader, "llama.rope.freq_base", 10000.0)),
        "max_position_embeddings": _field(reader, "llama.context_length", 2048),
    }
    words = len(_field(reader, "tokenizer.ggml.tokens"))
    return Config(
        embedding=StackConfig(**shared, layer_types=("attention",) * first),
        llm=StackConfig(**shared, layer_types=("attention",) * (layers - first)),
        vocab_size=words + len(IMAGE_TOKENS),
        img_context_token_id=words + IMAGE_TOKENS.index("<IMG_CONTEXT>"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id", 2),
        template="chatml",
    )


def _giver(
    tensors: dict[str, Any], config: Config, path: Path, seed: int
) -> Callable[[str], Tensor]:
    """Gives the float32 tensor of a training name."""
    from gguf import dequantize

    def read(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(f"{path}: no tensor {name}")
        source = tensors[name]
        return torch.from_numpy(dequantize(source.data, source.tensor_type).copy()).float()

    def with_image_rows(table: Tensor) -> Tensor:
        """The added tokens start as the mean of all."""
        return torch.cat([table, table.mean(0, keepdim=True).expand(len(IMAGE_TOKENS), -1)])

    def block(layer: int, local: str) -> Tensor:
        c = config.stack_of(layer)
        source = f"blk.{layer}."
        if local == "attention.wqkv.weight":
            q = unpermute(read(f"{source}attn_q.weight"), c.num_attention_heads)
            k = unpermute(read(f"{source}attn_k.weight"), c.num_key_value_heads)
            return pack_wqkv(q, k, read(f"{source}attn_v.weight"), c)
        return read(source + _BLOCK[local])

    prefixes = {layer_prefix(config, i): i for i in range(len(config.layer_types))}
    vision_shapes = {n: s for n, s in training_shapes(config).items() if n not in _GLOBAL}

    def get(name: str) -> Tensor:
        for prefix, layer in prefixes.items():
            if name.startswith(prefix):
                return block(layer, name.removeprefix(prefix))
        if name == "language_model.model.norm.weight":
            return read("output_norm.weight")
        if name in _GLOBAL:
            tied = "output.weight" not in tensors
            source = "output.weight" if name == _HEAD and not tied else "token_embd.weight"
            return with_image_rows(read(source))
        if name.endswith("bias"):
            return torch.zeros(vision_shapes[name])
        random = torch.Generator().manual_seed(seed * 10_007 + sum(name.encode()))
        return 0.02 * torch.randn(vision_shapes[name], generator=random)

    return get


_HEAD = "language_model.output.weight"
_GLOBAL = (_HEAD, DEAD, "embedding_model.llm_text_embeddings.weight")
_BLOCK = {
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}


def _tokenizer(reader: Any, config: Config) -> Any:
    """The GGUF's byte-level BPE with the image tokens added; None for kinds this cannot rebuild."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = _field(reader, "tokenizer.ggml.model")
    flavour = _field(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2" or flavour not in BYTE_LEVEL:
        return None
    words = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if BYTE_LEVEL[flavour]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for markers
    types = _field(reader, "tokenizer.ggml.token_type", [1] * len(words))
    marked = [word for word, type_ in zip(words, types, strict=True) if type_ == control]
    tokenizer.add_special_tokens(
        [AddedToken(w, normalized=False) for w in (*marked, *IMAGE_TOKENS)]
    )
    assert tokenizer.get_vocab_size() == config.vocab_size
    return tokenizer

"""Which tensors a checkpoint holds, by name and shape: one table for the three layouts.

The *training* layout is canonical: its names are `MMMamba.state_dict()`'s, and a teacher in it is a
HoVLE checkpoint. The *released* layout differs in the mixers only: five projections fused into
`wvkqgdt`, `g_norm` renamed (spec 5.1).
"""

from collections.abc import Iterator

from mmmamba_edge.config import CONV_KERNEL, Config

# In every released file, read by nothing: the language half is always fed embeddings (spec 2.2).
DEAD = "language_model.model.tok_embeddings.weight"

# Rows of the fused projection, in the order they are stacked.
FUSED_ROWS = ("v_proj", "k_proj", "q_proj", "g_proj", "in_proj")
FUSED = "wvkqgdt.weight"
RELEASED_G_NORM = "g_norm_swish_gate.weight"

Shape = tuple[int, ...]


def layer_prefix(config: Config, layer: int) -> str:
    """The name prefix of layer `layer`, numbered over the whole stack."""
    first = len(config.embedding.layer_types)
    if layer < first:
        return f"embedding_model.encoder.{layer}."
    return f"language_model.model.layers.{layer - first}."


def mixer_shapes(config: Config, layer: int) -> dict[str, Shape]:
    """The tensors of one Mamba-2 mixer, names relative to `...attention.` (spec 3.1)."""
    c = config.stack_of(layer)
    hidden, heads = c.hidden_size, c.num_attention_heads
    return {
        "q_proj.weight": (hidden, hidden),
        "k_proj.weight": (c.key_value_dim, hidden),
        "v_proj.weight": (c.key_value_dim, hidden),
        "g_proj.weight": (hidden, hidden),
        "in_proj.weight": (heads, hidden),
        "conv1d.weight": (c.conv_dim, 1, CONV_KERNEL),
        "conv1d.bias": (c.conv_dim,),
        "dt_bias": (heads,),
        "A_log_bias": (heads,),
        "g_norm.weight": (c.head_dim,),
        "o_proj.weight": (hidden, hidden),
    }


def training_shapes(config: Config) -> dict[str, Shape]:
    """Every tensor of the training layout (for a teacher: of a HoVLE checkpoint), dead ones too."""
    shapes = dict(_global_shapes(config))
    for layer, kind in enumerate(config.layer_types):
        c, prefix = config.stack_of(layer), layer_prefix(config, layer)
        hidden, inner = c.hidden_size, c.intermediate_size
        if kind == "attention":
            mix = {
                "wqkv.weight": (hidden + 2 * c.key_value_dim, hidden),
                "wo.weight": (hidden, hidden),
            }
        else:
            mix = mixer_shapes(config, layer)
        shapes |= {f"{prefix}attention.{name}": shape for name, shape in mix.items()}
        shapes |= {
            f"{prefix}feed_forward.w1.weight": (inner, hidden),
            f"{prefix}feed_forward.w2.weight": (hidden, inner),
            f"{prefix}feed_forward.w3.weight": (inner, hidden),
            f"{prefix}attention_norm.weight": (hidden,),
            f"{prefix}ffn_norm.weight": (hidden,),
        }
    return shapes


def released_shapes(config: Config) -> dict[str, Shape]:
    """Every tensor of the released layout: the mixers' projections fused."""
    shapes: dict[str, Shape] = {}
    for name, shape in training_shapes(config).items():
        fused = fused_name(name)
        if fused is None:
            shapes[renamed(name)] = shape
        else:
            rows = shapes.get(fused, (0, 0))[0] + shape[0]
            shapes[fused] = (rows, shape[1])
    return shapes


def fused_name(name: str) -> str | None:
    """The fused tensor that holds the training tensor `name`, or None if it is not fused."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{FUSED}" if last in FUSED_ROWS else None


def fused_rows(config: Config, layer: int) -> Iterator[tuple[str, slice]]:
    """Each projection of layer `layer` with its rows in the fused tensor, in order."""
    shapes, start = mixer_shapes(config, layer), 0
    for name in FUSED_ROWS:
        stop = start + shapes[f"{name}.weight"][0]
        yield f"{name}.weight", slice(start, stop)
        start = stop


def renamed(name: str) -> str:
    """A training name that is not fused, in the released layout."""
    return name.replace("attention.g_norm.weight", f"attention.{RELEASED_G_NORM}")


def _global_shapes(config: Config) -> Iterator[tuple[str, Shape]]:
    vocab, hidden, patch = config.vocab_size, config.hidden_size, config.patch_size
    yield "embedding_model.llm_text_embeddings.weight", (vocab, hidden)
    stem = "embedding_model.vision_embeddings."
    yield f"{stem}class_embedding", (1, 1, hidden)
    yield f"{stem}position_embedding", (1, config.patches_per_tile + 1, hidden)
    yield f"{stem}patch_embedding.weight", (hidden, 3, patch, patch)
    yield f"{stem}patch_embedding.bias", (hidden,)
    proj = "embedding_model.pixel_shuffle_proj."
    yield f"{proj}0.weight", (hidden, hidden * config.shuffle**2)
    yield f"{proj}0.bias", (hidden,)
    yield f"{proj}2.weight", (hidden, hidden)
    yield f"{proj}2.bias", (hidden,)
    yield DEAD, (vocab, hidden)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.output.weight", (vocab, hidden)

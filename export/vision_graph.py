"""The two graphs that make vectors: `vision` from pixels, `embed` from token ids.

vision: pixel_values (tiles, 3, height, width) -> vision_embeds (tiles, tokens_per_tile, hidden)
embed:  input_ids (1, tokens) -> inputs_embeds (1, tokens, hidden)
"""

from mmmamba_edge.export.graph_writer import FLOAT, INT64, GraphWriter
from mmmamba_edge.export.ops import Ops
from mmmamba_edge.export.weights import EMBEDDING, PROJECTOR, STEM, Weights


def write_vision(g: GraphWriter, ops: Ops, weights: Weights) -> None:
    """Write the vision graph (spec 1.3, 'pre'): patches, positions, pixel shuffle, MLP."""
    c = weights.config
    side, grid, merge, hidden = c.image_size, c.grid, c.shuffle, c.hidden_size
    pixels = g.input("pixel_values", FLOAT, ["tiles", 3, side, side])
    kernel = weights.tensor(f"{STEM}patch_embedding.weight")
    x = g.one(
        "Conv", pixels, g.weight("patch.weight", kernel),
        g.weight("patch.bias", weights.tensor(f"{STEM}patch_embedding.bias")),
        label="patch", kernel_shape=[c.patch_size] * 2, strides=[c.patch_size] * 2,
    )  # fmt: skip
    # Positions lie on the patch grid, so they are added before it is cut up. The first belongs to
    # the class token, which no model of this family uses.
    positions = weights.tensor(f"{STEM}position_embedding")[0, 1:]  # (patches, hidden)
    positions = positions.T.reshape(1, hidden, grid, grid)
    x = g.one("Add", x, g.weight("positions", positions))

    # (tiles, hidden, rows, cols) -> merge x merge neighbours as one vector, rows first
    blocks = grid // merge
    x = g.one("Reshape", x, g.ints(-1, hidden, blocks, merge, blocks, merge))
    x = g.one("Transpose", x, perm=[0, 2, 4, 3, 5, 1])
    x = g.one("Reshape", x, g.ints(-1, c.tokens_per_tile, hidden * merge**2))

    def linear(x: str, name: str) -> str:
        weight = weights.matrix(f"{PROJECTOR}{name}.weight")
        return ops.linear(x, f"mlp.{name}", weight, weights.tensor(f"{PROJECTOR}{name}.bias"))

    x = linear(g.one("Gelu", linear(x, "0"), approximate="none"), "2")
    g.rename(x, "vision_embeds")
    g.output("vision_embeds", FLOAT, ["tiles", c.tokens_per_tile, hidden])


def write_embed(g: GraphWriter, ops: Ops, weights: Weights) -> None:
    """Write the embed graph: a look-up in the table that the model really reads (spec 2.2)."""
    ids = g.input("input_ids", INT64, [1, "tokens"])
    ops.embedding(ids, "inputs_embeds", "embedding", weights.matrix(EMBEDDING))
    g.output("inputs_embeds", FLOAT, [1, "tokens", weights.config.hidden_size])

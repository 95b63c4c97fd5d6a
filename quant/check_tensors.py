"""A bundle's weights against the checkpoint's, tensor by tensor: which one is wrong, and how.

What a fold moves from a norm into the columns behind it, or from a product's rows into the next
one's columns, is followed: smoothed models pass, and a fold done by half is seen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.export.decoder_graph import unpacked_rows
from mmmamba_edge.export.weights import EMBEDDING, HEAD, PROJECTOR, STEM, Weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.quant.check_faults import (
    Finding,
    columns_fit,
    compare,
    norm,
    row_factors,
    same,
)
from mmmamba_edge.quant.held_matrices import Matrix, held_matrix
from mmmamba_edge.quant.initializers import Initializers
from mmmamba_edge.status import Report, silent

Floats = NDArray[np.float32]


def check_tensors(
    folder: Path, manifest: Manifest, weights: Weights, say: Report = silent
) -> tuple[list[Finding], list[str]]:
    """Compare every tensor that the bundle's graphs hold under a name of ours.

    Args:
        folder: the bundle, with graphs in ONNX.
        manifest: its manifest.
        weights: of the checkpoint, in float32.
        say: told how far it is.

    Returns:
        What was found of each tensor, and the names of those that the graphs do not show.
    """
    decoder = Initializers(folder / manifest.graphs["decoder"])
    embed = Initializers(folder / manifest.graphs["embed"])
    vision = Initializers(folder / manifest.graphs["vision"])
    found: list[Finding] = []
    unseen: list[str] = []
    config = weights.config

    def note(what: Finding | None, name: str) -> None:
        if what is None:
            unseen.append(name)
        else:
            found.append(what)

    total = len(config.layer_types)
    for index, kind in enumerate(config.layer_types):
        say("comparing weights, layer", index, total)
        _Layer(decoder, weights, index, kind, note).check()
    say("comparing weights, layer", total, total)
    rows = held_matrix(embed, "embedding")
    note(compare(EMBEDDING, rows, weights.seen(EMBEDDING)), EMBEDDING)
    name = "language_model.model.norm.weight"
    factor, what = norm(decoder, weights, name)
    note(what, name)
    head = held_matrix(decoder, "head")
    note(compare(HEAD, head, weights.seen(HEAD) * factor), HEAD)
    for part in ("0", "2"):
        name = f"{PROJECTOR}{part}.weight"
        note(compare(name, held_matrix(vision, f"mlp.{part}"), weights.tensor(name)), name)
        name = f"{PROJECTOR}{part}.bias"
        note(same(name, vision.get(f"mlp.{part}.bias"), weights.tensor(name)), name)
    for ours, name in (("patch.weight", "patch_embedding.weight"),
                       ("patch.bias", "patch_embedding.bias")):  # fmt: skip
        note(same(STEM + name, vision.get(ours), weights.tensor(STEM + name)), STEM + name)
    name = f"{STEM}position_embedding"  # its first row is the class token's, which no graph has
    note(same(name, vision.get("positions"), weights.tensor(name)[0, 1:].T), name)
    return found, unseen


class _Layer:
    """The tensors of one decoder layer."""

    def __init__(
        self, held: Initializers, weights: Weights, index: int, kind: str,
        note: Callable[[Finding | None, str], None],
    ) -> None:  # fmt: skip
        self.held, self.weights, self.kind, self.note = held, weights, kind, note
        self.stack = weights.config.stack_of(index)
        self.prefix = weights.prefix(index)

    def check(self) -> None:
        p = self.prefix
        factor = self.norm(f"{p}attention_norm.weight")
        if self.kind == "mamba2":
            self.mixer(f"{p}attention.", factor)
        else:
            self.attention(f"{p}attention.", factor)
        factor = self.norm(f"{p}ffn_norm.weight")
        self.feed_forward(f"{p}feed_forward.", factor)

    def norm(self, name: str) -> Floats:
        """What the norm leaves to the columns behind it: (columns,), all 1 without a fold."""
        factor, what = norm(self.held, self.weights, name)
        self.note(what, name)
        return factor

    def product(self, name: str, stored: str, factor: Floats | float = 1.0) -> None:
        got = held_matrix(self.held, stored)
        self.note(compare(name, got, self.weights.tensor(name) * factor), name)

    def mixer(self, a: str, factor: Floats) -> None:
        w, held = self.weights, self.held
        names = [f"{a}{x}_proj.weight" for x in "vkqg"]
        dt = f"{a}in_proj.weight"
        fused = held_matrix(held, f"{a}vkqg")
        if fused is None:
            fused, names = held_matrix(held, f"{a}vkqgdt"), [*names, dt]
        else:
            got = held.get(f"{a}dt.weight")
            self.note(same(dt, None if got is None else got.T, w.tensor(dt) * factor), dt)
        start = 0
        for name in names:
            want = w.tensor(name) * factor
            part = None if fused is None else fused.rows(start, start + len(want))
            self.note(compare(name, part, want), name)
            start += len(want)
        conv = f"{a}conv1d.weight"
        kernel = held.get(conv)
        if kernel is None:
            taps = [held.get(f"{a}conv1d.tap{i}") for i in range(2)]
            if not any(tap is None for tap in taps):
                kernel = np.stack([np.ravel(cast(Floats, tap)) for tap in taps], axis=-1)[:, None]
        self.note(same(conv, kernel, w.tensor(conv)), conv)
        for name in ("conv1d.bias", "dt_bias"):
            self.note(same(a + name, held.get(a + name), w.tensor(a + name)), a + name)
        name = f"{a}A_log_bias"
        self.note(same(name, held.get(f"{a}a"), -np.exp(w.tensor(name))), name)
        # The norm is shared by the heads; one that took a fold has a number for each channel.
        name, heads = f"{a}g_norm.weight", self.stack.num_attention_heads
        factor, what = norm(held, w, name, repeat=heads)
        self.note(what, name)
        self.product(f"{a}o_proj.weight", f"{a}o_proj", factor)

    def attention(self, a: str, factor: Floats) -> None:
        stack = self.stack
        packed, out = f"{a}wqkv.weight", f"{a}wo.weight"
        q, k, v = unpacked_rows(stack)
        whole = self.weights.tensor(packed) * factor
        got = held_matrix(self.held, f"{a}qkv")
        size, end = len(q) + len(k), len(q) + len(k) + len(v)
        part = None if got is None else got.rows(0, size)
        self.note(compare(packed, part, whole[np.concatenate([q, k])]), packed)
        part = None if got is None else got.rows(size, end)
        groups = stack.num_attention_heads // stack.num_key_value_heads

        def spread(factors: Floats) -> Floats:  # every query head reads its value head's channels
            by_head = factors.reshape(stack.num_key_value_heads, 1, stack.head_dim)
            return np.repeat(by_head, groups, axis=1).ravel()

        wo = held_matrix(self.held, f"{a}wo")
        self.pair(packed, part, whole[v], out, wo, self.weights.tensor(out), spread)

    def feed_forward(self, f: str, factor: Floats) -> None:
        w = self.weights
        names = [f"{f}{name}.weight" for name in ("w1", "w3", "w2")]
        gate_up, down = held_matrix(self.held, f"{f}w1w3"), held_matrix(self.held, f"{f}w2")
        gate, up = w.tensor(names[0]) * factor, w.tensor(names[1]) * factor
        inner = len(gate)
        part = None if gate_up is None else gate_up.rows(0, inner)
        self.note(compare(names[0], part, gate), names[0])
        part = None if gate_up is None else gate_up.rows(inner, 2 * inner)
        self.pair(names[1], part, up, names[2], down, w.tensor(names[2]), lambda x: x)

    def pair(
        self, before: str, part: Matrix | None, up: Floats, behind: str, down: Matrix | None,
        want: Floats, spread: Callable[[Floats], Floats],
    ) -> None:  # fmt: skip
        """Rows of one matrix that may have given factors to columns of the next."""
        found = compare(before, part, up), compare(behind, down, want)
        if part is not None and down is not None and any(x and x.fault for x in found):
            moved = row_factors(part, up)
            folded = want / spread(moved)
            other = compare(before, part, up * moved[:, None]), compare(behind, down, folded)
            if not any(x and x.fault for x in other) and columns_fit(down, folded):
                found = other
        for what, name in zip(found, (before, behind), strict=True):
            self.note(what, name)

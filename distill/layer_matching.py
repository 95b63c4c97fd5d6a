"""Stages 1 and 2: each mixer learns to say what its layer's attention says (spec 6.2).

The teacher runs once, as it is. At every attention layer a hook takes the layer's input u and its
per-head output y_T from scaled_dot_product_attention, and the layer's mixer is compared with y_T
and backpropagated at once. The residual stream is the teacher's, so no layer depends on another:
memory does not grow with depth, and no attention matrix exists.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.distill.distill_recipe import Match, MatchingConfig
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.distill.losses import matching_error, token_errors, weighted_error
from mmmamba_edge.distill.reading import read
from mmmamba_edge.distill.student import share_output_projection, train_only
from mmmamba_edge.distill.training import train
from mmmamba_edge.model import training_ops
from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.layers import Attention
from mmmamba_edge.model.mixer import Mamba2Mixer

if TYPE_CHECKING:
    from mmmamba_edge.distill.run import Run

SCALE = 1000.0  # the original's, so that learning rates mean what the paper's do


def match_layers(
    run: "Run", number: int, config: MatchingConfig, start: Checkpoint | None
) -> Checkpoint:
    """Run a stage of this sort: stage1.py and stage2.py."""
    total = range(len(run.teacher.layers))
    layers = total if config.layers == "all" else sorted(set(total) - run.kept)
    mixers = run.mixers(layers, start)
    train_only(mixers, config.train)
    share_output_projection(run.teacher, mixers, run.file)
    stage = LayerMatching(
        run.teacher, mixers, run.engine, match=config.match, relative=config.relative,
        compiled=run.recipe.engine.compile,
    )  # fmt: skip
    try:
        train(
            stage, run.source, run.engine, config, run.begin(number), f"stage {number}",
            kind=run.recipe.engine, validation=run.validation,
        )  # fmt: skip
    finally:
        stage.close()
    return run.finish(number, mixers)


class MatchedMixer(nn.Module):
    """A mixer and what it is compared with."""

    def __init__(self, mixer: Mamba2Mixer, match: Match, relative: bool) -> None:
        super().__init__()
        self.mixer, self.match, self.relative = mixer, match, relative

    def forward(self, u: Tensor, lengths: Tensor | None, target: Tensor, weights: Tensor) -> Tensor:
        """Squared error summed over tokens by weight.

        Args:
            u: (rows, seq, hidden), the layer's normed input.
            lengths: (rows,) real tokens.
            target: (rows, seq, hidden), the teacher's heads side by side, or its output.
            weights: (rows, seq).
        """
        if self.match == "output":
            return matching_error(self.mixer(u, lengths), target, weights, relative=self.relative)
        error, power = self.mixer(
            u, lengths, ending=lambda y, gate: self._token_errors(y, gate, target)
        )
        return weighted_error(error, power, weights, relative=self.relative)

    def _token_errors(self, y: Tensor, gate: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixer.fuses(y):
            norm = self.mixer.g_norm
            return training_ops.gated_norm_error(y, gate, norm.weight, norm.eps, target)
        return token_errors(self.mixer.gated(y, gate), target)


class LayerMatching:
    """A stage that trains mixers one layer at a time.

    Args:
        teacher: all attention, frozen; hooks stay on it until `close`.
        mixers: to train, by layer.
        engine: where it runs.
        match: what of a layer is compared.
        relative: whether each layer's error is divided by its target's mean square.
        compiled: torch.compile the mixers, and what of the teacher's layers is not hooked.
    """

    def __init__(
        self, teacher: MMMamba, mixers: Mapping[int, Mamba2Mixer], engine: Engine,
        *, match: Match = "heads", relative: bool = False, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.teacher, self.mixers, self.engine = teacher, mixers, engine
        self._match: Match = match
        layers = sorted(mixers)
        units = [MatchedMixer(mixers[i], match, relative) for i in layers]
        if compiled:
            for unit in units:
                engine.compile(unit)
            for layer in teacher.layers:
                # Its attention is hooked, and stays as it is; what lies around need not.
                engine.compile(layer.attention_norm)
                assert isinstance(layer.attention, Attention)
                engine.compile(layer.attention.rotary)
                engine.compile(layer.attention.rotary, "tables")
                engine.compile(layer, "fed")
        self.units = [engine.wrap(unit) for unit in units]
        self._hooks, self._seen = [], {}
        self._weights: Tensor | None = None
        self._factor: Tensor | float = 0.0
        self._learning = False
        self._errors: list[Tensor] = []
        for layer, unit in zip(layers, self.units, strict=True):
            self._watch(teacher.layers[layer].attention, unit, last=layer == layers[-1])

    def backward(self, batch: Batch, factor: Tensor | float) -> Tensor:
        """Gradients of one micro-batch are added up; returns its share of the loss.

        Args:
            batch: on the device.
            factor: what the sum over tokens is multiplied with: one over the total weight of the
                global batch, times the number of processes that gradients are averaged over.
        """
        return self._run(batch, factor, learning=True)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """The sum over tokens, nothing learnt."""
        return self._run(batch, 1.0, learning=False)

    def layer_errors(self, *, weights: Tensor | None = None, **inputs: Any) -> list[Tensor]:
        """Mean squared error of each layer on the arguments of `MMMamba.forward`, in layer order.

        `weights` None: every token counts, in sequences of any length ('post').
        """
        self._weights, self._factor, self._learning, self._errors = weights, 1.0, False, []
        with torch.no_grad(), self.engine.autocast(), suppress(_AllSeen):
            self.teacher(**inputs)
        return [error * len(self.units) / SCALE for error in self._errors]

    def close(self) -> None:
        """Give the teacher back as it was: without hooks, nothing of it compiled apart."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.teacher.layers:
            layer.__dict__.pop("fed", None)
            assert isinstance(layer.attention, Attention)
            layer.attention.rotary.__dict__.pop("tables", None)

    def _run(self, batch: Batch, factor: Tensor | float, *, learning: bool) -> Tensor:
        self._weights, self._factor, self._learning = batch.weights, factor, learning
        self._errors = []
        with torch.no_grad(), self.engine.autocast(), suppress(_AllSeen):
            read(self.teacher, batch)
        return torch.stack(self._errors).sum()

    def _watch(self, attention: nn.Module, unit: nn.Module, *, last: bool) -> None:
        """Hooks: u is what the layer is given, the heads are what `wo` is given."""
        assert isinstance(attention, Attention)

        def given(_: nn.Module, args: tuple) -> None:
            self._seen["given"] = args[0], args[1]

        def heads(_: nn.Module, args: tuple) -> None:
            compare(args[0])

        def whole(_: nn.Module, args: tuple, output: Tensor) -> None:
            compare(output)

        def compare(target: Tensor) -> None:
            u, lengths = self._seen.pop("given")
            if (weights := self._weights) is None:
                weights = torch.ones(u.shape[:2], device=u.device)
                weights = weights / weights.sum()
            with torch.set_grad_enabled(self._learning):
                loss = unit(u, lengths, target, weights) * (SCALE / len(self.units) * self._factor)
                if self._learning:
                    loss.backward()
            self._errors.append(loss.detach())
            if last:
                raise _AllSeen

        self._hooks.append(attention.register_forward_pre_hook(given))
        if self._match == "heads":  # a mixer that uses `wo` itself would set it off as well
            self._hooks.append(attention.wo.register_forward_pre_hook(heads))
        else:
            self._hooks.append(attention.register_forward_hook(whole))


class _AllSeen(Exception):
    """The last layer that is compared has been: what the teacher would do after it is left out."""

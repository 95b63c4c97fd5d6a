"""Mixed precision: which matrices are worth 8 bits, by what the answers lose without them.

A unit is what one product of the graphs holds (q, k, v and gate together; w1 and w3 together): its
matrices stay of one kind. Each unit's loss is measured alone: the KL divergence of the answers when
only that unit is in 4 bits, everything else as it was. Those that lose most for the bytes they cost
go to 8 bits, until a budget of bits a weight is spent (spec/quant.md section 5).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_edge.model.checkpoints import Checkpoint, load_model
from mmmamba_edge.model.decoder import DecoderLayer, MMMamba
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.folds import Site, sites
from mmmamba_edge.quant.gptq import quantize_gptq
from mmmamba_edge.quant.plan import Plan
from mmmamba_edge.quant.quantize_data import Calibration
from mmmamba_edge.quant.quantize_layers import gather
from mmmamba_edge.status import Report, silent

TOKENS = 1024  # read for each unit; a unit's KL is a mean over them


@dataclass(frozen=True)
class Unit:
    """Matrices that one product holds.

    Attributes:
        names: training names.
        weights: numbers in them.
        bits4, bits8: a weight's bits either way, scales of 16 bits counted.
        kl: nats a token when only this unit is in 4 bits.
    """

    names: tuple[str, ...]
    weights: int
    bits4: float
    bits8: float
    kl: float

    @property
    def cost(self) -> float:
        """Bits that 8 instead of 4 bits take."""
        return self.weights * (self.bits8 - self.bits4)


def measure_units(
    source: Checkpoint, plan: Plan, calibration: Calibration, report: Report = silent,
    tokens: int = TOKENS, device: str = "cpu",
) -> list[Unit]:  # fmt: skip
    """The loss of every unit. The model is in memory in float32, once.

    Args:
        source: a float checkpoint.
        plan: groups of the 4 bits.
        calibration: sequences, of which the first are read.
        report: told how far it is.
        tokens: read for a unit, at most.
        device: where the model is.
    """
    model = load_model(source, dtype=torch.float32).to(device)
    config, units = source.config, []
    with torch.inference_mode():
        streams = _embedded(model, calibration, tokens)
        wanted = None
        inputs: list[list[Tensor]] = []
        for index, layer in enumerate(model.layers):
            if index == len(config.embedding.layer_types):
                streams = [model.normalize(x) for x in streams]
            inputs.append(streams)
            streams = [layer(x, None) for x in streams]
        wanted = [_answers(model, x) for x in streams]
        for index, kind in enumerate(config.layer_types):
            prefix, layer = layer_prefix(config, index), model.layers[index]
            report("what each layer's matrices lose in 4 bits: layer", index, len(inputs))
            hessians = gather(layer, sites(kind), inputs[index])
            for site in sites(kind):
                kl = _loss_of(model, index, layer, site, hessians[site.name], plan, inputs, wanted)
                units.append(_unit(layer, site, prefix, plan, kl))
        report("what each layer's matrices lose in 4 bits: layer", len(inputs), len(inputs))
    return units


def promoted(units: list[Unit], bits_per_weight: float) -> dict[str, str]:
    """Matrices for 8 bits, each with the reason, within a budget of all units' mean bits.

    The most KL for a bit goes first; what no longer fits is passed over for smaller units.
    """
    total = sum(unit.weights for unit in units)
    left = bits_per_weight * total - sum(unit.weights * unit.bits4 for unit in units)
    chosen = {}
    for unit in sorted(units, key=lambda u: u.kl / u.cost, reverse=True):
        if unit.cost <= left:
            left -= unit.cost
            reason = f"mixed: {unit.kl:.2g} nats a token lost if it alone is in 4 bits"
            chosen |= dict.fromkeys(unit.names, reason)
    return chosen


def _embedded(model: MMMamba, calibration: Calibration, tokens: int) -> list[Tensor]:
    device, streams, read = model.language_model.output.weight.device, [], 0
    for sequence in calibration.sequences:
        ids, pixels = torch.from_numpy(sequence.ids)[None].to(device), None
        if sequence.pixels is not None:
            pixels = torch.from_numpy(sequence.pixels).to(device)
        streams.append(model.embed_tokens(ids, None, model.image_vectors(pixels)))
        read += ids.shape[1]
        if read >= tokens:
            break
    return streams


def _answers(model: MMMamba, x: Tensor) -> Tensor:
    """Log-probabilities (tokens, vocab_size) after the last layer."""
    language = model.language_model
    return F.log_softmax(language.output(language.model.norm(x[0])), dim=-1)


def _loss_of(
    model: MMMamba, index: int, layer: DecoderLayer, site: Site, hessian: Tensor, plan: Plan,
    inputs: list[list[Tensor]], wanted: list[Tensor],
) -> float:  # fmt: skip
    """KL with the site's matrices rounded; they are put back."""
    kept = {name: layer.get_parameter(name).data for name in site.coded}
    for name, weight in kept.items():
        group = plan.choice(name).group_of(weight.shape[1])
        codes = quantize_gptq(weight, hessian, 4 if group else 8, group)
        layer.get_parameter(name).data = torch.from_numpy(codes.dequantized()).to(weight.device)
    config, total, read = model.config, 0.0, 0
    for x, p in zip(inputs[index], wanted, strict=True):
        for i in range(index, len(inputs)):
            if i == len(config.embedding.layer_types) and i > index:
                x = model.normalize(x)
            x = model.layers[i](x, None)
        total += float(F.kl_div(_answers(model, x), p, log_target=True, reduction="sum"))
        read += len(p)
    for name, weight in kept.items():
        layer.get_parameter(name).data = weight
    return max(total / read, 0.0)


def _unit(layer: DecoderLayer, site: Site, prefix: str, plan: Plan, kl: float) -> Unit:
    shapes = [layer.get_parameter(name).shape for name in site.coded]
    weights = sum(shape.numel() for shape in shapes)
    columns = shapes[0][1]
    group = plan.choice(site.coded[0]).group_of(columns) or columns
    return Unit(
        tuple(prefix + name for name in site.coded), weights, 4 + 16 / group, 8 + 16 / columns, kl
    )

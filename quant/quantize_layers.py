"""Quantises a checkpoint layer by layer; each layer is fed what the quantised ones before it give.

With `fisher`, what answers depend on is measured first (quantize_sensitivity.py).
For every layer: read the calibration sequences once with its own weights and gather each matrix's
inputs; fold (folds.py); round (gptq.py or rounding.py); read once more with the rounded weights,
which is the next layer's input. One layer is in memory at a time. A finished layer is on disk, so
that a killed run goes on behind it.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmmamba_edge.config import StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.reference import embedded, load_layer, normalised
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.model.checkpoints import SINGLE, Checkpoint, assign
from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.model.tensor_names import DEAD, layer_prefix
from mmmamba_edge.quant.codes import Codes
from mmmamba_edge.quant.folds import Site, Tensors, apply, choose, rows_divided_by, sites
from mmmamba_edge.quant.gptq import Hessian, product_error, quantize_gptq
from mmmamba_edge.quant.plan import Choice, Plan
from mmmamba_edge.quant.quantize_data import Calibration
from mmmamba_edge.quant.quantize_sensitivity import (
    Sensitivity,
    load_sensitivity,
    measure_sensitivity,
)
from mmmamba_edge.quant.rounding import quantize_clipped
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.quant.stored import (
    CODES,
    FACTS,
    Coding,
    Facts,
    codes_digest,
    pack_codes,
    unpack_codes,
)
from mmmamba_edge.status import Report, silent
from mmmamba_edge.tokenizer import tokenizer_files
from mmmamba_edge.whole import new_file, new_folder, working_folder


@dataclass
class Part:
    """What became of a layer, or of the matrices outside the layers. Names are training names."""

    floats: Tensors = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    codings: dict[str, Coding] = field(default_factory=dict)
    folds: dict[str, float] = field(default_factory=dict)


def quantize_checkpoint(
    source: Checkpoint, out: Path, plan: Plan, calibration: Calibration,
    report: Report = silent, device: str = "cpu",
) -> Facts:  # fmt: skip
    """Write the quantised checkpoint `out`.

    Args:
        source: what is quantised; it stays as it is.
        out: folder, must not exist. Layers that are done wait in `out`.working.
        plan: bits, groups and algorithm of each matrix.
        calibration: what is read.
        report: told how far it is.
        device: where layers read and are rounded; the codes of two kinds differ in last digits.

    Raises:
        UserError: weights that are not finite, or a place that cannot be written.
    """
    with new_folder(out) as folder:
        layers = _layers(source, out, plan, calibration, report, device)
        parts = [*layers, _rest(source, plan, report)]
        report("writing")
        facts = _facts(source, plan, calibration, parts)
        floats = {name: tensor for part in parts for name, tensor in part.floats.items()}
        _save(floats, folder / SINGLE)
        _save(_packed({n: c for part in parts for n, c in part.codes.items()}), folder / CODES)
        (folder / FACTS).write_text(facts.to_json(), encoding="utf-8")
        for file in (source.folder / "config.json", *tokenizer_files(source.folder)):
            shutil.copyfile(file, folder / file.name)
    shutil.rmtree(_working(out), ignore_errors=True)
    return facts


def _layers(
    source: Checkpoint, out: Path, plan: Plan, calibration: Calibration, report: Report,
    device: str,
) -> Iterator[Part]:  # fmt: skip
    config, weights = source.config, Weights(source, SCHEMES["none"])
    working, total = _open_working(source, out, plan, calibration, device), len(config.layer_types)
    shown = [(s.ids, s.pixels) for s in calibration.sequences]
    with torch.inference_mode():
        hidden = [x.to(device) for x in embedded(weights, shown)]
    importance = [torch.from_numpy(w).to(device) for w in calibration.weights]
    if plan.algorithm == "fisher":
        measure_sensitivity(weights, hidden, calibration, working, report)
    for index, kind in enumerate(config.layer_types):
        report("quantising layer", index, total)
        if index == len(config.embedding.layer_types) and config.normalize_encoder_output:
            hidden = [normalised(x) for x in hidden]
        prefix, stack = layer_prefix(config, index), config.stack_of(index)
        file = working / f"layer-{index:03}.safetensors"
        with torch.inference_mode():
            part = _load_part(file)
            if part is None:
                layer = load_layer(weights, index, kind).to(device)
                known = load_sensitivity(working, index, importance)
                part = _quantized(layer, kind, stack, prefix, hidden, importance, plan, known)
                _save_part(part, file)
            if index + 1 < total:
                layer = _rebuilt(stack, kind, part, prefix).to(device)
                hidden = [layer(x, None) for x in hidden]
        yield part
    report("quantising layer", total, total)


@torch.inference_mode()
def _quantized(
    layer: DecoderLayer, kind: str, stack: StackConfig, prefix: str,
    hidden: list[Tensor], importance: list[Tensor], plan: Plan,
    sensitivity: Sensitivity | None = None,
) -> Part:  # fmt: skip
    tensors: Tensors = {name: p.detach().clone() for name, p in layer.named_parameters()}
    here = sites(kind)
    hessians = gather(layer, here, hidden, sensitivity.tokens if sensitivity else importance)
    outputs = sensitivity.outputs if sensitivity else {}
    part = Part()
    for site in here:
        choice, mean = plan.choice(prefix + site.coded[0]), hessians[site.name]
        if plan.folds and choice.bits:
            group = choice.group_of(mean.shape[0])
            strength, scales = choose(site, tensors, mean, stack, choice.bits, group)
            if strength:
                apply(site, tensors, scales, stack)
                hessians[site.name] = mean / scales[:, None] / scales
                if site.writer in outputs:
                    rows = rows_divided_by(site, scales, stack, len(outputs[site.writer]))
                    outputs[site.writer] = outputs[site.writer] * rows[:, None] * rows
                part.folds[f"{prefix}{site.name}"] = strength
    for site in here:
        _same_bits(site, prefix, plan)
        for name in site.coded:
            choice, weight = plan.choice(prefix + name), tensors.pop(name)
            if not choice.bits:
                part.floats[prefix + name] = weight.cpu()
                continue
            try:
                codes = _rounded(weight, choice, hessians[site.name], outputs.get(name))
            except ValueError as error:
                raise UserError(f"{prefix}{name}: {error}") from error
            error = product_error(weight, codes, hessians[site.name])
            part.codes[prefix + name] = codes
            part.codings[prefix + name] = Coding(
                codes.bits, codes.group, choice.algorithm, choice.reason, float(f"{error:.4g}")
            )
    part.floats |= {prefix + name: tensor.cpu() for name, tensor in tensors.items()}
    return part


def _same_bits(site: Site, prefix: str, plan: Plan) -> None:
    """One product holds them all, on every runtime."""
    bits = {name: plan.choice(prefix + name).bits for name in site.coded}
    if len(set(bits.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in bits.items())
        raise UserError(
            f"scheme {plan.scheme}: {prefix}: one product holds these matrices, which have other "
            f"bits ({listed}); give them the same"
        )


def gather(
    layer: DecoderLayer, here: tuple[Site, ...], hidden: list[Tensor],
    importance: list[Tensor] | dict[str, list[Tensor]] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean x x^T of each site's input, (columns, columns) by the site's name.

    Args:
        layer: it reads `hidden`; what it says is not looked at.
        here: its sites.
        hidden: (1, tokens, hidden) of each sequence.
        importance: (tokens,) weights of each, one list for all sites or one for each; None: all
            alike.
    """
    found, reading, hooks = {}, 0, []
    for site in here:
        module = layer.get_submodule(site.probe)
        found[site.name] = total = Hessian(module.in_features, hidden[0].device)  # pyright: ignore
        own = importance[site.name] if isinstance(importance, dict) else importance

        def add(
            _module: nn.Module, inputs: tuple[Tensor], total: Hessian = total,
            own: list[Tensor] | None = own,
        ) -> None:  # fmt: skip
            total.add(inputs[0].flatten(0, 1), None if own is None else own[reading])

        hooks.append(module.register_forward_pre_hook(add))  # pyright: ignore[reportArgumentType]
    for i, x in enumerate(hidden):
        reading = i
        layer(x, None)
    for hook in hooks:
        hook.remove()
    return {name: total.mean for name, total in found.items()}


def _rounded(
    weight: Tensor, choice: Choice, hessian: Tensor, outputs: Tensor | None = None
) -> Codes:
    group = choice.group_of(weight.shape[1])
    bits = choice.bits if group or choice.bits == 8 else 8  # columns that no group divides
    if choice.algorithm != "clipped":
        return quantize_gptq(weight, hessian, bits, group, outputs=outputs)
    return quantize_clipped(weight, bits, group, hessian.diagonal())


def _rest(source: Checkpoint, plan: Plan, report: Report) -> Part:
    """All that is in no layer: table, head, vision. Rounded without looking at inputs."""
    report("quantising what is in no layer")
    config, part = source.config, Part()
    prefixes = tuple(layer_prefix(config, i) for i in range(len(config.layer_types)))
    for name in source.names():
        if name == DEAD or name.startswith(prefixes):
            continue
        choice, tensor = plan.choice(name), source.get(name)
        if not choice.bits or tensor.ndim != 2:
            part.floats[name] = tensor.clone()
            continue
        weight = tensor.float()
        if not torch.isfinite(weight).all():
            raise UserError(f"{source.folder}: {name}: holds NaN or infinity")
        codes = quantize_clipped(weight, choice.bits, choice.group_of(weight.shape[1]))
        part.codes[name] = codes
        part.codings[name] = Coding(codes.bits, codes.group, "clipped", choice.reason)
    return part


# --- modules and files ----------------------------------------------------------------------------


def _rebuilt(stack: StackConfig, kind: str, part: Part, prefix: str) -> DecoderLayer:
    """The layer with the numbers that its codes stand for."""
    with torch.device("meta"):
        layer = DecoderLayer(stack, kind)
    for name in layer.state_dict():
        codes = part.codes.get(prefix + name)
        tensor = torch.from_numpy(codes.dequantized()) if codes else part.floats[prefix + name]
        assign(layer, name, tensor)
    return layer


def _facts(source: Checkpoint, plan: Plan, calibration: Calibration, parts: list[Part]) -> Facts:
    codings = {name: coding for part in parts for name, coding in part.codings.items()}
    digests = {name: codes.digest() for part in parts for name, codes in part.codes.items()}
    layers = {name: c for part in parts[:-1] for name, c in part.codes.items()}
    bits = sum(c.codes.size * c.bits + c.scale.size * 16 for c in layers.values())
    return Facts(
        plan.scheme, source.weights_id(), codings, codes_digest(digests),
        {name: strength for part in parts for name, strength in part.folds.items()},
        {
            "source": calibration.source, "tokens": calibration.tokens,
            "sha256": calibration.sha256,
        },
        round(bits / max(sum(c.codes.size for c in layers.values()), 1), 4),
    )  # fmt: skip


def _working(out: Path) -> Path:
    return out.with_name(f"{out.name}.working")


def _open_working(
    source: Checkpoint, out: Path, plan: Plan, calibration: Calibration, device: str = "cpu"
) -> Path:
    """The folder of finished layers; emptied if they are of another run."""
    facts = {
        "of": source.weights_id(), "plan": plan.facts(), "calibration": calibration.sha256,
        "device": torch.device(device).type,
    }  # fmt: skip
    return working_folder(_working(out), facts)


def _save_part(part: Part, path: Path) -> None:
    tensors = _packed(part.codes) | {f"float/{n}": t for n, t in part.floats.items()}
    notes: dict[str, Any] = {
        "codings": {name: asdict(coding) for name, coding in part.codings.items()},
        "folds": part.folds,
        "columns": {name: codes.shape[1] for name, codes in part.codes.items()},
    }
    with new_file(path) as new:
        _save(tensors, new, {"part": json.dumps(notes)})


def _load_part(path: Path) -> Part | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["part"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    codings = {name: Coding(**coding) for name, coding in notes["codings"].items()}
    codes = {
        name: unpack_codes(
            tensors[f"{name}.codes"].numpy(), tensors[f"{name}.scale"].float().numpy(),
            notes["columns"][name], coding.bits,
        )
        for name, coding in codings.items()
    }  # fmt: skip
    start = "float/"
    floats = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    return Part(floats, codes, codings, notes["folds"])


def _packed(codes: dict[str, Codes]) -> Tensors:
    tensors = {}
    for name, one in codes.items():
        tensors[f"{name}.codes"], tensors[f"{name}.scale"] = pack_codes(one)
    return tensors


def _save(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise UserError(f"{path}: cannot be written ({error})") from error
    path.chmod(0o644)  # safetensors makes its files private

"""How much answers depend on every product of a layer: Fisher information in two factors.

An error E of a matrix W (rows, columns), with products y = W x, costs KL divergence of about
tr(O E I E^T) / 2 with

    I = mean of |g|^2 x x^T (columns, columns)      O = mean of g g^T (rows, rows)

where g is the gradient at y of log p of tokens drawn from the model's own answers (K-FAC, arXiv
1503.05671; for rounding: YAQA, arXiv 2505.22988). GPTQ knows x alone: every row and token alike.

One pass forward and one backward over the calibration data, a layer at a time: one layer is in
memory, and the inputs of all, in bfloat16. Results wait on disk, for layers are rounded in the
other direction.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmmamba_edge.export.reference import final_norm, load_layer, normalised
from mmmamba_edge.export.weights import HEAD, Weights
from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.quant.folds import sites
from mmmamba_edge.quant.quantize_data import Calibration
from mmmamba_edge.status import Report, silent
from mmmamba_edge.whole import new_file

SHARE = 0.5  # of a token's weight that its gradient says; the rest is its own (quantize_data.py)


@dataclass
class Sensitivity:
    """Of one layer.

    Attributes:
        outputs: (rows, rows) mean of g g^T, by matrix, names relative to the layer.
        tokens: (tokens,) weights of mean 1 for each sequence, by site.
    """

    outputs: dict[str, Tensor]
    tokens: dict[str, list[Tensor]]


def measure_sensitivity(
    weights: Weights, hidden: list[Tensor], calibration: Calibration, folder: Path,
    report: Report = silent, seed: int = 0,
) -> None:  # fmt: skip
    """The sensitivity of every layer, the last one first, to be loaded from files in `folder`.

    Nothing is done where the first layer's is there: it is the last to be measured.

    Args:
        weights: of the float model.
        hidden: (1, tokens, hidden) of each sequence before the first layer (`embedded`); layers
            go where they are.
        calibration: what is read.
        folder: exists.
        report: told how far it is.
        seed: of the tokens that are drawn.
    """
    config, total = weights.config, len(weights.config.layer_types)
    device = hidden[0].device
    if _file(folder, 0).is_file():
        return
    half = len(config.embedding.layer_types)
    inputs, between, x = [], [], hidden
    for index, kind in enumerate(config.layer_types):
        report("reading with layer", index, total)
        if index == half and config.normalize_encoder_output:
            between, x = x, [normalised(one) for one in x]
        inputs.append([one.bfloat16().cpu() for one in x])  # of all layers: too much for a device
        layer = load_layer(weights, index, kind).to(device)
        with torch.inference_mode(), quick(device):
            x = [layer(one, None) for one in x]
    grads = _answers(weights, x, calibration, seed)
    for index in reversed(range(total)):
        report("what answers depend on: layer", total - 1 - index, total)
        layer = load_layer(weights, index, config.layer_types[index]).to(device)
        found = _backward(layer, config.layer_types[index], inputs.pop(), grads, calibration)
        _save(found, _file(folder, index))
        if between and index == half:
            grads = [
                torch.func.vjp(normalised, before.clone())[1](grad)[0]
                for before, grad in zip(between, grads, strict=True)
            ]
    report("what answers depend on: layer", total, total)


def load_sensitivity(folder: Path, index: int, like: list[Tensor]) -> Sensitivity | None:
    """A layer's, split as the tensors `like` are long, and where they are; None: not measured."""
    if not _file(folder, index).is_file():
        return None
    found, lengths = Sensitivity({}, {}), [len(one) for one in like]
    device = str(like[0].device)
    with safe_open(_file(folder, index), framework="pt", device=device) as file:
        for key in file.keys():
            what, _, name = key.partition("/")
            if what == "outputs":
                found.outputs[name] = file.get_tensor(key)
            else:
                found.tokens[name] = list(file.get_tensor(key).split(lengths))
    return found


def _save(found: Sensitivity, path: Path) -> None:
    tensors = {f"outputs/{name}": matrix for name, matrix in found.outputs.items()}
    tensors |= {f"tokens/{name}": torch.cat(parts) for name, parts in found.tokens.items()}
    with new_file(path) as new:
        save_file(tensors, new)


def _file(folder: Path, index: int) -> Path:
    return folder / f"sensitivity-{index:03}.safetensors"


def quick(device: torch.device) -> torch.autocast:
    """bfloat16 where the device multiplies it: what is measured is a mean of noisy terms."""
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = device.type == "cuda" or bool(able.get("avx512_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def _answers(
    weights: Weights, hidden: list[Tensor], calibration: Calibration, seed: int
) -> list[Tensor]:
    """Gradient of log p of drawn tokens, at the last layer's output (1, tokens, hidden) of each."""
    device = hidden[0].device
    generator = torch.Generator(device).manual_seed(seed)
    norm, head = final_norm(weights).to(device), torch.from_numpy(weights.seen(HEAD)).to(device)
    grads = []
    for x, weight in zip(hidden, calibration.weights, strict=True):
        x = x.clone().requires_grad_()
        normed = norm(x[0])
        with torch.no_grad():
            error = torch.softmax(normed @ head.T, dim=-1)
            drawn = torch.multinomial(error, 1, generator=generator)
            error.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=error.dtype))
            error *= torch.from_numpy(weight).to(device).sqrt()[:, None]
            at_norm = error @ head
        normed.backward(at_norm)
        assert x.grad is not None
        grads.append(x.grad)
    return grads


def _backward(
    layer: DecoderLayer, kind: str, inputs: list[Tensor], grads: list[Tensor],
    calibration: Calibration,
) -> Sensitivity:  # fmt: skip
    """The layer's own; `grads` at its output become those at its input, in place."""
    here, said = sites(kind), {}
    names = [name for site in here for name in site.coded]
    outputs = {}
    for name in names:
        module = layer.get_submodule(name.removesuffix(".weight"))
        rows = module.out_features
        outputs[name] = torch.zeros(rows, rows, device=grads[0].device)  # pyright: ignore

        def keep(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
            said[name] = out

        module.register_forward_hook(keep)
    tokens = {site.name: [] for site in here}
    layer.requires_grad_(False)
    for i, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        x = x.to(grad.device).float().requires_grad_()
        with quick(x.device):
            y = layer(x, None)
        grads[i], *found = torch.autograd.grad(y, [x, *(said[name] for name in names)], grad)
        own = {name: g[0].float() for name, g in zip(names, found, strict=True)}
        for name, g in own.items():
            outputs[name].addmm_(g.T, g)
        for site in here:
            tokens[site.name].append(torch.stack([own[n].square().sum(1) for n in site.coded]))
    count = sum(len(weight) for weight in calibration.weights)
    return Sensitivity(
        {name: total / count for name, total in outputs.items()},
        {name: _mixed(parts, calibration) for name, parts in tokens.items()},
    )


def _mixed(parts: list[Tensor], calibration: Calibration) -> list[Tensor]:
    """Weights of tokens (tokens,) from the |g|^2 of a site's matrices, (matrices, tokens) each."""
    sums = [part.sum(0) for part in parts]
    mean = float(torch.cat(sums).mean()) or 1.0
    plain = (torch.from_numpy(weight).to(sums[0].device) for weight in calibration.weights)
    return [SHARE * x / mean + (1 - SHARE) * w for x, w in zip(sums, plain, strict=True)]

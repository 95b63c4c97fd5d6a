"""A model with random weights, and the optimisers of its parameters."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mmmamba_edge.config import Config
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.layers import Attention
from mmmamba_edge.model.mixer import Mamba2Mixer


def from_scratch(config: Config) -> MMMamba:
    """A randomly initialised model, from torch's global seed.

    Linear weights are normal with 0.02, outputs into the residual stream scaled down by depth
    (GPT-2). Mixers start as seeding would leave them (spec 4): dt log-uniform in [0.001, 0.1],
    a = -e, the conv an identity plus a little noise.
    """
    model = MMMamba(config)
    residual = 0.02 / math.sqrt(2 * len(config.layer_types))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    nn.init.normal_(model.embedding_model.vision_embeddings.position_embedding, std=0.02)
    # Patches carry 3 p^2 inputs: keep the stem's output at unit scale.
    stem = model.embedding_model.vision_embeddings.patch_embedding.weight
    nn.init.normal_(stem, std=stem[0].numel() ** -0.5)
    for layer in model.layers:
        mix = layer.attention
        nn.init.normal_(layer.feed_forward.w2.weight, std=residual)
        if isinstance(mix, Attention):
            nn.init.normal_(mix.wo.weight, std=residual)
        elif isinstance(mix, Mamba2Mixer):
            nn.init.normal_(mix.o_proj.weight, std=residual)
            with torch.no_grad():
                mix.conv1d.weight.normal_(std=0.1)[:, :, -1] += 1.0
                nn.init.zeros_(mix.conv1d.bias)  # pyright: ignore[reportArgumentType]
                low, high = math.log(0.001), math.log(0.1)
                dt = torch.exp(torch.rand_like(mix.dt_bias) * (high - low) + low)
                mix.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1
    return model


def make_optimizers(
    model: MMMamba, lr: float, weight_decay: float, device: str, extra: Iterable[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest (embeddings, head, stem, vectors).

    Muon's updates are scaled to AdamW's size, so one learning rate serves both. Vectors, convs and
    embeddings do not decay. `extra` parameters that are not the model's go to AdamW.
    """
    inner = {id(p) for layer in model.layers for p in layer.parameters() if p.ndim == 2}
    matrices, decaying, others = [], [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in inner:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and not any(w in name for w in ("embedd", "conv1d")):
            decaying.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": [*decaying, *extra], "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device != "cpu"),
    ]

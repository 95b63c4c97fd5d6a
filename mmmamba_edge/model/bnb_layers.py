"""Layers in 8 or 4 bits as they are loaded: bitsandbytes' Linear modules in place of their own.

For a frozen teacher: the student shares them and learns around their rounding, as QLoRA does, and
finished checkpoints pair its mixers with the teacher's full-precision tensors. And for the PyTorch
runtime on a Jetson or a GPU (`--runtime torch-nf4`): no file is made, nothing is calibrated; the
codes are NF4's own and shared with no exported bundle.
"""

import torch
from torch import nn

from mmmamba_edge.model.decoder import MMMamba


def quantize_layers(model: MMMamba, bits: int) -> None:
    """Put int8 (`bits` 8) or NF4 (4) weights into every layer, in place. Head and embeddings stay.

    The weights are rounded when the model next moves to a device. Needs bitsandbytes. The new
    modules are in training mode and must stay there: in eval mode on a CPU, Linear4bit repacks its
    weights for inference and gives no gradients any more.
    """
    for layer in model.layers:
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                if name.endswith("in_proj"):  # dt: its error is carried on (quant/schemes.py)
                    continue
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, _quantized(module, bits))


def _quantized(linear: nn.Linear, bits: int) -> nn.Module:
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight = linear.weight.detach()
    shape = (linear.in_features, linear.out_features)
    with torch.device("meta"):
        if bits == 8:
            rounded = Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        else:
            rounded = Linear4bit(*shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    if bits == 8:
        rounded.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)  # pyright: ignore
    else:
        rounded.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")  # pyright: ignore
    return rounded

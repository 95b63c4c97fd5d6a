"""mmMamba checkpoints in transformers' auto classes: importing this package registers them.

    import transformers_mmmamba_edge
    model = transformers.AutoModelForCausalLM.from_pretrained("weights/mmMamba-linear")

The name begins with `transformers` because optimum tells a model's library by the name of its
module. `optimum_onnx`, which needs optimum-onnx, is imported by its command line only.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from transformers_mmmamba_edge.modeling import MMMambaForCausalLM, MMMambaHFConfig

__all__ = ["MMMambaForCausalLM", "MMMambaHFConfig"]

AutoConfig.register(MMMambaHFConfig.model_type, MMMambaHFConfig)
for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(MMMambaHFConfig, MMMambaForCausalLM)

"""What transformers and its exporters want to see: a config and a model, both thin.

The checkpoint is read by `mmmamba_edge.load_model`, in any of its layouts, from safetensors; no
code of the checkpoint's runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.traced_decoder import empty_state, read, state_names
from mmmamba_edge.model.checkpoints import load_model, save_model
from mmmamba_edge.model.decoder import MMMamba

# Top-level keys of config.json that `Config.from_hf` reads, beside the two halves.
_TOP = (
    "force_image_size",
    "downsample_ratio",
    "normalize_encoder_output",
    "template",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "use_thumbnail",
)


class MMMambaHFConfig(PretrainedConfig):
    """A config.json with `model_type` "mmMamba_chat", as transformers keeps it."""

    model_type = "mmMamba_chat"
    has_no_defaults_at_init = True

    def __init__(
        self,
        embedding_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        architectures: list[str] | str | None = None,
        **kwargs: Any,
    ):
        # The released files hold a string where transformers wants a list.
        names = [architectures] if isinstance(architectures, str) else architectures
        super().__init__(architectures=names, **kwargs)
        self.embedding_config = embedding_config
        self.llm_config = llm_config

    def edge(self) -> Config:
        """The same as mmmamba_edge has it."""
        top = {key: getattr(self, key) for key in _TOP if hasattr(self, key)}
        halves = {"embedding_config": self.embedding_config, "llm_config": self.llm_config}
        return Config.from_hf({**top, **halves}, where="config")

    # What exporters ask every text model's config for.

    @property
    def vocab_size(self) -> int:
        """Of the table and of the head."""
        return self.edge().vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.edge().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Of the whole stack, embedding layers included."""
        return len(self.edge().layer_types)

    @property
    def num_attention_heads(self) -> int:
        """Of the language half."""
        return self.edge().llm.num_attention_heads


@dataclass
class MMMambaOutput(ModelOutput):
    """What `MMMambaForCausalLM` returns."""

    logits: Tensor | None = None  # (batch, tokens, vocab_size)
    present_state: list[Tensor] | dict[str, Tensor] | None = None  # as `past_state` came


class MMMambaForCausalLM(PreTrainedModel):
    """The text decoder; pictures enter as vectors in `inputs_embeds`."""

    config_class = MMMambaHFConfig
    main_input_name = "input_ids"

    def __init__(self, config: MMMambaHFConfig, model: MMMamba | None = None):
        super().__init__(config)
        self.model = MMMamba(config.edge()) if model is None else model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "MMMambaForCausalLM":
        """Load a checkpoint folder, on the default device; `dtype` (or `torch_dtype`) is heeded."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; download the checkpoint first")
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        config: Any = kwargs.get("config") or MMMambaHFConfig.from_pretrained(folder)
        return cls(config, load_model(folder, torch.get_default_device(), dtype)).eval()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint in the training layout, into a folder that does not exist yet."""
        save_model(self.model, save_directory)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The text table."""
        return self.model.embedding_model.llm_text_embeddings

    def get_output_embeddings(self) -> torch.nn.Module:
        """The vocabulary head."""
        return self.model.language_model.output

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_state: list[Tensor] | dict[str, Tensor] | None = None,
    ) -> MMMambaOutput:
        """Read tokens, or vectors, on from a state.

        Args:
            input_ids: (batch, tokens); text only.
            inputs_embeds: (batch, tokens, hidden), in place of `input_ids`.
            past_state: by names (`traced_decoder.state_names`), or a list in their order; None:
                nothing was read yet.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give input_ids or inputs_embeds, one of them")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        config = self.model.config
        if past_state is None:
            past_state = [t.to(x.device) for t in empty_state(config, x.shape[0], x.dtype)]
        if not isinstance(past_state, dict):
            logits, state = read(self.model, x, past_state)
            return MMMambaOutput(logits=logits, present_state=state)
        names = state_names(config)
        logits, state = read(self.model, x, [past_state[name] for name in names])
        return MMMambaOutput(logits=logits, present_state=dict(zip(names, state, strict=True)))

"""What a model is: its sizes and layer types, read from `config.json` and written back.

HoVLE teachers and mmMamba students share one nested `config.json`. `Config` keeps the fields that
change the computation; everything else in the file is carried along and comes back on save.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mmmamba_edge.errors import UserError

LayerType = Literal["attention", "mamba2"]

CONV_KERNEL = 2  # taps of the mixer's depthwise conv; fixed by every released checkpoint
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling: `linear` divides positions by `factor`; `dynamic` is dynamic NTK."""

    type: Literal["linear", "dynamic"]
    factor: float

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass(frozen=True)
class StackConfig:
    """One half of the decoder: the embedding layers or the language layers."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    layer_types: tuple[LayerType, ...]
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        wrong = sorted(set(map(str, self.layer_types)) - set(get_args(LayerType)))
        if wrong:
            raise UserError(f"config: layer type {wrong[0]!r}; expected 'attention' or 'mamba2'")

    @property
    def head_dim(self) -> int:
        """Width of one head, for queries, keys and values alike."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_dim(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.num_key_value_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the mixer's conv: values, keys, queries."""
        return 2 * self.key_value_dim + self.hidden_size


@dataclass(frozen=True)
class Config:
    """A teacher, an mmMamba-linear or an mmMamba-hybrid: only `layer_types` tells them apart.

    `hf` is the config.json this came from (empty for a model made from scratch); it takes part in
    saving only, never in equality.
    """

    embedding: StackConfig
    llm: StackConfig
    vocab_size: int
    image_size: int = 448
    patch_size: int = 14
    downsample_ratio: float = 0.5
    pixel_shuffle_loc: Literal["pre", "post"] = "pre"
    img_context_token_id: int = 92546
    eos_token_id: int = 2
    normalize_encoder_output: bool = False
    template: str = "internlm2-chat"
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    use_thumbnail: bool = True
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_values(self)
        if self.embedding.hidden_size != self.llm.hidden_size:
            raise UserError(
                f"config: embedding hidden_size {self.embedding.hidden_size} and llm hidden_size "
                f"{self.llm.hidden_size} differ; the two halves share one residual stream"
            )
        for name, stack in (("embedding", self.embedding), ("llm", self.llm)):
            if stack.hidden_size % stack.num_attention_heads:
                raise UserError(
                    f"config: {name} hidden_size {stack.hidden_size} is not a multiple of "
                    f"num_attention_heads {stack.num_attention_heads}"
                )
            if stack.num_attention_heads % stack.num_key_value_heads:
                raise UserError(
                    f"config: {name} num_attention_heads {stack.num_attention_heads} is not a "
                    f"multiple of num_key_value_heads {stack.num_key_value_heads}"
                )
        if self.image_size % self.patch_size or self.grid % self.shuffle:
            raise UserError(
                f"config: image_size {self.image_size} does not divide into patches of "
                f"{self.patch_size} merged {self.shuffle} x {self.shuffle}"
            )

    # --- sizes derived from the fields -------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.llm.hidden_size

    @property
    def layer_types(self) -> tuple[LayerType, ...]:
        """Every layer's type, embedding layers first, numbered 0..N-1."""
        return self.embedding.layer_types + self.llm.layer_types

    @property
    def variant(self) -> Literal["teacher", "linear", "hybrid"]:
        """`teacher`: all attention; `linear`: all Mamba-2; `hybrid`: a mixture."""
        kinds = set(self.layer_types)
        if kinds == {"attention"}:
            return "teacher"
        return "linear" if kinds == {"mamba2"} else "hybrid"

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches merged along one side by pixel shuffle (2 for a ratio of 0.5)."""
        return round(1 / self.downsample_ratio)

    @property
    def patches_per_tile(self) -> int:
        """Image tokens a tile has before pixel shuffle (1024 at 448 px)."""
        return self.grid**2

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens a tile has after pixel shuffle (256 at 448 px)."""
        return (self.grid // self.shuffle) ** 2

    def stack_of(self, layer: int) -> StackConfig:
        """The half that layer `layer` (0..N-1 over the whole stack) belongs to."""
        return self.embedding if layer < len(self.embedding.layer_types) else self.llm

    def state_shapes(self, layer: int, tokens: int = 0) -> dict[str, tuple[int, ...]]:
        """A layer's state, without the batch axis, in the neutral layout (runtimes/base.py).

        Args:
            layer: 0..N-1 over the whole stack.
            tokens: rows of an attention layer's cache; a Mamba-2 layer's state has no such axis.
        """
        c = self.stack_of(layer)
        if self.layer_types[layer] == "attention":
            cache = (c.num_key_value_heads, tokens, c.head_dim)
            return {"key": cache, "value": cache}
        return {
            "conv": (c.conv_dim, CONV_KERNEL - 1),
            "ssm": (c.num_attention_heads, c.head_dim, c.head_dim),
        }

    def with_attention_layers(self, layers: set[int] | frozenset[int]) -> "Config":
        """The same model with attention in `layers` (global numbers) and Mamba-2 elsewhere."""
        total = len(self.layer_types)
        wrong = sorted(i for i in layers if not 0 <= i < total)
        if wrong:
            raise UserError(f"attention layers {wrong} do not exist; this model has 0..{total - 1}")
        types: tuple[LayerType, ...] = tuple(
            "attention" if i in layers else "mamba2" for i in range(total)
        )
        cut = len(self.embedding.layer_types)
        return replace(
            self,
            embedding=replace(self.embedding, layer_types=types[:cut]),
            llm=replace(self.llm, layer_types=types[cut:]),
        )

    # --- our own files: strict ----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The plain form that manifests and session files carry (`hf` left out)."""
        data = asdict(self)
        del data["hf"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str = "config") -> "Config":
        """Read `to_dict`'s form; an unknown or missing key is an error naming `where`."""
        data, halves = _strict(data, cls, where), {}
        with _naming(where):
            for name in ("embedding", "llm"):
                half = dict(_strict(data[name], StackConfig, f"{where}.{name}"))
                half["layer_types"] = tuple(half["layer_types"])
                if half.get("rope_scaling"):
                    half["rope_scaling"] = RopeScaling(
                        **_strict(half["rope_scaling"], RopeScaling, f"{where}.{name}.rope_scaling")
                    )
                halves[name] = StackConfig(**half)
            return cls(**{**data, **halves})

    # --- HF config.json -----------------------------------------------------------------------

    @classmethod
    def from_hf(cls, data: dict[str, Any], *, where: str = "config.json") -> "Config":
        """Read a HoVLE or mmMamba config.json; unknown keys warn and are kept for saving."""
        missing = [
            k for k in ("embedding_config", "llm_config") if not isinstance(data.get(k), dict)
        ]
        if missing:
            raise UserError(
                f"{where}: no {' or '.join(missing)} section; expected the config.json of a HoVLE "
                "or mmMamba checkpoint"
            )
        embedding, llm = data["embedding_config"], data["llm_config"]
        _warn_unknown(data, _KNOWN_TOP, where)
        _warn_unknown(embedding, _KNOWN_EMBEDDING, f"{where} embedding_config")
        _warn_unknown(llm, _KNOWN_LLM, f"{where} llm_config")
        _refuse_unsupported(embedding, llm, where)
        return cls(
            embedding=_stack_from_hf(embedding, f"{where} embedding_config", max_positions=4096),
            llm=_stack_from_hf(llm, f"{where} llm_config", max_positions=2048),
            vocab_size=_need(llm, "vocab_size", f"{where} llm_config"),
            image_size=data.get("force_image_size") or embedding.get("image_size", 448),
            patch_size=embedding.get("patch_size", 14),
            downsample_ratio=data.get("downsample_ratio", 0.5),
            pixel_shuffle_loc=embedding.get("pixel_shuffle_loc", "pre"),
            img_context_token_id=embedding.get("img_context_token_id", 92546),
            eos_token_id=llm.get("eos_token_id") or 2,
            normalize_encoder_output=bool(data.get("normalize_encoder_output", False)),
            template=data.get("template") or "internlm2-chat",
            min_dynamic_patch=data.get("min_dynamic_patch", 1),
            max_dynamic_patch=data.get("max_dynamic_patch", 6),
            use_thumbnail=bool(data.get("use_thumbnail", False)),
            hf=data,
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model: a teacher's for all-attention, else mmMamba's (spec 5.2).

        Keys of the file this config came from are kept; `layers_block_type` and the names that
        depend on the variant are set anew.
        """
        data = json.loads(json.dumps(self.hf))  # deep copy
        student = self.variant != "teacher"
        data.update(
            {
                "force_image_size": self.image_size,
                "downsample_ratio": self.downsample_ratio,
                "normalize_encoder_output": self.normalize_encoder_output,
                "template": self.template,
                "min_dynamic_patch": self.min_dynamic_patch,
                "max_dynamic_patch": self.max_dynamic_patch,
                "use_thumbnail": self.use_thumbnail,
                "dynamic_image_size": data.get("dynamic_image_size", True),
                **(_STUDENT_TOP if student else _TEACHER_TOP),
            }
        )
        for name, stack, default in (
            ("embedding_config", self.embedding, _EMBEDDING_DEFAULTS),
            ("llm_config", self.llm, _LLM_DEFAULTS),
        ):
            half = {**default, **data.get(name, {})}
            scaling = stack.rope_scaling
            half.update(
                {
                    "hidden_size": stack.hidden_size,
                    "intermediate_size": stack.intermediate_size,
                    "num_hidden_layers": len(stack.layer_types),
                    "num_attention_heads": stack.num_attention_heads,
                    "num_key_value_heads": stack.num_key_value_heads,
                    "rms_norm_eps": stack.rms_norm_eps,
                    "rope_theta": stack.rope_theta,
                    "max_position_embeddings": stack.max_position_embeddings,
                    "rope_scaling": scaling and {"type": scaling.type, "factor": scaling.factor},
                }
            )
            half.pop("layers_block_type", None)
            if student:
                half["layers_block_type"] = [
                    "mha" if kind == "attention" else "mamba2" for kind in stack.layer_types
                ]
            data[name] = half
        data["embedding_config"].update(
            {
                "model_type": "mmMamba_embedding" if student else "holistic_embedding",
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "downsample_ratio": self.downsample_ratio,
                "pixel_shuffle_loc": self.pixel_shuffle_loc,
                "img_context_token_id": self.img_context_token_id,
                "llm_hidden_size": self.hidden_size,
                "llm_vocab_size": self.vocab_size,
            }
        )
        data["llm_config"].update(
            {
                "vocab_size": self.vocab_size,
                "eos_token_id": self.eos_token_id,
                **(_STUDENT_LLM if student else _TEACHER_LLM),
            }
        )
        return data


def load_config(checkpoint: str | Path) -> Config:
    """Read `config.json` of a checkpoint folder.

    Raises:
        UserError: no such folder or file, not JSON, or not a HoVLE / mmMamba config.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path}: not found; a checkpoint is a folder with config.json and safetensors"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object, found {type(data).__name__}")
    with _naming(str(path)):
        return Config.from_hf(data, where=str(path))


# --- reading one half ---------------------------------------------------------------------------


def _stack_from_hf(half: dict[str, Any], where: str, *, max_positions: int) -> StackConfig:
    count = _need(half, "num_hidden_layers", where)
    heads = _need(half, "num_attention_heads", where)
    return StackConfig(
        hidden_size=_need(half, "hidden_size", where),
        intermediate_size=_need(half, "intermediate_size", where),
        num_attention_heads=heads,
        num_key_value_heads=half.get("num_key_value_heads") or heads,
        rms_norm_eps=half.get("rms_norm_eps", 1e-6),
        rope_theta=half.get("rope_theta", 10000.0),
        max_position_embeddings=half.get("max_position_embeddings", max_positions),
        layer_types=_layer_types(half.get("layers_block_type"), count, where),
        rope_scaling=_rope_scaling(half.get("rope_scaling"), where),
    )


def _layer_types(names: list[str] | None, count: int, where: str) -> tuple[LayerType, ...]:
    if names is None:
        return ("attention",) * count
    if len(names) != count:
        raise UserError(
            f"{where}: layers_block_type has {len(names)} entries for {count} layers; "
            "give one per layer"
        )
    kinds: dict[str, LayerType] = {"mha": "attention", "mamba2": "mamba2"}
    wrong = sorted(set(names) - set(kinds))
    if wrong:
        raise UserError(f"{where}: layers_block_type {wrong}; known are 'mha' and 'mamba2'")
    return tuple(kinds[name] for name in names)


def _rope_scaling(data: dict[str, Any] | None, where: str) -> RopeScaling | None:
    if not data:
        return None
    kind, factor = data.get("type") or data.get("rope_type"), data.get("factor")
    if kind not in ("linear", "dynamic") or not isinstance(factor, int | float) or factor < 1:
        raise UserError(
            f"{where}: rope_scaling {data}; expected a type 'linear' or 'dynamic' and a factor >= 1"
        )
    return RopeScaling(kind, float(factor))


def _need(data: dict[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise UserError(f"{where}: no {key!r}")
    return data[key]


def _refuse_unsupported(embedding: dict[str, Any], llm: dict[str, Any], where: str) -> None:
    """Settings that no released checkpoint uses and this code does not compute: never guess."""
    for half, name, key, allowed in (
        (embedding, "embedding_config", "use_ls", (False, None)),
        (embedding, "embedding_config", "attention_bias", (False, None)),
        (embedding, "embedding_config", "mlp_bias", (False, None)),
        (embedding, "embedding_config", "special_token_maps", ({}, None)),
        (embedding, "embedding_config", "use_pixel_shuffle_proj", (True, None)),
        (embedding, "embedding_config", "pixel_shuffle_loc", ("pre", "post", None)),
        (embedding, "embedding_config", "hidden_act", ("silu", None)),
        (llm, "llm_config", "hidden_act", ("silu", None)),
        (llm, "llm_config", "bias", (False, None)),
        (llm, "llm_config", "tie_word_embeddings", (False, None)),
    ):
        if half.get(key) not in allowed:
            raise UserError(
                f"{where} {name}: {key} = {half[key]!r} is not supported; expected {allowed[0]!r}"
            )


# --- known keys -----------------------------------------------------------------------------------


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Errors of the values themselves (`config: ...`) say which file they are from."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(where + text[6:] if text.startswith("config:") else text) from None


def _check_values(config: Any) -> None:
    """UserError for the first field that is not of its annotated kind, or out of range."""
    for item in fields(config):
        name, value, kind = item.name, getattr(config, item.name), item.type
        whole = issubclass(type(value), Integral) and type(value) is not bool
        if kind is int:
            low = 0 if name.endswith("token_id") else 1
            good, expected = whole and value >= low, f"a whole number from {low} up"
        elif kind is float:
            number = whole or isinstance(value, float)
            good, expected = number and 0 < value < math.inf, "a number above 0"
        elif kind is bool or kind is str:
            good, expected = isinstance(value, kind), f"a {kind.__name__}"
        elif get_origin(kind) is Literal:
            good, expected = value in get_args(kind), f"one of {get_args(kind)}"
        else:
            continue
        if not good:
            raise UserError(f"config: {name} is {value!r}; expected {expected}")


def _strict(data: Any, kind: type, where: str) -> dict[str, Any]:
    known = {name for name in kind.__dataclass_fields__ if name != "hf"}
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {type(data).__name__}")
    unknown = sorted(set(data) - known)
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known are {sorted(known)}")
    required = {
        name
        for name, f in kind.__dataclass_fields__.items()
        if repr(f.default).startswith("<dataclasses._MISSING") and name != "hf"
    }
    missing = sorted(required - set(data))
    if missing:
        raise UserError(f"{where}: missing key {', '.join(missing)}")
    return data


def _warn_unknown(data: dict[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        warnings.warn(
            f"{where}: unknown key {', '.join(unknown)}; ignored, and kept on save", stacklevel=4
        )


_STUDENT_TOP = {
    "architectures": "mmMambaChatModel",  # a string, not a list: so the released files have it
    "auto_map": {
        "AutoConfig": "configuration_mmMamba_chat.mmMambaChatConfig",
        "AutoModel": "modeling_mmMamba_chat.mmMambaChatModel",
        "AutoModelForCausalLM": "modeling_mmMamba_chat.mmMambaChatModel",
    },
    "model_type": "mmMamba_chat",
}
_TEACHER_TOP = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "model_type": "internvl_chat",
}
_STUDENT_LLM = {
    "architectures": "mmMambaForCausalLM",
    "auto_map": {
        "AutoConfig": "configuration_mmMamba.mmMambaConfig",
        "AutoModel": "modeling_mmMamba.mmMambaForCausalLM",
        "AutoModelForCausalLM": "modeling_mmMamba.mmMambaForCausalLM",
    },
    "model_type": "mmMamba",
}
_TEACHER_LLM = {
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "model_type": "internlm2",
}
_EMBEDDING_DEFAULTS = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "num_channels": 3,
    "special_token_maps": {},
    "use_img_start_end_tokens": True,
    "use_ls": False,
    "use_pixel_shuffle_proj": True,
}
_LLM_DEFAULTS = {
    "bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "use_cache": True,
}

# Keys that transformers 4.37 writes into every PretrainedConfig; none changes the computation.
_TRANSFORMERS_KEYS = frozenset(
    """_commit_hash _name_or_path add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16""".split()
)
_HALF_KEYS = _TRANSFORMERS_KEYS | frozenset(
    """attention_dropout attn_implementation hidden_act hidden_size initializer_range
    intermediate_size layers_block_type max_position_embeddings num_attention_heads
    num_hidden_layers num_key_value_heads pretraining_tp rms_norm_eps rope_scaling rope_theta
    use_cache vocab_size""".split()
)
_KNOWN_EMBEDDING = _HALF_KEYS | frozenset(
    """attention_bias downsample_ratio image_size img_context_token_id initializer_factor
    llm_hidden_size llm_vocab_size mlp_bias num_channels patch_size pixel_shuffle_loc
    special_token_maps use_autoregressive_loss use_img_start_end_tokens use_ls
    use_pixel_shuffle_proj""".split()
)
_KNOWN_LLM = _HALF_KEYS | frozenset(["bias"])
_KNOWN_TOP = _TRANSFORMERS_KEYS | frozenset(
    """downsample_ratio dynamic_image_size embedding_config force_image_size llm_config
    max_dynamic_patch min_dynamic_patch normalize_encoder_output pad2square ps_version select_layer
    template use_backbone_lora use_llm_lora use_thumbnail""".split()
)

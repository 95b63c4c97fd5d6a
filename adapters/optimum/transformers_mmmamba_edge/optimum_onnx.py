"""How optimum-onnx is to export mmMamba: names, free axes and dummy inputs of one graph.

    input_ids (batch, tokens) or inputs_embeds (batch, tokens, hidden), past_state.{i}...
    -> logits (batch, tokens, vocab_size), present_state.{i}...

Names are FORMAT.md's. The task says what goes in: ids for text-generation-with-past, vectors, among
which pictures may be, for image-text-to-text-with-past. (optimum has variants for such a choice,
but its text-generation path builds the config anew and loses the variant.)
"""

from collections.abc import Iterable
from typing import Any

from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyInputGenerator, DummyTextInputGenerator, NormalizedTextConfig

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.traced_decoder import state_names
from mmmamba_edge.manifest import is_cache
from transformers_mmmamba_edge.modeling import MMMambaHFConfig

TASKS = ("text-generation-with-past", "image-text-to-text-with-past")
PAST = 5  # tokens that the dummy caches hold; unlike the other sizes, so that none is mixed up


class DummyState(DummyInputGenerator):
    """Vectors and states of random numbers."""

    SUPPORTED_INPUT_NAMES = ("inputs_embeds", "past_state")

    def __init__(
        self, task: str, normalized_config: NormalizedTextConfig, batch_size: int = 2,
        sequence_length: int = 16, **kwargs: Any,
    ):  # fmt: skip
        self.config: Config = normalized_config.config.edge()
        self.batch_size, self.sequence_length = batch_size, sequence_length

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64",
        float_dtype: str = "fp32",
    ) -> Any:  # fmt: skip
        """A tensor, or for `past_state` the list of them."""

        def draw(*shape: int, dtype: str = float_dtype) -> Any:
            return self.random_float_tensor(
                list(shape), min_value=-1, max_value=1, framework=framework, dtype=dtype
            )

        if input_name == "inputs_embeds":
            return draw(self.batch_size, self.sequence_length, self.config.hidden_size)
        return [
            draw(self.batch_size, *shape, dtype="fp32" if name == "ssm" else float_dtype)
            for layer in range(len(self.config.layer_types))
            for name, shape in self.config.state_shapes(layer, PAST).items()
        ]


@TasksManager.create_register("onnx")(MMMambaHFConfig.model_type, *TASKS)
class MMMambaOnnxConfig(OnnxConfig):
    """One graph for prefill and decode, the state an input and an output of it."""

    SUPPORTS_PAST = True
    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, DummyState)
    # The goldens, whose random weights amplify rounding, stay below 1e-3 where states reach 30;
    # `mmmamba_edge.export.verify_traced` judges by signal to error instead.
    ATOL_FOR_VALIDATION = 2e-3

    def __init__(
        self, config: MMMambaHFConfig, task: str = "text-generation", use_past: bool = True,
        use_past_in_inputs: bool = True, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(config, task=task, **kwargs)
        if self.float_dtype != "fp32":
            raise UserError(
                f"--dtype {self.float_dtype}: here the decoder is exported in fp32 only; smaller "
                "ones are made by mmmamba-edge export --quant fp16, int8 or int4"
            )
        self.use_past = use_past
        self.use_past_in_inputs = use_past_in_inputs
        self.names = state_names(config.edge())

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Names and free axes."""
        tokens = "input_ids" if self.task == "text-generation" else "inputs_embeds"
        return {tokens: {0: "batch_size", 1: "sequence_length"}, **self._state("past_state")}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Names and free axes."""
        logits = {0: "batch_size", 1: "sequence_length"}
        return {"logits": logits, **self._state("present_state")}

    def _state(self, prefix: str) -> dict[str, dict[int, str]]:
        rows = "past_sequence_length"
        if prefix == "present_state":
            rows += " + sequence_length"
        return {
            f"{prefix}.{name}": {0: "batch_size", **({2: rows} if is_cache(name) else {})}
            for name in self.names
        }

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """By the names of the model's `forward`: the state is one argument."""
        generators = self._create_dummy_input_generator_classes(**kwargs)
        wanted = [next(iter(self.inputs)), "past_state"]
        return {
            name: next(g for g in generators if g.supports_input(name)).generate(
                name, framework=framework, int_dtype=self.int_dtype, float_dtype=self.float_dtype
            )
            for name in wanted
        }

    def flatten_output_collection_property(self, name: str, field: Iterable[Any]) -> dict[str, Any]:
        """A state as the tensors of the graph."""
        return {f"{name}.{own}": tensor for own, tensor in zip(self.names, field, strict=True)}

"""Students that hold nothing twice: what is frozen is the teacher's own module.

A student is its teacher with Mamba-2 mixers in place of attention. Embeddings, norms, MLPs and head
are not trained, so both models use the same modules; only the mixers are new memory.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from mmmamba_edge.config import Config
from mmmamba_edge.distill.seed import Seeding, seed_mixer
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.mixer import Mamba2Mixer
from mmmamba_edge.model.tensor_names import layer_prefix

# --- which layers stay attention ----------------------------------------------------------------

PATTERNS = ("head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked")


def attention_layers(choice: str | Iterable[int], total: int) -> set[int]:
    """Layers that stay attention, numbered over the whole stack.

    Args:
        choice: numbers, or a pattern of the paper's ablation with a count (spec 8.3):
            "head-interleaved 8" keeps the first layer of each of 8 equal blocks (the released
            hybrid), "tail-interleaved 8" the last; "head-stacked 8" and "tail-stacked 8" keep the
            first or last 8 layers. "none" keeps none.
        total: layers of the model.
    """
    if not isinstance(choice, str):
        if wrong := sorted(i for i in choice if not 0 <= i < total):
            raise UserError(f"attention layers {wrong} do not exist; this model has 0..{total - 1}")
        return set(choice)
    if choice == "none":
        return set()
    found = re.fullmatch(r"([a-z-]+) (\d+)", choice.strip())
    if not found or found[1] not in PATTERNS:
        raise UserError(
            f"attention_layers {choice!r}: expected a list of numbers, 'none', or one of "
            f"{', '.join(PATTERNS)} with a count, as in 'head-interleaved 8'"
        )
    pattern, count = found[1], int(found[2])
    if not 1 <= count <= total or ("interleaved" in pattern and total % count):
        need = f"a divisor of {total}" if "interleaved" in pattern else f"1 to {total}"
        raise UserError(f"attention_layers {choice!r}: the count must be {need}")
    block = total // count
    return {
        "head-interleaved": set(range(0, total, block)),
        "tail-interleaved": set(range(block - 1, total, block)),
        "head-stacked": set(range(count)),
        "tail-stacked": set(range(total - count, total)),
    }[pattern]


# --- mixers -------------------------------------------------------------------------------------


def seeded_mixers(
    teacher: Checkpoint, layers: Iterable[int], seeding: Seeding, device: torch.device
) -> dict[int, Mamba2Mixer]:
    """New mixers for `layers` of a teacher (spec 4), in float32 on `device`."""
    config, mixers = teacher.config, {}
    for layer in layers:
        prefix = f"{layer_prefix(config, layer)}attention."
        wqkv, wo = (teacher.get(f"{prefix}{name}.weight").float() for name in ("wqkv", "wo"))
        tensors = seed_mixer(wqkv, wo, config, layer, seeding)
        mixers[layer] = _mixer(config, layer, tensors, device)
    return mixers


def loaded_mixers(
    checkpoint: Checkpoint, layers: Iterable[int], device: torch.device
) -> dict[int, Mamba2Mixer]:
    """The mixers of a student checkpoint, in float32 on `device`."""
    config, mixers = checkpoint.config, {}
    for layer in layers:
        if config.layer_types[layer] != "mamba2":
            raise UserError(
                f"{checkpoint.folder}: layer {layer} is attention there; this stage needs a mixer"
            )
        prefix = f"{layer_prefix(config, layer)}attention."
        names = [name for name in checkpoint.names() if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): checkpoint.get(name).float() for name in names}
        mixers[layer] = _mixer(config, layer, tensors, device)
    return mixers


def _mixer(
    config: Config, layer: int, tensors: Mapping[str, Tensor], device: torch.device
) -> Mamba2Mixer:
    with torch.device("meta"):
        mixer = Mamba2Mixer(config.stack_of(layer))
    # Copies: a tensor that shares memory with the teacher's would be trained with it (spec 9.3).
    copies = {name: tensor.to(device).clone() for name, tensor in tensors.items()}
    mixer.load_state_dict(copies, assign=True)
    return mixer


def train_only(mixers: Mapping[int, Mamba2Mixer], names: Collection[str]) -> None:
    """Leave gradients on for the mixers' tensors of these names (`tensor_names.mixer_shapes`)."""
    known = {name for mixer in mixers.values() for name, _ in mixer.named_parameters()}
    if unknown := sorted(set(names) - known):
        raise UserError(
            f"train: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    for mixer in mixers.values():
        for name, parameter in mixer.named_parameters():
            parameter.requires_grad_(name in names)


def trained(mixers: Mapping[int, Mamba2Mixer]) -> dict[str, nn.Parameter]:
    """What learns, by name `{layer}.{tensor}`."""
    return {
        f"{layer}.{name}": parameter
        for layer, mixer in sorted(mixers.items())
        for name, parameter in mixer.named_parameters()
        if parameter.requires_grad
    }


def share_output_projection(
    teacher: MMMamba, mixers: Mapping[int, Mamba2Mixer], file: Checkpoint | None = None
) -> None:
    """Where it is not trained, a mixer's o_proj is the teacher's wo itself: one copy in memory.

    With the teacher's `file`, one that an earlier stage has trained is told from it, and kept.
    """
    for layer, mixer in mixers.items():
        own = mixer.o_proj.weight
        if own.requires_grad:
            continue
        if file is not None:
            theirs = file.get(f"{layer_prefix(file.config, layer)}attention.wo.weight")
            if not torch.equal(own.cpu(), theirs.to(own.dtype)):
                continue
        mixer.o_proj = teacher.layers[layer].attention.wo  # pyright: ignore


# --- the whole student --------------------------------------------------------------------------


def assemble(teacher: MMMamba, mixers: Mapping[int, Mamba2Mixer]) -> MMMamba:
    """The student that has `mixers` in those layers and the teacher's modules everywhere else."""
    keep = set(range(len(teacher.layers))) - set(mixers)
    with torch.device("meta"):
        student = MMMamba(teacher.config.with_attention_layers(keep))
    ours, theirs = student.embedding_model, teacher.embedding_model
    ours.llm_text_embeddings = theirs.llm_text_embeddings
    ours.vision_embeddings = theirs.vision_embeddings
    ours.pixel_shuffle_proj = theirs.pixel_shuffle_proj
    student.language_model.output = teacher.language_model.output
    student.language_model.model.norm = teacher.language_model.model.norm
    for i, (layer, other) in enumerate(zip(student.layers, teacher.layers, strict=True)):
        layer.attention_norm, layer.ffn_norm = other.attention_norm, other.ffn_norm
        layer.feed_forward = other.feed_forward
        layer.attention = mixers.get(i, other.attention)
    return student


def freeze(model: MMMamba) -> MMMamba:
    """No gradients, eval mode."""
    return model.requires_grad_(False).eval()


def student_tensors(
    teacher: Checkpoint, config: Config, mixers: Mapping[int, Mapping[str, Tensor]], name: str
) -> Tensor:
    """A tensor of the student checkpoint: a mixer's, or as it is in the teacher's file.

    Frozen tensors come from the file and not from memory, where they may be quantised.

    Args:
        teacher: its file.
        config: the student's.
        mixers: trained tensors of each Mamba-2 layer, by name relative to `attention.`; o_proj may
            be missing where it is the teacher's wo.
        name: training name.
    """
    for layer, tensors in mixers.items():
        prefix = f"{layer_prefix(config, layer)}attention."
        if name.startswith(prefix):
            local = name.removeprefix(prefix)
            if local == "o_proj.weight" and local not in tensors:
                return teacher.get(f"{prefix}wo.weight")
            return tensors[local]
    return teacher.get(name)

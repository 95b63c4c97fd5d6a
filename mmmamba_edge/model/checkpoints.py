"""Checkpoints on disk: opened lazily, checked strictly, written atomically, one tensor at a time.

HoVLE's layout (a teacher), the training layout and the released one open and save alike
(tensor_names.py). Whatever the file holds, tensors come out under their training names.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmmamba_edge.config import Config, load_config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.tensor_names import (
    DEAD,
    FUSED,
    RELEASED_G_NORM,
    Shape,
    fused_rows,
    layer_prefix,
    released_shapes,
    renamed,
    training_shapes,
)
from mmmamba_edge.whole import new_folder

Layout = Literal["training", "released"]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZED = "quantization.json"  # in a quantised checkpoint (quant/stored.py)
SHARD_BYTES = 4 << 30
MAPPED_BYTES = 512 << 20  # read through open files before they are closed: pages read stay mapped


class Checkpoint:
    """An open checkpoint folder. Tensors are memory-mapped and read one at a time."""

    def __init__(self, folder: Path, config: Config, layout: Layout, files: dict[str, Path]):
        self.folder = folder
        self.config = config
        self.layout = layout
        self._files = files  # name in the file -> shard
        self._open: dict[Path, safe_open] = {}
        self._mapped = 0  # bytes read since the files were opened
        self._slices = _slices(config) if layout == "released" else {}

    def names(self) -> list[str]:
        """Training names of all tensors, dead ones included."""
        return list(training_shapes(self.config))

    def get(self, name: str) -> Tensor:
        """The tensor with training name `name`, in the file's dtype."""
        if self.layout == "released" and name in self._slices:
            fused, rows = self._slices[name]
            return self._counted(self._handle(fused).get_slice(fused)[rows])
        stored = name if self.layout == "training" else renamed(name)
        return self._counted(self._handle(stored).get_tensor(stored))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of the tensor with training name `name`; nothing else of it is read."""
        if self.layout == "released" and name in self._slices:
            name, own = self._slices[name]
            rows = _within(own, rows)
        elif self.layout == "released":
            name = renamed(name)
        return self._counted(self._handle(name).get_slice(name)[rows])

    def shape(self, name: str) -> Shape:
        """The shape of the tensor with training name `name`."""
        return training_shapes(self.config)[name]

    def stored(self) -> Iterator[tuple[str, str, Shape]]:
        """(name, dtype, shape) of what the files hold, under the files' own names."""
        for name in sorted(self._files):
            view = self._handle(name).get_slice(name)
            yield name, view.get_dtype(), tuple(view.get_shape())

    def dtype(self) -> torch.dtype:
        """The dtype that holds all tensors: theirs, or of several the widest."""
        one = {self._handle(name).get_slice(name).get_dtype(): name for name in self._files}
        found = (self._handle(name).get_tensor(name).dtype for name in one.values())
        return functools.reduce(torch.promote_types, found)

    def weights_id(self) -> str:
        """SHA-256 over the live tensors' names, dtypes, shapes, bytes; the same in both layouts."""
        return weights_id((name, self.get(name)) for name in self.names())

    def _counted(self, tensor: Tensor) -> Tensor:
        """Close the files now and then: whoever reads all tensors in turn holds few of them."""
        self._mapped += tensor.nbytes
        if self._mapped > MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        return tensor

    def _handle(self, name: str) -> safe_open:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open_file(path)
        return self._open[path]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder and check that it holds exactly the tensors its config calls for.

    Raises:
        UserError: unreadable files, or a report of all missing, extra and mis-shaped tensors.
    """
    folder = Path(folder)
    if (folder / QUANTIZED).is_file():
        from mmmamba_edge.quant.stored import open_quantized  # it is a kind of checkpoint itself

        return open_quantized(folder)
    config = load_config(folder)
    files = _find_files(folder)
    layout: Layout = "released" if any(name.endswith(FUSED) for name in files) else "training"
    checkpoint = Checkpoint(folder, config, layout, files)
    expected = released_shapes(config) if layout == "released" else training_shapes(config)
    found = {name: shape for name, _, shape in checkpoint.stored()}
    report = tensor_report(expected, found)
    if report:
        raise UserError(f"{folder}: tensors do not fit config.json ({config.variant})\n{report}")
    return checkpoint


def load_model(
    checkpoint: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> MMMamba:
    """Load a model of any layout, tensor by tensor: never two copies in memory.

    Args:
        checkpoint: a folder, or one already open.
        device: where the weights go.
        dtype: of the weights; None keeps the file's (of a file with several, the widest).

    Returns:
        The model in eval mode.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    with torch.device("meta"):
        model = MMMamba(source.config)
    dtype = dtype or source.dtype()
    for name in model.state_dict():
        # clone: a memory-mapped tensor would keep the file open and fault on use
        tensor = source.get(name).to(device=device, dtype=dtype)
        assign(model, name, tensor.clone())
    return model.eval()


def assign(module: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the module's parameter `name`, whose shape a fold may have changed."""
    parent, _, leaf = name.rpartition(".")
    # Not load_state_dict: a quantised checkpoint may give each head a g_norm of its own.
    module.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(tensor)


def save_checkpoint(
    folder: str | Path,
    config: Config,
    tensors: Callable[[str], Tensor],
    *,
    layout: Layout = "training",
    dtype: torch.dtype | None = None,
    extra_files: Iterable[Path] = (),
    extra_texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint folder: shards, index, config.json, and `extra_files` copied beside them.

    It is written to a temporary folder first and renamed when whole.

    Args:
        folder: where; must not exist yet (or be empty).
        config: its config.json is `config.to_hf()`.
        tensors: gives the tensor of a training name; called once for each, in file order.
        layout: 'training' (for a teacher: HoVLE's own) or 'released' (fused).
        dtype: to store in; None keeps each tensor's.
        extra_files: tokenizer files and the like.
        extra_texts: further files, their contents by name.
        shard_bytes: largest shard; a shard is what is held in memory at a time.
    """
    folder = Path(folder)
    with new_folder(folder) as part:
        (part / "config.json").write_text(
            json.dumps(config.to_hf(), indent=2, ensure_ascii=False) + "\n"
        )
        shapes = released_shapes(config) if layout == "released" else training_shapes(config)
        get = _fusing(config, tensors) if layout == "released" else tensors
        _write_shards(part, shapes, get, dtype, shard_bytes)
        for file in extra_files:
            shutil.copyfile(file, part / file.name)
        for name, text in (extra_texts or {}).items():
            (part / name).write_text(text, encoding="utf-8")
    return folder


def save_model(
    model: MMMamba, folder: str | Path, *, layout: Layout = "training",
    dtype: torch.dtype | None = None, extra_files: Iterable[Path] = (),
) -> Path:  # fmt: skip
    """Write a model. The dead `tok_embeddings` is zeros: a model in memory does not carry it."""
    state = model.state_dict()
    dead = torch.zeros(model.config.vocab_size, model.config.hidden_size)

    def get(name: str) -> Tensor:
        return dead.to(state["language_model.output.weight"].dtype) if name == DEAD else state[name]

    return save_checkpoint(
        folder, model.config, get, layout=layout, dtype=dtype, extra_files=extra_files
    )


def weights_id(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors in order of name; the dead `tok_embeddings` is left out."""
    digests = {}
    for name, tensor in tensors:
        if name != DEAD:
            head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            digests[name] = hashlib.sha256(head)
            digests[name].update(data)
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(digests[name].digest())
    return total.hexdigest()


def tensor_report(expected: dict[str, Shape], found: dict[str, Shape]) -> str:
    """One line for each missing, extra and mis-shaped tensor; empty where all is well."""
    lines = [f"  missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"  extra: {name} {shape}" for name, shape in found.items() if name not in expected]
    lines += [
        f"  shape: {name} expected {shape} from config.json, the file has {found[name]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return "\n".join(lines)


# --- reading --------------------------------------------------------------------------------


def _find_files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {folder / file for file in names.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a safetensors index ({error})") from error
        # What the shards hold counts, whatever the index says of them.
        return {name: shard for shard in sorted(shards) for name in _open_file(shard).keys()}
    single = folder / SINGLE
    if not single.is_file():
        raise UserError(
            f"{folder}: neither {INDEX} nor {SINGLE}; expected a checkpoint's weights there"
        )
    handle = _open_file(single)
    return dict.fromkeys(handle.keys(), single)


def _open_file(path: Path) -> safe_open:
    if not path.is_file():
        raise UserError(f"{path}: missing; {INDEX} names it")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _within(outer: slice, inner: slice) -> slice:
    """Rows `inner` of the rows `outer`."""
    return slice(outer.start + inner.start, min(outer.start + inner.stop, outer.stop))


def _slices(config: Config) -> dict[str, tuple[str, slice]]:
    """Training name -> (fused tensor, rows) for every Mamba-2 layer."""
    out = {}
    for layer, kind in enumerate(config.layer_types):
        if kind == "mamba2":
            stem = f"{layer_prefix(config, layer)}attention."
            for name, rows in fused_rows(config, layer):
                out[stem + name] = (stem + FUSED, rows)
    return out


# --- writing --------------------------------------------------------------------------------


def _fusing(config: Config, tensors: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Gives released tensors from a giver of training ones."""
    parts: dict[str, list[str]] = {}
    for name, (fused, _) in _slices(config).items():
        parts.setdefault(fused, []).append(name)

    def get(name: str) -> Tensor:
        if name in parts:
            return torch.cat([tensors(part) for part in parts[name]])
        return tensors(name.replace(RELEASED_G_NORM, "g_norm.weight"))

    return get


def _write_shards(
    part: Path, shapes: dict[str, Shape], get: Callable[[str], Tensor],
    dtype: torch.dtype | None, shard_bytes: int,
) -> None:  # fmt: skip
    written: list[tuple[Path, list[str]]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal shard, size
        path = part / f"shard-{len(written)}"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes its files private
        written.append((path, list(shard)))
        shard, size = {}, 0

    for name, shape in shapes.items():
        tensor = get(name).detach().to(device="cpu", dtype=dtype).contiguous()
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(written) == 1:
        written[0][0].rename(part / SINGLE)
        return
    weight_map = {}
    for i, (path, names) in enumerate(written, start=1):
        final = f"model-{i:05d}-of-{len(written):05d}.safetensors"
        path.rename(part / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")

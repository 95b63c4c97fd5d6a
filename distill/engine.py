"""Devices and processes: accelerate starts them, DDP or FSDP2 spreads the training over them.

Stages are made of *units*: modules whose forward gives a loss and whose trained parameters belong
to no other unit. Started by `accelerate launch` or `torchrun`, every unit becomes a DDP module of
its own. With `[engine] shard` (or `accelerate launch --use_fsdp`) FSDP2 shards the mixers, and with
them gradients and optimiser state; frozen weights stay whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmmamba_edge.distill.batches import Share
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.device import require_device
from mmmamba_edge.model.mixer import Mamba2Mixer, look_up_kernels


class Engine:
    """This process among its peers.

    Args:
        device: "cpu", "cuda", or None for what accelerate finds.
        bf16: autocast to bfloat16; trained weights stay float32. What is left of float32 products
            on CUDA, states carried from chunk to chunk, becomes tf32: they are rounded to bfloat16
            next.
        shard: FSDP2 instead of DDP, where there are several processes.
    """

    def __init__(
        self, device: str | None = None, *, bf16: bool = False, shard: bool = False
    ) -> None:
        require_device(device)
        # Precision is ours (autocast below): accelerate's would be fixed for the whole process.
        self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.bf16 = bf16
        if bf16 and self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        asked = shard or self._accelerator.distributed_type == DistributedType.FSDP
        self.shards = asked and self.world > 1

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self._accelerator.is_main_process

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self._accelerator.num_processes

    def share(self, rows: int, micro_rows: int) -> Share:
        """This process's part of global batches of `rows`."""
        if rows % self.world:
            raise UserError(f"batch {rows}: not divisible by {self.world} processes")
        return Share(rows, micro_rows, self._accelerator.process_index, self.world)

    def compile(self, module: nn.Module, method: str | None = None) -> None:
        """torch.compile a module in place, or one of its methods alone."""
        import torch._dynamo

        # A table of students compiles one class for many trainable sets; beyond the limit (8) torch
        # would go on uncompiled without a word.
        torch._dynamo.config.recompile_limit = 64
        look_up_kernels()  # now: tracing through an import breaks graphs
        if method is None:
            module.compile()
        else:
            setattr(module, method, torch.compile(getattr(module, method)))

    def autocast(self) -> AbstractContextManager:
        """bfloat16 where the recipe says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wrap(self, unit: nn.Module) -> nn.Module:
        """The unit on the device, its trained parameters kept equal over all processes."""
        unit = unit.to(self.device)
        if self.shards:
            for module in [m for m in unit.modules() if isinstance(m, Mamba2Mixer)]:
                frozen = {p for p in module.parameters() if not p.requires_grad}
                fully_shard(module, ignored_params=frozen)
            return unit
        return self._accelerator.prepare_model(unit) if self.world > 1 else unit

    @contextmanager
    def accumulating(self, units: Iterable[nn.Module], last: bool) -> Iterator[None]:
        """Within it, gradients are exchanged only if this is the `last` micro-batch of a step."""
        with ExitStack() as stack:
            for unit in units:
                if isinstance(unit, DistributedDataParallel) and not last:
                    stack.enter_context(unit.no_sync())
                for module in unit.modules() if self.shards else ():
                    if isinstance(module, FSDPModule):
                        module.set_requires_gradient_sync(last)
            yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale all gradients so that their common norm is at most `limit`; returns the norm."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def total(self, value: float | Tensor) -> Tensor:
        """The sum of a number over all processes, float64."""
        number = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        return self._accelerator.reduce(number, "sum") if self.world > 1 else number  # pyright: ignore

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, at the end of the program."""
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

"""ShardedBaseStrategy: shard the frozen model with FSDP2; every process has all trained parameters."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fourier_moe import AdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.models.backbone import keep_fingerprint, kept_fingerprint
from lightning_modules.strategies.blocks import transformer_blocks

_OVERLAY = "add --config configs/strategies/fsdp.yaml for FSDP2, or configs/strategies/ddp.yaml for a copy on every device"


class ShardedBaseStrategy(ModelParallelStrategy):
    """Train data-parallel over all devices of all nodes, with the frozen model sharded by transformer block (FSDP2).

    Adapters and head are small: every process keeps them whole, and their gradients are averaged once per optimizer step, as in
    DDP. So files, checkpoints, clipping and callbacks work as with one process, and a checkpoint resumes under any number of
    processes.

    Only the first process loads the pretrained weights, into host memory. It broadcasts them block by block, so no other
    process ever has the whole model.

    Args:
        tensor_parallel_size: must be 1; projections are not split.
        process_group_backend: backend of torch.distributed; null for nccl on GPUs and gloo on the CPU.
        timeout: how long a process waits for the others, including the time in which the first one loads the weights.

    Raises:
        UserError: for another tensor_parallel_size.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if tensor_parallel_size != 1:
            raise UserError(
                f"tensor_parallel_size={tensor_parallel_size} must be 1: adapters need the whole input of their projection"
            )
        super().__init__("auto", 1, False, process_group_backend, timeout)
        self._accumulating = False

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Build on the first process with weights in host memory, on the others without (see `without_weights`).

        Raises:
            UserError: on the other processes if the first one fails; they would wait for its weights forever.
        """
        problem = None
        try:
            with torch.device("cpu" if self.is_global_zero else "meta"), self.precision_plugin.tensor_init_context():
                yield
        except Exception as error:
            problem = error
            raise
        finally:
            rank0_error = self.broadcast(str(problem) if problem else None)
            if rank0_error and not problem:
                raise UserError(f"the first process could not build the model: {rank0_error}")

    def setup(self, trainer: L.Trainer) -> None:
        assert self.lightning_module is not None
        model: nn.Module = self.lightning_module.model  # type: ignore[assignment]
        shard_frozen(model, self.device_mesh["data_parallel"], self.root_device)
        keep_fingerprint(model, self.broadcast(kept_fingerprint(model)))
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Skip averaging for batches that are accumulated; Lightning enters this for all but the last one of a step."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        if not self._accumulating:
            assert self.lightning_module is not None
            average_gradients([p for p in self.lightning_module.parameters() if p.requires_grad])

    # Trained parameters are the same plain tensors on all processes: read and written as without sharding, never gathered.
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint


def check_strategy(strategy: Strategy, adapter: AdapterConfig, quantization: str | None = None, compiles: bool = False) -> None:
    """Refuse strategies that would not train or save what they seem to, before any weights are loaded.

    Args:
        strategy: the trainer's strategy.
        adapter: the config of the adapter.
        quantization: quantization of the task's frozen weights; None if there is none.
        compiles: whether the blocks go through torch.compile.

    Raises:
        UserError: naming the strategy, the reason, and what to use instead.
    """
    name = type(strategy).__name__
    if isinstance(strategy, ShardedBaseStrategy):
        if adapter.trains_backbone:
            raise UserError(
                f"trainer.strategy={name} shards frozen weights, and {type(adapter).__name__} trains them all; use "
                "configs/strategies/ddp.yaml, or another adapter"
            )
        if quantization is not None:
            raise UserError(
                f"trainer.strategy={name} cannot shard weights with quantization={quantization!r}; use "
                "configs/strategies/ddp.yaml, or quantization null"
            )
        if compiles:
            raise UserError(
                f"trainer.strategy={name} gathers a block's weights around its forward pass, which is not tested with compile; "
                "use configs/strategies/ddp.yaml, or set compile to false"
            )
    elif isinstance(strategy, ModelParallelStrategy):
        raise UserError(f"trainer.strategy={name} splits projections over the devices of a node by default; {_OVERLAY}")
    elif isinstance(strategy, FSDPStrategy):
        raise UserError(
            f"trainer.strategy={name} (FSDP1) flattens frozen and trained weights into one, keeps gradients for both, cannot "
            f"clip them by norm in Lightning, and gathers the whole model for every checkpoint; {_OVERLAY}"
        )
    elif isinstance(strategy, DeepSpeedStrategy):
        raise UserError(f"trainer.strategy={name} writes checkpoints that this package does not read; {_OVERLAY}")


def shard_frozen(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Broadcast all weights of the first process and shard the frozen ones over `mesh`, by transformer block, then the rest.

    A second call does nothing. Other processes may have the model on the meta device; they never have more than their shards
    and the current block.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    blocks = transformer_blocks(model)
    in_blocks = {module for block in blocks for module in block.modules()}
    rest = [module for module in model.modules() if module not in in_blocks]
    for module, members in [*((block, block.modules()) for block in blocks), (model, rest)]:
        _receive(members, device)
        trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
        # By default the outermost module stays gathered after a forward. The processes would then differ once the first one
        # reads the state dict to write an adapter. This way all are sharded after every forward and backward.
        fully_shard(module, mesh=mesh, ignored_params=trained, reshard_after_forward=True)


def _receive(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Set the modules' own parameters and buffers to the first process's values, on `device`, one tensor at a time."""
    own = (chain(module.parameters(recurse=False), module.buffers(recurse=False)) for module in modules)
    tensors = list({id(tensor): tensor for tensor in chain.from_iterable(own)}.values())
    shapes = [[(tensor.shape, tensor.dtype) for tensor in tensors]]
    distributed.broadcast_object_list(shapes)
    for tensor, (shape, dtype) in zip(tensors, shapes[0], strict=True):
        assert tensor.shape == shape, "processes have built different models"
        source = torch.empty(shape, dtype=dtype, device=device) if tensor.is_meta else tensor.detach()
        received = source.to(device)
        distributed.broadcast(received, 0)
        if tensor.device != device:  # swapped in place, so that tied weights stay tied
            is_parameter = isinstance(tensor, nn.Parameter)
            filled = nn.Parameter(received, tensor.requires_grad) if is_parameter else received.detach()
            torch.utils.swap_tensors(tensor, filled)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, in one all-reduce. It stays None if no process has one."""
    counts = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), counts])
    distributed.all_reduce(flat)
    *summed, counts = flat.split([*(gradient.numel() for gradient in gradients), len(parameters)])
    size = distributed.get_world_size()
    for parameter, total, count in zip(parameters, summed, counts.tolist(), strict=True):
        if count:
            parameter.grad = (total / size).view_as(parameter)

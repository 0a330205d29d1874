"""FSDP2, tensor, context and expert parallelism as one Lightning strategy: five sizes, and checkpoints.

A checkpoint is one file of whole tensors, or a folder of shards (blocks/checkpoint/sharded.py). Both load anywhere, and
both have the layout of a single process's checkpoint: the optimizer numbers its parameters in the same way, since
recipes order them by the model alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from blockwright.blocks.checkpoint import manifest
from blockwright.blocks.checkpoint.read import read_file
from blockwright.blocks.checkpoint.sharded import META, MODEL, failures, join, outline, read_meta, read_tensors, split
from blockwright.registry import ConfigError
from blockwright.registry.ranges import Count, Positive
from blockwright.training.checkpoints.atomic import check_together, on_first
from blockwright.training.metrics import Sums
from blockwright.training.parallel.build import LOW, Sharding
from blockwright.training.parallel.local import own_part, plain, whole
from blockwright.training.parallel.meshes import Meshes, make_meshes
from blockwright.training.parallel.sizes import Sizes, exchange_of, sizes_of

PART = ".part"  # suffix of a folder until it is complete


def gather(checkpoint: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """The checkpoint with whole tensors on the CPU, gathered one by one; called on all ranks, None without ``keep``."""

    def walk(value: Any) -> Any:
        if isinstance(value, DTensor):
            full = whole(value.detach())
            return full.cpu() if keep else None
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list) else value

    parts: dict[str, Any] = {
        key: walk(checkpoint[key]) for key in ("state_dict", "optimizer_states") if key in checkpoint
    }
    return {**checkpoint, **parts}


def save_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a folder with every rank's shards; what was at ``path`` is removed when the new one is complete.

    Raises:
        OSError: a rank cannot write its part; raised on all ranks
    """
    import torch.distributed.checkpoint as dcp

    tensors = {f"{MODEL}{name}": tensor.detach() for name, tensor in checkpoint["state_dict"].items()}
    states = []
    for i, state in enumerate(checkpoint.get("optimizer_states", [])):
        rest, own = split(i, state)
        states.append(rest)
        tensors |= own
    part = path.with_name(path.name + PART)

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def end() -> None:
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        with (part / META).open("wb") as file:  # torch's own would not say that the disk is full
            torch.save({**rest, "optimizer_states": states}, file)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        part.rename(path)

    on_first(begin)
    with failures():
        from torch.distributed.checkpoint import DefaultSavePlanner

        whole = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(tensors, checkpoint_id=str(part), planner=whole)
    on_first(end)


def load_folder(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Load a module and its optimizers from a folder, each rank its shards.

    Returns:
        everything else in the checkpoint, for Lightning

    Raises:
        ConfigError: it is damaged; raised on all ranks, each of which checks a share
    """
    try:
        check_together(path)
    except manifest.Damaged as error:
        rule = f"cannot be loaded safely ({error.reason})"
        raise ConfigError("ckpt_path", str(path), rule, "Use the one before it (last.previous.ckpt)") from None
    meta = read_meta(path)
    wanted = {f"{MODEL}{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    found = outline(path) if optimizers else {}
    for i, optimizer in enumerate(optimizers):
        wanted |= _blank(i, optimizer, found)
    read_tensors(path, wanted, alone=False)
    _fill_sums(module, {name.removeprefix(MODEL): t for name, t in wanted.items() if name.startswith(MODEL)})
    for i, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(join(i, meta["optimizer_states"][i], wanted))
    return {k: v for k, v in meta.items() if k != "optimizer_states"}


def load_file(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """``load_folder`` for one file, of which each rank reads what it needs."""
    checkpoint = read_file(path, mapped=True)
    with torch.no_grad():
        state = module.state_dict()
        for name, tensor in state.items():
            whole = checkpoint["state_dict"][name]
            part = own_part(whole, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else whole
            plain(tensor).copy_(plain(part))
        _fill_sums(module, state)
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        parameters = _parameters(optimizer)
        own = {i: _like(values, parameters[i]) for i, values in state["state"].items()}
        optimizer.load_state_dict({**state, "state": own})
    return {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}


def _blank(which: int, optimizer: Optimizer, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Empty tensors for an optimizer's state in a folder, distributed like its parameters."""
    blank: dict[str, Tensor] = {}
    prefix, parameters = f"optimizer.{which}.", _parameters(optimizer)
    for key, like in found.items():
        if key.startswith(prefix):
            parameter = parameters[int(key.removeprefix(prefix).partition(".")[0])]
            alike = like.shape == parameter.shape
            blank[key] = (
                torch.zeros_like(parameter, dtype=like.dtype) if alike else torch.zeros_like(like, device="cpu")
            )
            blank[key] = blank[key].detach()
    return blank


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's optimizer state, with tensors distributed like the parameter."""
    return {
        name: own_part(value, parameter.device_mesh, parameter.placements)
        if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape
        else value
        for name, value in values.items()
    }


def _fill_sums(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the metrics' sums: the tensors in their ``state_dict`` are copies."""
    for path, metric in module.named_modules():
        if isinstance(metric, Sums):
            metric.load_state_dict({name: state[f"{path}.{name}"] for name in metric.state_dict()})


FEW = 8  # up to so many ranks that share weights a checkpoint is one file by default
LARGE = 64 * 10**9  # bytes of such a file: weights and Adam's two averages of 5.3 billion parameters


class Parallel(ModelParallelStrategy):
    """Lightning's model-parallel strategy with this project's meshes and checkpoints.

    Sizes multiply to the world size (devices × num_nodes). The task builds its decoder with ``sharding``, see
    training/parallel/build.py. Weights are gathered in bfloat16 under ``precision: bf16-mixed``, except gates, and
    gradients are summed in fp32. All checkpoints can be read by any other strategy, in any number of processes.

    Args:
        replicate: copies of the sharded model; they exchange gradients once per step, weights never
        shard: ranks that share weights, gradients and optimizer state, and read different windows; auto for all
            remaining
        tensor: adjacent ranks that split heads and hidden widths; keep them inside a machine
        expert: how many of the shard × context ranks share the experts; tokens are sent to them
        context: ranks that split the tokens of the same windows, and share weights like ``shard``
        exchange: how tokens are sent to their experts: all_to_all, torch's; or deep_ep (training/parallel/exchange)
        cpu_offload: keep shards and optimizer state in host memory, and step there
        sharded_checkpoints: write a folder with every rank's shards; else one file, written by rank 0, which needs
            memory for all of it. null is a folder if more than 8 ranks share the weights
        process_group_backend: null is nccl on GPUs, gloo on CPUs
        timeout: seconds after which a waiting rank gives up; null is torch's half an hour
    """

    def __init__(
        self,
        replicate: Count = 1,
        shard: Count | Literal["auto"] = "auto",
        tensor: Count = 1,
        expert: Count = 1,
        context: Count = 1,
        exchange: str = "all_to_all",
        cpu_offload: bool = False,
        sharded_checkpoints: bool | None = None,
        process_group_backend: str | None = None,
        timeout: Positive | None = None,
    ) -> None:
        patience = default_pg_timeout if timeout is None else timedelta(seconds=timeout)
        super().__init__(1, 1, bool(sharded_checkpoints), process_group_backend, patience)
        self._folder = sharded_checkpoints
        self._given: dict[str, Any] = {"replicate": replicate, "shard": shard, "tensor": tensor, "expert": expert}
        self._given["context"] = context
        self.cpu_offload = cpu_offload
        self.exchange = exchange_of(exchange)
        self.meshes: Meshes | None = None

    def setup_environment(self) -> None:
        self._setup_distributed()
        if self.meshes is None:
            self.meshes = make_meshes(sizes_of(self._given, self.world_size), self.root_device.type)
        self._device_mesh = self.meshes.dense
        self._save_distributed_checkpoint = writes_folder(self._folder, self.meshes.sizes)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.checkpoint_callbacks and not self._save_distributed_checkpoint:
            refuse_large_file(trainer.lightning_module)
        super().setup(trainer)

    @property
    def sharding(self) -> Sharding:
        """The settings for building the task's decoder."""
        assert self.meshes is not None, "the processes are not up"
        return Sharding(self.meshes, LOW.get(self.precision_plugin.precision), self.cpu_offload, self.exchange)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        assert self.meshes is not None, "the processes are not up"
        sizes = self.meshes.sizes
        return {"num_replicas": sizes.data, "rank": self.global_rank // (sizes.context * sizes.tensor)}

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():  # buffers only: FSDP2 moves weights on demand
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.root_device)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return (
            optimizer._optimizer.state_dict() if isinstance(optimizer, LightningOptimizer) else optimizer.state_dict()
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            save_folder(checkpoint, path)
        else:
            Strategy.save_checkpoint(self, gather(checkpoint, keep=self.is_global_zero), path, storage_options)
            self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        load = load_folder if path.is_dir() else load_file
        try:
            return load(path, self.lightning_module, self.optimizers)
        except KeyError as error:
            rule = f"does not hold what this run needs ({error})"
            raise ConfigError("ckpt_path", str(path), rule, "Resume with the same model and optimizer") from None


def writes_folder(asked: bool | None, sizes: Sizes) -> bool:
    """Whether checkpoints are folders."""
    return sizes.sharing > FEW if asked is None else asked


def refuse_large_file(module: nn.Module) -> None:
    """Refuse to gather, tensor by tensor on each GPU and all in rank 0's memory, a model too large for that.

    Raises:
        ConfigError
    """
    size = 3 * sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LARGE:
        rule = f"one file would hold {size / 1e9:,.0f} GB of weights and optimizer states in rank 0's memory"
        remedy = "Write trainer.strategy.sharded_checkpoints=true"
        raise ConfigError("trainer.strategy.sharded_checkpoints", False, rule, remedy)

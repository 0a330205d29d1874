"""Checkpoints of a run on many ranks: one file of whole tensors, or a folder of shards. Both load anywhere.

Both have the layout of a single process's checkpoint: the optimizer numbers its parameters in the same way, since
recipes order them by the model alone. See blocks/checkpoint/sharded.py for the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from blockwright.blocks.checkpoint import manifest
from blockwright.blocks.checkpoint.read import read_file
from blockwright.blocks.checkpoint.sharded import META, MODEL, failures, join, outline, read_meta, read_tensors, split
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.atomic import check_together, on_first
from blockwright.training.metrics import Sums
from blockwright.training.parallel.local import own_part, plain, whole

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
        dcp.save(tensors, checkpoint_id=str(part), planner=_planner())
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
            _fill(tensor, checkpoint["state_dict"][name])
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


def _fill(tensor: Tensor, whole: Tensor) -> None:
    part = own_part(whole, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else whole
    plain(tensor).copy_(plain(part))


def _planner() -> Any:
    from torch.distributed.checkpoint import DefaultSavePlanner

    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

"""Refuse parallel runs that cannot work, before a process starts: needs neither Lightning nor a GPU.

First what every strategy needs, then what is not right, or of no use, where ranks share windows (context parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from blockwright import registry
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.sample import alike
from blockwright.registry import BlockError, ConfigError, Node
from blockwright.registry.errors import require
from blockwright.registry.layout import plan
from blockwright.training.configuration import parts
from blockwright.training.configuration.run import Run
from blockwright.training.parallel import recompute
from blockwright.training.parallel.remembered import appended
from blockwright.training.parallel.sizes import STRATEGY, Sizes, check_exchange, sizes_of

WHOLE = ("n_heads", "n_kv_heads", "d_ff")  # parameters that tensor parallelism divides
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true", 32, "32", "bf16")
CONTEXT = "trainer.strategy.context"
WITHOUT = f"Write {CONTEXT}=1"
FSDP1 = ("fsdp", "fsdp_cpu_offload")  # Lightning's names of torch's older FSDP


class Chosen(NamedTuple):
    """One block of the model with its parameters; ``path`` is that of its node."""

    path: str
    kind: str
    name: str
    given: dict[str, Any]


def check(run: Run) -> None:
    """Refuse a strategy that does not fit the machine, the model or the data.

    Raises:
        ConfigError
    """
    trainer = run.trainer
    recompute.check(run.task.get("activation_checkpointing", "none"))
    check_world(trainer)
    check_machine(trainer)
    strategy, world = trainer.get("strategy"), world_of(trainer)
    if not isinstance(strategy, Mapping):
        if world and (strategy in (None, "auto") or str(strategy).startswith("ddp")):  # auto is ddp for several
            _check_batches(run.data, world)
        return
    if strategy.get("_target_") != STRATEGY:
        return
    if trainer.get("precision", "32-true") not in PRECISIONS:
        rule = "needs gradient scaling, which FSDP2 does not support"
        raise ConfigError("trainer.precision", trainer["precision"], rule, "Write trainer.precision=bf16-mixed")
    check_exchange(strategy.get("exchange", "all_to_all"))
    if strategy.get("cpu_offload") and trainer.get("accelerator") == "cpu":
        rule = "moves shards from a GPU's memory to the host's, but there is no GPU"
        raise ConfigError("trainer.strategy.cpu_offload", True, rule, "Leave it out on CPUs")
    if world is None:
        return
    sizes = sizes_of(strategy, world)
    chosen = blocks_of(run.model)
    check_sizes(chosen, sizes)
    check_groups(chosen, sizes)
    _check_batches(run.data, sizes.data)
    check_context(run, [block[:3] for block in chosen], sizes)


def check_sizes(chosen: Sequence[Chosen], sizes: Sizes) -> None:
    """Refuse sizes that do not divide the heads, widths or experts of a complete composition.

    Args:
        chosen: the ``blocks_of`` a model

    Raises:
        ConfigError
    """
    _check_tensor(chosen, sizes)
    _check_expert(chosen, sizes)


def check_groups(chosen: Sequence[Chosen], sizes: Sizes) -> None:
    """Refuse a composition whose numbers of devices differ from the ranks that hold its experts.

    Args:
        chosen: the ``blocks_of`` the model

    Raises:
        ConfigError
    """
    if sizes.expert > 1:
        _check_groups(chosen, sizes.expert)


def no_shards(path: str, value: Any) -> ConfigError:
    """The error for a part of a run that needs all weights on each process, where ranks share them."""
    rule = "needs all weights on each process, and this strategy shards them"
    return ConfigError(path, value, rule, "Leave it out, or write trainer=ddp")


def check_world(trainer: Mapping[str, Any]) -> None:
    """Check trainer.world: only with trainer.dry_run and a sharding strategy.

    Raises:
        ConfigError
    """
    world = trainer.get("world")
    if world is None:
        return
    if not trainer.get("dry_run"):
        rule = "imagines ranks for a dry run, and a training has the ranks that are started"
        raise ConfigError("trainer.world", world, rule, "Add trainer.dry_run=true, or set devices and num_nodes")
    strategy = trainer.get("strategy")
    if not isinstance(strategy, Mapping) or strategy.get("_target_") != STRATEGY:
        rule = "imagines ranks that share a model, and here each has all of it"
        raise ConfigError("trainer.world", world, rule, "Choose trainer=fsdp, fsdp_cp, fsdp_ep, fsdp_tp, tp_ep or hsdp")


def check_machine(trainer: Mapping[str, Any]) -> None:
    """Refuse missing devices, and strategies without what they need.

    Raises:
        ConfigError
    """
    strategy = trainer.get("strategy")
    name, gpus = str(strategy), _gpus()
    if "_target_" not in trainer:
        rule = "is a part of a trainer, to be combined with another"
        raise ConfigError("trainer", "sim", rule, "Write e.g. 'trainer=[fsdp,sim]'")
    if name in FSDP1:
        rule = "is torch's older FSDP, which cannot split heads or experts and needs a GPU"
        raise ConfigError(
            "trainer.strategy", name, rule, "Write trainer=fsdp, which is FSDP2, on CPUs 'trainer=[fsdp,sim]'"
        )
    if name.startswith("deepspeed"):
        require("deepspeed", "deepspeed", path="trainer.strategy", value=name, otherwise="or write trainer=fsdp")
        if not gpus:
            raise ConfigError(
                "trainer.strategy", name, "needs a GPU, but torch sees none", "Write 'trainer=[fsdp,sim]'"
            )
    devices = trainer.get("devices", "auto")
    if trainer.get("world"):  # no device is touched
        return
    if trainer.get("accelerator") in ("gpu", "cuda"):
        if not gpus:
            rule = "torch sees no GPU on this machine"
            alone = "trainer=default, or for several CPU processes 'trainer=[fsdp,sim]'"
            raise ConfigError("trainer.accelerator", trainer["accelerator"], rule, f"Write {alone}")
        if isinstance(devices, int) and devices > gpus:
            rule = f"is more than the {gpus} GPUs that torch sees here"
            raise ConfigError("trainer.devices", devices, rule, f"Write trainer.devices={gpus} or auto")


def world_of(trainer: Mapping[str, Any]) -> int | None:
    """devices × num_nodes, or the simulated world; None if only Lightning can determine it."""
    if trainer.get("world"):
        return trainer["world"]
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", -1, "-1"):
        devices = 1 if trainer.get("accelerator") == "cpu" else _gpus()
    if isinstance(devices, bool) or not isinstance(devices, int) or not isinstance(nodes, int):
        return None
    return devices * nodes if devices > 0 < nodes else None


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def blocks_of(model: Mapping[str, Any]) -> list[Chosen]:
    """Every block used by some layer of a complete composition, children included, each once."""
    return list(_blocks(model))


def _blocks(model: Mapping[str, Any]) -> Iterator[Chosen]:
    """Every block used by some layer, children included, each once."""
    seen: list[tuple[str, Any]] = []
    for index, nodes in enumerate(plan(model, registry.layer_kinds(), registry.names)):
        scope = {kind: Node(node, f"model.{kind}") for kind, node in nodes.items()}
        for kind in ("attention", "ffn"):
            if kind in nodes:
                own = Node(nodes[kind], _path(model, kind, nodes[kind], index))
                for at, entry, given in registry.walk(kind, own, scope):
                    chosen = Chosen(at.path, entry.kind, entry.name, given)
                    if (chosen.path, chosen.given) not in seen:
                        seen.append((chosen.path, chosen.given))
                        yield chosen


def _path(model: Mapping[str, Any], kind: str, node: Mapping[str, Any], index: int) -> str:
    own = model.get(kind)
    if node == own or node == {"name": own}:
        return f"model.{kind}"
    variants = (model.get("variants") or {}).get(kind) or {}
    return next(
        (f"model.variants.{kind}.{n}" for n, v in variants.items() if v == node), f"model.{kind} (layer {index})"
    )


def _check_tensor(chosen: Sequence[Chosen], sizes: Sizes) -> None:
    """Heads and widths must be divisible. Experts are not split inside; mqa's one KV head stays whole."""
    for block in chosen:
        for key in WHOLE:
            value = block.given.get(key)
            routed = block.kind == "experts"
            if isinstance(value, int) and not routed and value % sizes.tensor:
                rule = f"must be divisible by the ranks that split it (trainer.strategy.tensor = {sizes.tensor})"
                divisors = ", ".join(str(n) for n in range(1, value + 1) if value % n == 0 and n <= 64)
                remedy = f"Change it, or let tensor be one of {divisors}"
                raise ConfigError(f"{block.path}.{key}", value, rule, remedy)


def _check_expert(chosen: Sequence[Chosen], sizes: Sizes) -> None:
    ranks = sizes.expert * sizes.tensor
    moes = [block for block in chosen if isinstance(block.given.get("n_experts"), int)]
    if sizes.expert > 1 and not moes:
        rule = "distributes experts, but no layer of this model has any"
        raise ConfigError("trainer.strategy.expert", sizes.expert, rule, "Write trainer=fsdp, or choose model/ffn=moe")
    for block in moes:
        value = block.given["n_experts"]
        if value % ranks:
            rule = f"must be divisible by the ranks that share them (trainer.strategy: expert × tensor = {ranks})"
            divisors = ", ".join(str(n) for n in range(1, value + 1) if value % n == 0 and n <= 512)
            raise ConfigError(f"{block.path}.n_experts", value, rule, f"Let expert × tensor be one of {divisors}")


def _check_groups(chosen: Sequence[Chosen], ranks: int) -> None:
    """Numbers of devices must match the ranks: groups of a gate, devices of a loss or a budget."""
    for block in chosen:
        groups, devices = block.given.get("n_groups"), block.given.get("n_devices")
        if block.kind == "gating" and isinstance(groups, int) and groups > 1 and groups % ranks:
            rule = f"a group must be on one rank (trainer.strategy.expert = {ranks}), else the limit has no effect"
            raise ConfigError(f"{block.path}.n_groups", groups, rule, f"Use a multiple of {ranks}, best {ranks}")
        counts = block.kind == "dropping" or block.name == "communication"
        if counts and isinstance(devices, int) and devices != ranks:
            rule = f"counts the ranks that hold experts, which are {ranks} here (trainer.strategy.expert)"
            raise ConfigError(f"{block.path}.n_devices", devices, rule, f"Write {block.path}.n_devices={ranks}")


def _check_batches(data: Mapping[str, Any], ranks: int) -> None:
    for key in ("batch_size", "eval_batch_size"):
        value = data.get(key)
        if isinstance(value, int) and value % ranks:
            rule = f"counts windows over all processes, and {ranks} of them share the data evenly"
            raise ConfigError(f"data.{key}", value, rule, f"Set data.{key}={-(-value // ranks) * ranks}")


def check_context(run: Run, blocks: Sequence[tuple[str, str, str]], sizes: Sizes) -> None:
    """Refuse windows that do not divide, and blocks and tasks that need all tokens of a window.

    Args:
        run: as parsed
        blocks: path, kind and name of each block of the model

    Raises:
        ConfigError
    """
    if sizes.context == 1:
        return
    _check_task(run)
    if run.trainer.get("compile") is True:
        rule = f"compiles whole layers, whose attention exchanges keys under {CONTEXT} = {sizes.context}"
        raise ConfigError("trainer.compile", True, rule, f"Write trainer.compile=false, or {CONTEXT}=1")
    _check_windows(run.data, run.model, sizes.context)
    for block in blocks:
        check_block(*block)
    decoder = compose(run.model, device="meta")
    check_attentions(decoder)
    check_memories(decoder, run.data["sequence_length"] // (2 * sizes.context))


def _check_task(run: Run) -> None:
    if not parts.class_of("task", run).splits:
        rule = f"ranks share windows under {CONTEXT}, and this task scores whole ones (no splits = True in its class)"
        remedy = f"Score share(batch) alone and say so, or {_small(WITHOUT)}"
        raise ConfigError("task", run.task["name"], rule, remedy)


def _check_windows(data: Mapping[str, Any], model: Mapping[str, Any], ranks: int) -> None:
    length = data.get("sequence_length")
    if not isinstance(length, int):
        rule = f"windows must be of one length, which 2 × {CONTEXT} = {2 * ranks} divides"
        raise ConfigError("data.sequence_length", length, rule, "Give the data module that argument")
    if length % (2 * ranks):
        rule = (
            f"each of the {ranks} ranks that share a window has two of {2 * ranks} equal chunks ({CONTEXT} = {ranks})"
        )
        near = max(1, round(length / (2 * ranks))) * 2 * ranks
        raise ConfigError("data.sequence_length", length, rule, f"Set data.sequence_length={near}")
    depth = (model.get("mtp") or {"depth": 0})["depth"]
    if depth >= length // (2 * ranks):
        rule = f"must be less than the {length // (2 * ranks)} tokens of a chunk (sequence_length / 2 / {CONTEXT})"
        raise ConfigError("model.mtp.depth", depth, rule, "Predict fewer tokens, lengthen windows, or share them less")


def check_block(path: str, kind: str, name: str) -> None:
    """Refuse a block that needs all tokens of a window.

    Raises:
        ConfigError
    """
    cls: Any = registry.lookup(kind, name).cls
    if not cls.causal:
        rule = f"chooses among all tokens of a batch, and a rank has a part of each window ({CONTEXT})"
        raise ConfigError(path, name, rule, f"Use another, such as softmax_topk for gating, or {_small(WITHOUT)}")
    if kind == "balance" and not cls.splits:
        rule = f"does not say that its loss can be computed from parts of a window ({CONTEXT})"
        raise ConfigError(
            path,
            name,
            rule,
            f"Make it of over_sequences, over_batch and mean, and say splits = True, or {_small(WITHOUT)}",
        )


def check_attentions(decoder: Decoder) -> None:
    """Refuse attentions that cannot be spread by their caches, as recurrences.

    Args:
        decoder: on the meta device

    Raises:
        ConfigError
    """
    for first, *_ in alike(decoder.layers):
        attention: Any = decoder.layers[first].attention
        fault = _unfit(attention, decoder.config["d_model"])
        if fault:
            rule = f"{fault}, and {CONTEXT} gathers keys by the cache (blocks/cache)"
            raise ConfigError(f"model.attention (layer {first})", type(attention).__name__, rule, WITHOUT)


def check_memories(decoder: Decoder, chunk: int) -> None:
    """Refuse memories that need more tokens before a chunk than the chunk before has.

    Args:
        decoder: on the meta device
        chunk: tokens of a chunk

    Raises:
        ConfigError
    """
    for index, layer in enumerate(decoder.layers):
        memory: Any = layer.memory
        if memory is None or (memory.reach is not None and memory.reach <= chunk):
            continue
        reach = "all" if memory.reach is None else memory.reach
        rule = f"depends on {reach} tokens before each, and the chunks that ranks compute ({CONTEXT}) are of {chunk}"
        remedy = f"Lengthen the windows (data.sequence_length), or {_small(WITHOUT)}"
        raise ConfigError(f"model.memory (layer {index})", type(memory).__name__, rule, remedy)


def _unfit(attention: Attention, d_model: int) -> str:
    """Why an attention cannot be spread by its cache, or nothing."""
    try:
        cache = attention.new_cache(1, 8, torch.float32, torch.device("meta"))
    except NotImplementedError:
        return "keeps no cache"
    if not isinstance(cache, Cache):
        return f"keeps a {type(cache).__name__} in place of a blockwright.blocks.cache.base.Cache"
    if isinstance(cache, State):
        return "passes a state from token to token"
    try:
        times = appended(attention, d_model).times
    except BlockError as error:
        return f"cannot use another cache than its own ({error.rule})"
    except Exception as error:  # of a plug-in's code
        return f"does not run with another cache of the contract ({type(error).__name__}: {error})"
    return "" if times == 1 else f"appends to its cache {times} times in a pass instead of once"


def _small(remedy: str) -> str:
    return remedy[0].lower() + remedy[1:]

"""Refuse what is not right, or of no use, where ranks share windows (context parallelism), before a process starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from blockwright import registry
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.state import State
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.sample import alike
from blockwright.registry import BlockError, ConfigError
from blockwright.training.configuration import parts
from blockwright.training.configuration.run import Run
from blockwright.training.parallel.remembered import appended
from blockwright.training.parallel.sizes import Sizes

PATH = "trainer.strategy.context"
WITHOUT = f"Write {PATH}=1"


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
        rule = f"compiles whole layers, whose attention exchanges keys under {PATH} = {sizes.context}"
        raise ConfigError("trainer.compile", True, rule, f"Write trainer.compile=false, or {PATH}=1")
    _check_windows(run.data, run.model, sizes.context)
    for block in blocks:
        check_block(*block)
    decoder = compose(run.model, device="meta")
    check_attentions(decoder)
    check_memories(decoder, run.data["sequence_length"] // (2 * sizes.context))


def _check_task(run: Run) -> None:
    if not parts.class_of("task", run).splits:
        rule = (
            f"ranks share windows under {PATH}, and this task scores whole ones (its class does not say splits = True)"
        )
        remedy = f"Score share(batch) alone and say so, or {_small(WITHOUT)}"
        raise ConfigError("task", run.task["name"], rule, remedy)


def _check_windows(data: Mapping[str, Any], model: Mapping[str, Any], ranks: int) -> None:
    length = data.get("sequence_length")
    if not isinstance(length, int):
        rule = f"windows must be of one length, which 2 × {PATH} = {2 * ranks} divides"
        raise ConfigError("data.sequence_length", length, rule, "Give the data module that argument")
    if length % (2 * ranks):
        rule = f"each of the {ranks} ranks that share a window has two of {2 * ranks} equal chunks ({PATH} = {ranks})"
        near = max(1, round(length / (2 * ranks))) * 2 * ranks
        raise ConfigError("data.sequence_length", length, rule, f"Set data.sequence_length={near}")
    depth = (model.get("mtp") or {"depth": 0})["depth"]
    if depth >= length // (2 * ranks):
        rule = f"must be less than the {length // (2 * ranks)} tokens of a chunk (sequence_length / 2 / {PATH})"
        raise ConfigError("model.mtp.depth", depth, rule, "Predict fewer tokens, lengthen windows, or share them less")


def check_block(path: str, kind: str, name: str) -> None:
    """Refuse a block that needs all tokens of a window.

    Raises:
        ConfigError
    """
    cls: Any = registry.lookup(kind, name).cls
    if not cls.causal:
        rule = f"chooses among all tokens of a batch, and a rank has a part of each window ({PATH})"
        raise ConfigError(path, name, rule, f"Use another, such as softmax_topk for gating, or {_small(WITHOUT)}")
    if kind == "balance" and not cls.splits:
        rule = f"does not say that its loss can be computed from parts of a window ({PATH})"
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
            rule = f"{fault}, and {PATH} gathers keys by the cache (blocks/cache)"
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
        rule = f"depends on {reach} tokens before each, and the chunks that ranks compute ({PATH}) are of {chunk}"
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

"""Read a checkpoint file or folder without running any code in it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockwright import registry
from blockwright.blocks.checkpoint import manifest, sharded
from blockwright.blocks.compose import reread
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.linear import is_adapter, merged
from blockwright.registry import ConfigError, catalogue
from blockwright.registry.index import PROJECT

PREFIX = "decoder."


def read_checkpoint(path: str | Path, *, shapes_only: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint, a file or a sharded folder, loaded under ``weights_only=True``.

    Args:
        path: of the file or folder
        shapes_only: leave tensors of a folder unread on the meta device, and its optimizers out; tensors of a file are
            memory-mapped

    Raises:
        ConfigError: there is no such file, it cannot be read, it contains more than plain types and tensors, or its
            blocks are not installed
    """
    folder = sharded.is_folder(Path(path))
    checkpoint = _read_folder(Path(path), shapes_only) if folder else read_file(path, mapped=True)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    settings, weights = found.get("hyper_parameters"), found.get("state_dict")
    if not isinstance(settings, dict) or "model" not in settings:
        raise ConfigError("ckpt_path", str(path), "holds no model composition", "Use a checkpoint of a training")
    if not isinstance(weights, dict) or not all(_is_entry(k, w) for k, w in weights.items()):
        raise ConfigError("ckpt_path", str(path), "holds no weights by name", "Use a checkpoint of a training")
    check_packages(found.get("distributions"), str(path))
    return checkpoint


def _read_folder(folder: Path, shapes_only: bool) -> dict[str, Any]:
    try:
        manifest.check(folder)
    except manifest.Damaged as error:
        rule = f"cannot be loaded safely ({error.reason})"
        raise ConfigError("ckpt_path", str(folder), rule, "Use the one before it (last.previous.ckpt)") from None
    if not shapes_only:
        return sharded.read_folder(folder)
    try:
        weights = sharded.outline(folder).items()
        model = {k.removeprefix(sharded.MODEL): v for k, v in weights if k.startswith(sharded.MODEL)}
        return {**sharded.read_meta(folder), "state_dict": model}
    except ConfigError:
        raise
    except Exception as error:
        rule = f"cannot be loaded safely ({_reason(error, 'it is no sharded checkpoint of torch')})"
        raise ConfigError("ckpt_path", str(folder), rule, "Use a checkpoint of a training") from None


def read_file(path: str | Path, *, map_location: Any = "cpu", mapped: bool = False) -> Any:
    """The contents of a ``torch.save`` file, if it is undamaged and contains tensors and plain types only.

    Args:
        path: of a file on this machine
        map_location: as in ``torch.load``
        mapped: whether to memory-map the tensors

    Raises:
        ConfigError: a URL, no such file, damaged, or more than tensors and plain types
    """
    file = Path(path)
    if "://" in str(path):
        rule = "is a URL, but checkpoints are read from local disks only"
        raise ConfigError("ckpt_path", str(path), rule, "Fetch the file, compare its digest, and name it")
    if not file.is_file():
        remedy = "Name a *.ckpt under logs/; `last` works for blockwright train KEY=VALUE … and within --compose"
        raise ConfigError("ckpt_path", str(path), "is not a checkpoint file", remedy)
    try:
        manifest.check(file)
        # Never left to torch's default: an environment variable may turn it to unrestricted unpickling.
        mmap = mapped and zipfile.is_zipfile(file)
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except manifest.Damaged as error:
        rule = f"cannot be loaded safely ({error.reason})"
        raise ConfigError("ckpt_path", str(path), rule, "Use the one before it (last.previous.ckpt)") from None
    except Exception as error:  # torch raises several classes for a truncated, foreign or hostile file
        rule = f"cannot be loaded safely ({_reason(error, 'it is no file of torch.save')})"
        raise ConfigError("ckpt_path", str(path), rule, "Use a checkpoint of a training") from None


def _is_entry(name: Any, weight: Any) -> bool:
    ours = isinstance(name, str) and name.startswith(PREFIX)
    dense = isinstance(weight, torch.Tensor) and weight.layout == torch.strided
    return isinstance(name, str) and (dense or not ours)


def _reason(error: Exception, foreign: str) -> str:
    """torch's error message, without its advice to load the file unsafely.

    Args:
        foreign: said of the error of a reader that expects its own files
    """
    advice = ("Weights only load failed", "Please file an issue", "(1)", "(2)", "Check the documentation")
    if isinstance(error, LookupError | EOFError | AttributeError | TypeError):
        return foreign
    lines = [line.strip().removeprefix("WeightsUnpickler error: ") for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(advice)), type(error).__name__)


# --- which plug-in packages a model needs -----------------------------------------------------------------------------


def distributions(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Distribution → its version and the blocks of the composition that it provides, without this project."""
    words = set(_words(model))
    found: dict[str, dict[str, Any]] = {}
    for kind in registry.kinds():
        for name in registry.names(kind):
            if name in words and (provider := catalogue.provider(kind, name)) != PROJECT:
                entry = found.setdefault(provider, {"version": _version(provider), "blocks": []})
                entry["blocks"].append(f"{kind}/{name}")
    return found


def check_packages(wanted: Any, path: str) -> None:
    """Refuse a checkpoint that needs plug-in blocks that are not installed.

    Args:
        wanted: the result of ``distributions`` stored in it; None for older checkpoints
        path: of the checkpoint, for the error message

    Raises:
        ConfigError: names the missing distribution
    """
    for provider, entry in (wanted or {}).items():
        for block in entry["blocks"]:
            kind, _, name = block.partition("/")
            if name not in registry.names(kind):
                release = entry["version"]
                rule = (
                    f"was trained with {block} of {provider}{f' {release}' if release else ''}, which is not installed"
                )
                pinned = f"{provider}=={release}" if release else provider
                raise ConfigError("ckpt_path", path, rule, f"pip install '{pinned}'")


def _version(provider: str) -> str | None:
    try:
        return version(provider)
    except PackageNotFoundError:
        return None


def _words(value: Any) -> Iterator[str]:
    """Every word in the strings of a composition: block names occur alone, or in a pattern of layers."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield from re.findall(r"\w+", value)


# --- the weights of the model in a checkpoint ---


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's weights by name, adapters merged.

    Args:
        checkpoint: from ``read_checkpoint``
    """
    found = raw_weights(checkpoint)
    adapter = checkpoint["hyper_parameters"].get("adapter")
    return merged(found, float(adapter["scale"])) if adapter else found


def shapes_of(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of ``weights_of``, without computing them."""
    return {name: tuple(tensor.shape) for name, tensor in raw_weights(checkpoint).items() if not is_adapter(name)}


def raw_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's weights and adapters by name, as stored."""
    return {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(PREFIX)}


# --- check that the weights of a checkpoint fit a model ---


def check_fits(checkpoint: dict[str, Any], decoder: Decoder, path: str | Path) -> None:
    """Refuse a checkpoint whose weights do not fit a model, before either is allocated.

    Args:
        checkpoint: from ``read_checkpoint``
        decoder: on the meta device, with its adapters
        path: of the file, for the error message

    Raises:
        ConfigError: names the first weight that differs, and the parts of the composition that do
    """
    theirs = {k: tuple(v.shape) for k, v in raw_weights(checkpoint).items()}
    ours, model = {k: tuple(v.shape) for k, v in decoder.state_dict().items()}, decoder.config
    unlike = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if unlike:
        old = reread(checkpoint["hyper_parameters"]["model"])
        changed = ", ".join(f"model.{key}" for key in {**old, **model} if old.get(key) != model.get(key)) or "adapter"
        shapes = f"{theirs.get(unlike[0], 'missing')} there and {ours.get(unlike[0], 'missing')} here"
        rule = f"was trained with another model: {unlike[0]} is {shapes}"
        raise ConfigError(
            "ckpt_path", str(path), rule, f"Compose the same model (other now: {changed}), or start afresh"
        )

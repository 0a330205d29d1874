"""Open a model of ours: a run's folder, a training checkpoint, or an imported folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocks.checkpoint.read import PREFIX, read_checkpoint
from blocks.checkpoint.sharded import is_folder
from blocks.compose import check, compose
from blocks.decoder import Decoder
from interop import origin
from interop.shards import Shards
from registry import ConfigError
from registry.limits import read_text

COMPOSITION = "model.yaml"


@dataclass(frozen=True)
class Source:
    """A model with weights.

    Args:
        model: its composition, validated
        tensors: our names → weights
        tokenizer: state of its tokenizer as plain data; None if it has none or has files
        folder: where tokenizer files may be; None for a run
        origin: origin of the imported model that it is or started from; see interop/origin.py
    """

    model: dict[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: dict[str, Any] | None = None
    folder: Path | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def open_source(path: Path) -> Source:
    """Detect what ``path`` is, and read it.

    Raises:
        ConfigError: none of these, or damaged
    """
    if (path / COMPOSITION).is_file():
        return _imported(path)
    last = path / "checkpoints" / "last.ckpt"
    if is_folder(path):
        return _trained(path)
    if path.is_dir() and not last.exists():
        rule = f"holds neither {COMPOSITION} nor checkpoints/last.ckpt"
        raise ConfigError("RUN", str(path), rule, "Name a run's folder, a *.ckpt, or the OUT of blockwright import")
    return _trained(last if path.is_dir() else path)


def _trained(file: Path) -> Source:
    checkpoint = read_checkpoint(file)
    weights = _weights(checkpoint)
    model = check(checkpoint["hyper_parameters"]["model"])
    _check_shapes(model, {name: tuple(weight.shape) for name, weight in weights.items()}, file)
    came_from = origin.check(checkpoint.get("origin", {}), str(file))
    return Source(model, weights, tokenizer_state(checkpoint), origin=came_from)


def tokenizer_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the tokenizer in a checkpoint, from its data module; None if there is none."""
    return next((v["tokenizer"] for v in checkpoint.values() if isinstance(v, dict) and "tokenizer" in v), None)


def _imported(folder: Path) -> Source:
    shards = Shards(folder)
    model = read_composition(folder)
    _check_shapes(model, _shapes(shards), folder)
    tensors = dict(shards.read(shards.entries))
    return Source(model, tensors, None, folder, origin.read(folder))


def read_composition(folder: Path) -> dict[str, Any]:
    """The composition of an imported folder or a run.

    Raises:
        ConfigError: missing or invalid
    """
    file = folder / COMPOSITION
    if file.is_file():
        return check(read_text(file, "init_from"))
    if (last := _last_of(folder)) is None:
        rule = f"holds neither {COMPOSITION} nor checkpoints/last.ckpt"
        remedy = "Name the OUT of: blockwright import DIR OUT; or the folder of a run, or a checkpoint of it"
        raise ConfigError("init_from", str(folder), rule, remedy)
    return check(read_checkpoint(last, shapes_only=True)["hyper_parameters"]["model"])


def check_init(folder: Path, model: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the model, reading headers only.

    Args:
        folder: an imported folder, a run's folder or a checkpoint
        model: the composition to initialise

    Raises:
        ConfigError: at ``init_from``
    """
    read_composition(folder)
    if (last := _last_of(folder)) is None:
        shapes = _shapes(Shards(folder))
    else:
        shapes = {k: tuple(v.shape) for k, v in _weights(read_checkpoint(last, shapes_only=True)).items()}
    _check_shapes(model, shapes, folder)


def load_weights(decoder: Decoder, folder: Path) -> None:
    """Copy the weights of an imported folder or a run into a decoder, in the decoder's own dtype.

    Raises:
        ConfigError: the folder is damaged, or the weights do not fit
    """
    check_init(folder, decoder.config)
    load_part(decoder, folder, "")


def load_part(part: nn.Module, folder: Path, prefix: str) -> None:
    """Like ``load_weights``, for a part of a decoder under the name ``prefix``, already known to fit."""
    own = part.state_dict()
    with torch.no_grad():
        for name, tensor in _read(folder, prefix):
            own[name.removeprefix(prefix)].copy_(tensor)


def _read(folder: Path, prefix: str) -> Iterable[tuple[str, Tensor]]:
    """The weights under a prefix; those of an imported folder one at a time."""
    if (last := _last_of(folder)) is not None:
        return [(k, v) for k, v in _weights(read_checkpoint(last)).items() if k.startswith(prefix)]
    shards = Shards(folder)
    return shards.read([name for name in shards.entries if name.startswith(prefix)])


def _last_of(path: Path) -> Path | None:
    """The checkpoint that a run's folder or a file stands for; None for an imported folder."""
    last = path / "checkpoints" / "last.ckpt"
    return path if path.is_file() or is_folder(path) else last if last.exists() else None


def _weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(PREFIX)}


def load(path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """A decoder in evaluation mode, with its weights, from a run, a checkpoint or an imported folder.

    Raises:
        ConfigError: as for ``open_source``, or the weights do not fit
    """
    return build(open_source(path), dtype=dtype, device=device)


def build(source: Source, *, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Build the decoder of a source, in evaluation mode."""
    decoder = compose(source.model, device="meta").to_empty(device="cpu").to(dtype)
    decoder.load_state_dict(dict(source.tensors))
    return decoder.to(device).eval()


def _shapes(shards: Shards) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in shards.entries.items()}


def _check_shapes(model: Mapping[str, Any], theirs: Mapping[str, tuple[int, ...]], where: Path) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in compose(model, device="meta").state_dict().items()}
    unlike = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if unlike:
        name = unlike[0]
        rule = f"has other weights: {name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        raise ConfigError("init_from", str(where), rule, "Add model=pretrained to take the composition from there too")

"""Open a model: a run's folder, a training checkpoint, an imported folder, or what a package reads.

A package reads models of other programs by an entry point of the group ``blockwright.models``: a function of a path
that gives a ``Source``, or None for what it does not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.checkpoint.manifest import check_origin, origin_of
from blockwright.blocks.checkpoint.read import read_checkpoint, shapes_of, weights_of
from blockwright.blocks.checkpoint.sharded import is_folder
from blockwright.blocks.checkpoint.shards import Shards
from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.folder import read_text

COMPOSITION = "model.yaml"
DTYPES = ("float32", "bfloat16", "float16", "float64")
ENTRY_POINTS = "blockwright.models"
MANY = 1000  # files of a folder
REMEDY = "Name a run's folder (logs/train/runs/…), a *.ckpt, or the OUT of blockwright import"


@dataclass(frozen=True)
class Source:
    """A model with weights.

    Args:
        model: its composition, validated
        tensors: our names → weights
        tokenizer: state of its tokenizer as plain data; None if it has none or has files
        folder: where tokenizer files may be; None for a run
        origin: origin of the imported model that it is or started from; see blocks/checkpoint/manifest.py
        read_from: which weights these are, for people: the file, its step, whether they are an average
    """

    model: dict[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: dict[str, Any] | None = None
    folder: Path | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    read_from: str = ""


@contextmanager
def named_by(word: str) -> Iterator[None]:
    """What is wrong with the place of weights is refused of the word of the command that names it."""
    try:
        yield
    except ConfigError as error:
        if error.path not in ("RUN", "init_from", "ckpt_path"):
            raise
        raise ConfigError(word, error.value, error.rule, error.remedy) from None


def open_source(path: Path, word: str = "RUN") -> Source:
    """Detect what ``path`` is, and read it.

    Args:
        word: of the command, by which the path is named

    Raises:
        ConfigError: none of these, or damaged
    """
    with named_by(word):
        return _opened(path)


def check_there(path: Path, word: str) -> None:
    """Refuse a path at which nothing is.

    Raises:
        ConfigError: at ``word``
    """
    if not path.exists():
        raise ConfigError(word, str(path), "there is no such file or folder", REMEDY)


def _opened(path: Path) -> Source:
    check_there(path, "RUN")
    if (path / COMPOSITION).is_file():
        shards = Shards(path)
        model = read_composition(path)
        _check_shapes(model, _shapes(shards), path)
        tensors = dict(shards.read(shards.entries))
        return Source(model, tensors, None, path, origin_of(path), str(path))
    if is_folder(path):
        return _trained(path)
    last = path / "checkpoints" / "last.ckpt"
    ours = last.exists() if path.is_dir() else path.suffix == ".ckpt"
    if not ours and (source := _of_other_programs(path)) is not None:
        return source
    if path.is_dir() and not ours:
        rule = f"holds neither {COMPOSITION} nor checkpoints/last.ckpt"
        raise ConfigError("RUN", str(path), rule, REMEDY)
    return _trained(last if path.is_dir() else path)


def _of_other_programs(path: Path) -> Source | None:
    for reader in _readers():
        try:
            source = reader(path)
        except ConfigError as error:
            part = error.path.removeprefix(str(path)).lstrip("/: ")
            rule = f"{part}: {error.rule}" if part else error.rule
            raise ConfigError("RUN", str(path), rule, error.remedy) from None
        if source is not None:
            return source
    return None


@lru_cache(maxsize=1)
def _readers() -> list[Callable[[Path], Source | None]]:
    """Of models of other programs, by installed packages."""
    return [point.load() for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)]


def _trained(file: Path) -> Source:
    checkpoint = read_checkpoint(file)
    model = check(checkpoint["hyper_parameters"]["model"])
    _check_shapes(model, shapes_of(checkpoint), file)
    came_from = check_origin(checkpoint.get("origin", {}), str(file))
    chosen = _described(file, checkpoint)
    return Source(model, weights_of(checkpoint), tokenizer_state(checkpoint), origin=came_from, read_from=chosen)


def _described(file: Path, checkpoint: Mapping[str, Any]) -> str:
    """Which weights a checkpoint holds, and which others are next to it: a run keeps its last and its best."""
    parts, step = [str(file)], checkpoint.get("global_step")
    if isinstance(step, int):
        parts.append(f"step {step:,}")
    if "current_model_state" in checkpoint:  # of callbacks=averaging
        parts.append("a moving average of the weights")
    beside = (other.name for other in islice(file.parent.glob("*.ckpt"), MANY) if other.name != file.name)
    if others := sorted(name for name in beside if "previous" not in name):
        parts.append(f"next to {' and '.join(others[:3])}")
    return ", ".join(parts)


def tokenizer_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the tokenizer in a checkpoint, from its data module; None if there is none."""
    return next((v["tokenizer"] for v in checkpoint.values() if isinstance(v, dict) and "tokenizer" in v), None)


def checkpoint_of(start: Path) -> Path | None:
    """The checkpoint at a place that weights start from: a run's folder, or itself; None for an imported folder.

    Raises:
        ConfigError: at ``init_from``: there is none of these
    """
    if (start / COMPOSITION).is_file():
        return None
    found = start / "checkpoints" / "last.ckpt" if start.is_dir() and not is_folder(start) else start
    if not found.exists():
        rule = f"holds neither {COMPOSITION} nor checkpoints/last.ckpt"
        remedy = "Name the OUT of: blockwright import DIR OUT; or the folder of a run, or a checkpoint of it"
        raise ConfigError("init_from", str(start), rule, remedy)
    return found


def read_start(start: Path) -> dict[str, Any]:
    """The checkpoint that weights start from, its tensors unread; empty for an imported folder.

    Raises:
        ConfigError: at ``init_from``
    """
    found = checkpoint_of(start)
    if found is None:
        return {}
    try:
        return read_checkpoint(found, shapes_only=True)
    except ConfigError as error:
        raise ConfigError("init_from", str(found), error.rule, error.remedy) from None


def read_composition(start: Path) -> dict[str, Any]:
    """The composition of a run, a checkpoint or an imported folder.

    Raises:
        ConfigError: missing or invalid
    """
    checkpoint = read_start(start)
    return check(checkpoint["hyper_parameters"]["model"] if checkpoint else read_text(start, COMPOSITION))


def read_origin(start: Path) -> dict[str, Any]:
    """The origin of the weights in a run, a checkpoint or an imported folder."""
    return check_origin(read_start(start).get("origin", {}), str(start)) if checkpoint_of(start) else origin_of(start)


def check_init(start: Path, model: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the model, reading shapes only.

    Args:
        start: a run's folder, a checkpoint or an imported folder
        model: the composition to initialise

    Raises:
        ConfigError: at ``init_from``
    """
    read_composition(start)
    checkpoint = read_start(start)
    _check_shapes(model, shapes_of(checkpoint) if checkpoint else _shapes(Shards(start)), start)


def load_weights(decoder: Decoder, start: Path) -> None:
    """Copy the weights of a run, a checkpoint or an imported folder into a decoder, in the decoder's own dtype.

    One tensor at a time; a sharded checkpoint is read whole.

    Raises:
        ConfigError: it is damaged, or the weights do not fit
    """
    check_init(start, decoder.config)
    load_part(decoder, start, "")


def load_part(part: nn.Module, folder: Path, prefix: str) -> None:
    """Like ``load_weights``, for a part of a decoder under the name ``prefix``, already known to fit."""
    own = part.state_dict()
    with torch.no_grad():
        for name, tensor in _weights(folder, prefix):
            own[name.removeprefix(prefix)].copy_(tensor)


def _weights(start: Path, prefix: str) -> Iterable[tuple[str, Tensor]]:
    """Names that begin with the prefix, and their tensors."""
    found = checkpoint_of(start)
    if found is None:
        shards = Shards(start)
        return shards.read([name for name in shards.entries if name.startswith(prefix)])
    weights = _state(found, found.stat().st_mtime_ns)
    return ((name, tensor) for name, tensor in weights.items() if name.startswith(prefix))


@lru_cache(maxsize=1)  # parts of one model are loaded after each other; a file is mapped, not read
def _state(checkpoint: Path, written: int) -> dict[str, Tensor]:
    return weights_of(read_checkpoint(checkpoint))


def load(path: str | Path, *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """A decoder in evaluation mode, with its weights, from every path that ``blockwright generate`` takes.

    ``decoder.read_from`` says which weights they are.

    Args:
        path: a run's folder, for its last checkpoint; a checkpoint, such as ``RUN/checkpoints/best.ckpt``; the OUT of
            ``blockwright import``; or what an installed package reads: a Hugging Face folder, a ``*.gguf``
        dtype, device: of the weights

    Raises:
        ConfigError: as for ``open_source``; or the weights do not fit, or there is no such dtype or device
    """
    wanted, where = usable_dtype(dtype), usable_device(device)
    return build(open_source(Path(path)), dtype=wanted, device=where)


def usable_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype of weights, or that of a name.

    Raises:
        ConfigError: it is not among ``DTYPES``
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError("dtype", name, "is not supported", did_you_mean(name, DTYPES))
    return getattr(torch, name)


def usable_device(device: torch.device | str) -> torch.device:
    """A device, or that of a name.

    Raises:
        ConfigError: torch has none
    """
    try:
        return torch.empty(0, device=device, dtype=torch.float32).device
    except (RuntimeError, AssertionError):
        rule = "torch has no such device here"
        raise ConfigError("device", str(device), rule, "Write cpu, or cuda:0 on a GPU") from None


def build(source: Source, *, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Build the decoder of a source, in evaluation mode."""
    decoder = compose(source.model, device="meta").to_empty(device="cpu").to(dtype)
    decoder.load_state_dict(dict(source.tensors))
    decoder.read_from = source.read_from
    return decoder.to(device).eval()


def _shapes(shards: Shards) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in shards.entries.items()}


def _check_shapes(model: Mapping[str, Any], theirs: Mapping[str, tuple[int, ...]], where: Path) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in compose(model, device="meta").state_dict().items()}
    unlike = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if unlike:
        name = unlike[0]
        rule = f"has other weights: {name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        remedy = "Add model=pretrained to take the composition from there too"
        raise ConfigError("init_from", str(where), rule, remedy)

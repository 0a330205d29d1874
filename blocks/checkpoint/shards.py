"""Safetensors checkpoints: validated and read tensor by tensor, written in shards with an index.

Only safetensors are opened. A pickle can run code, so ``.bin``, ``.pt`` and ``.pth`` are refused unread.

Files written here carry a SHA-256 of every tensor in the header's metadata, which other readers ignore. It is checked
only when the tensor is read: a rank that needs a part of a large model reads just that part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import read_json
from blockwright.registry import ConfigError
from blockwright.registry.errors import require

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DIGESTS = "blockwright-sha256"  # in the metadata of a header: JSON of tensor → digest
PART = 2**20  # numbers that are tested together
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Entry:
    """A tensor as described by its shard's header."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """The tensors of a folder. Opening reads headers only.

    Args:
        folder: holds ``model.safetensors``, or shards and their index
        single: another name of the one file

    Raises:
        ConfigError: no safetensors, a shard missing, truncated, not safetensors or contradicting the index, or an index
            that points outside the folder
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        require("hf", "safetensors", path="safetensors")
        self.folder = folder
        index = folder / INDEX
        listed = _listed(index) if index.is_file() else None
        if listed is None and not (folder / single).is_file():
            raise _nothing_to_read(folder)
        self.files = sorted(set(listed.values())) if listed is not None else [single]
        self.entries: dict[str, Entry] = {}
        self.digests: dict[str, str] = {}
        self._kept: tuple[str, Any] | None = None
        for file in self.files:
            for name, entry in self._header(file).items():
                if listed is not None and listed.get(name) != file:
                    where = listed.get(name, "nowhere")
                    rule = f"is in {file}, but {INDEX} names {where}"
                    raise ConfigError(str(folder), name, rule, "Fetch the index and the shards again, from one place")
                self.entries[name] = entry
        for name, file in (listed or {}).items():
            if name not in self.entries:
                raise ConfigError(str(folder / file), name, f"is missing, but {INDEX} lists it", "Fetch it again")

    def _header(self, file: str) -> dict[str, Entry]:
        with self._open(file) as shard:
            self.digests |= _digests_in(self.folder / file, shard)
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 # it is no mapping
            return {
                n: Entry(file, tuple(s.get_shape()), self._dtype(file, n, s.get_dtype())) for n, s in slices.items()
            }

    def _dtype(self, file: str, name: str, word: str) -> torch.dtype:
        if word in DTYPES:
            return DTYPES[word]
        rule = f"is stored as {word}; supported are {', '.join(DTYPES)}"
        raise ConfigError(str(self.folder / file), name, rule, "Use a checkpoint in bf16, fp8 or mxfp4")

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        if not _is_file(path):
            raise ConfigError(str(path), None, "this shard is missing", "Fetch all shards again")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            with path.open("rb") as opened:
                start = opened.read(4)
            if start.startswith((b"PK", b"\x80")):
                raise ConfigError(str(path), "…", "is a pickle, despite its name", CONVERT) from None
            rule = f"cannot be read as safetensors ({error})"
            raise ConfigError(str(path), "…", rule, "Truncated, or not safetensors: fetch it again") from None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors of these names, shard by shard, one in memory at a time.

        Raises:
            ConfigError: a tensor contains NaN or infinity
        """
        wanted = set(names)
        by_file: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            if name in wanted:
                by_file.setdefault(entry.file, []).append(name)
        for file, here in by_file.items():
            with self._open(file) as shard:
                for name in here:
                    yield name, self._checked(shard, name)

    def one(self, name: str) -> Tensor:
        """Read one small tensor. Its file stays open: scales are read in the order of the weights."""
        file = self.entries[name].file
        if self._kept is None or self._kept[0] != file:
            self._kept = (file, self._open(file))
        return self._checked(self._kept[1], name)

    def _checked(self, shard: Any, name: str) -> Tensor:
        tensor = shard.get_tensor(name)
        stored = self.digests.get(name)
        if stored is not None and stored != digest(name, tensor):
            where = str(self.folder / self.entries[name].file)
            raise ConfigError(where, name, "is damaged: its bytes do not match their digest", "Fetch it again")
        if not tensor.is_floating_point():
            return tensor
        if not all_finite(tensor):
            where = str(self.folder / self.entries[name].file)
            rule = "contains values that are not finite"
            raise ConfigError(where, name, rule, "Fetch it again; this one is damaged")
        return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; seen part by part, since the test needs twice the memory of what it sees."""
    parts = tensor.flatten().split(PART) if tensor.is_contiguous() else (tensor,)
    return all(bool(torch.isfinite(p if p.element_size() > 1 else p.float()).all()) for p in parts)


def digest(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor: its name, dtype, shape and bytes."""
    words = f"{name} {tensor.dtype} {list(tensor.shape)} "
    found = hashlib.sha256(words.encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _digests_in(file: Path, shard: Any) -> dict[str, str]:
    """The digests stored in a shard; none if it was not written here.

    Raises:
        ConfigError: they belong to other tensors
    """
    text = (shard.metadata() or {}).get(DIGESTS)
    if text is None:
        return {}
    try:
        stored = json.loads(text)
        fits = isinstance(stored, dict) and set(stored) == set(shard.keys())
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        raise ConfigError(str(file), "…", "is damaged: its digests do not belong to its tensors", "Fetch it again")
    return stored


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # an impossible file name
        return False


CONVERT = "Loading a pickle can run code. Get the safetensors of this model, or convert it where you trust it"


def _listed(index: Path) -> dict[str, str]:
    """The index: tensor → file, every file a plain name within the folder."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()) or not found:
        raise ConfigError(str(index), found, "must hold a weight_map of names and files", "Fetch the index again")
    for file in found.values():
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            rule = "points outside the checkpoint's folder"
            raise ConfigError(f"{index}: weight_map", file, rule, "Do not trust this checkpoint")
        if not file.endswith(".safetensors"):
            raise ConfigError(f"{index}: weight_map", file, "names a file that is not safetensors", CONVERT)
    return found


def _nothing_to_read(folder: Path) -> ConfigError:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        return ConfigError(str(folder), pickles[0], "holds pickled weights only", CONVERT)
    if sorted(folder.glob("*.safetensors")):
        return ConfigError(str(folder / INDEX), None, "the index of these shards is missing", "Fetch it too")
    return ConfigError(str(folder), None, f"holds neither {SINGLE} nor {INDEX}", "Name the folder of a checkpoint")


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written, made only when its shard is written."""

    nbytes: int
    make: Callable[[], Tensor]


def ready(tensor: Tensor) -> Outgoing:
    """Wrap a tensor that already exists."""
    return Outgoing(tensor.nbytes, lambda: tensor)


def write_shards(folder: Path, tensors: Mapping[str, Outgoing], max_bytes: int) -> None:
    """Write tensors in order, in shards of at most ``max_bytes`` or one tensor, with an index if there are several.

    Args:
        folder: must exist
        tensors: by name
        max_bytes: per shard

    Raises:
        ConfigError: a value is not finite, from training or from the conversion to the requested dtype
        OSError: no space left, or a file cannot be written for another reason
    """
    groups = _grouped(tensors, max_bytes)
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        several = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        file = several if len(groups) > 1 else SINGLE
        made = {name: _finite(name, tensors[name].make()) for name in group}
        save(made, folder / file)
        weight_map |= dict.fromkeys(group, file)
        del made
    if len(groups) > 1:
        total = sum(outgoing.nbytes for outgoing in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors with their digests to one file.

    Raises:
        OSError: no space left, or it cannot be written for another reason
    """
    require("hf", "safetensors", path="safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    digests = {name: digest(name, tensor) for name, tensor in tensors.items()}
    try:
        save_file(tensors, file, metadata={"format": "pt", DIGESTS: json.dumps(digests)})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not all_finite(tensor):
        rule = f"contains values that are not finite in {str(tensor.dtype).removeprefix('torch.')}"
        raise ConfigError(
            "weights", name, rule, "Choose a wider --dtype, or a checkpoint from before training diverged"
        )
    return tensor


def _grouped(tensors: Mapping[str, Outgoing], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, outgoing in tensors.items():
        if groups[-1] and size + outgoing.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += outgoing.nbytes
    return groups

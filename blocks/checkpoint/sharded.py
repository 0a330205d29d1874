"""Sharded checkpoints: a folder with every rank's tensors, as torch.distributed.checkpoint writes them.

``meta.pt`` in it holds everything but the tensors of the model and the optimizers. Tensor keys are
``state_dict.<name>`` and ``optimizer.<which>.<parameter>.<name>``. torch reads the index ``.metadata`` with an
unrestricted pickle, which could run code; here only the classes that an index consists of may be unpickled.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockwright.registry import ConfigError
from blockwright.registry.folder import MAX_FILE_BYTES, read_bytes

META = "meta.pt"
INDEX = ".metadata"
MODEL, OPTIMIZER = "state_dict.", "optimizer."

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
}


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a sharded checkpoint."""
    return (path / INDEX).is_file() and (path / META).is_file()


def read_meta(folder: Path) -> dict[str, Any]:
    """Everything that is not a tensor, loaded under ``weights_only=True``."""
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def read_index(folder: Path) -> Any:
    """The index: names and shapes of the tensors, and which file holds which part.

    Raises:
        ConfigError: it is no plain file of the folder, or too long
        pickle.UnpicklingError: it contains anything else
    """
    index = _Unpickler(io.BytesIO(read_bytes(folder, INDEX, MAX_FILE_BYTES))).load()
    if any(Path(info.relative_path).name != str(info.relative_path) for info in index.storage_data.values()):
        raise pickle.UnpicklingError("names a file outside its folder")
    return index


def outline(folder: Path) -> dict[str, Tensor]:
    """Key → a meta tensor with the shape and dtype in the index."""
    entries = read_index(folder).state_dict_metadata.items()
    return {
        key: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for key, e in entries if hasattr(e, "size")
    }


def read_tensors(folder: Path, into: dict[str, Tensor], alone: bool = True) -> None:
    """Fill tensors in place, distributed ones too, whatever the number of ranks that wrote the folder.

    Args:
        into: key → tensor
        alone: whether this process reads by itself; else all ranks must call this, and share the reading
    """
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(), failures():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        dcp.load(into, storage_reader=_reader(folder), planner=_planner(), no_dist=alone)


@contextmanager
def failures() -> Iterator[None]:
    """Raise what has failed on a rank, an OSError if there is one, instead of torch's exception of all ranks.

    That one is a BaseException: no ``except Exception`` of a sweep or an entry point would see it.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        found: list[BaseException] = [each for each, _ in error.failures.values()]
        first = next((each for each in found if isinstance(each, OSError)), found[0])
        raise (first if isinstance(first, Exception) else RuntimeError(str(first))) from None


def read_folder(folder: Path, optimizers: bool = True) -> dict[str, Any]:
    """The whole checkpoint in this process's memory, with the structure of a single-file one.

    Raises:
        ConfigError: it is damaged, or contains more than plain types and tensors
    """
    try:
        meta, found = read_meta(folder), outline(folder)
        wanted = {k: v for k, v in found.items() if optimizers or k.startswith(MODEL)}
        tensors = {key: torch.empty_like(like, device="cpu") for key, like in wanted.items()}
        read_tensors(folder, tensors)
    except ConfigError:
        raise
    except Exception as error:  # torch raises several classes for a truncated, foreign or hostile file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        rule = f"cannot be loaded safely ({reason})"
        raise ConfigError("ckpt_path", str(folder), rule, "Use a checkpoint of a training") from None
    model = {key.removeprefix(MODEL): t for key, t in tensors.items() if key.startswith(MODEL)}
    checkpoint = {**meta, "state_dict": model}
    if optimizers:
        checkpoint["optimizer_states"] = [join(i, state, tensors) for i, state in enumerate(meta["optimizer_states"])]
    return checkpoint


def split(which: int, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state → the same without its tensors, and key → tensor."""
    tensors = {
        f"{OPTIMIZER}{which}.{parameter}.{name}": value
        for parameter, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    plain = {
        parameter: {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for parameter, values in state["state"].items()
    }
    return {**state, "state": plain}, tensors


def join(which: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of ``split``."""
    whole = {parameter: dict(values) for parameter, values in state["state"].items()}
    prefix = f"{OPTIMIZER}{which}."
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            parameter, _, name = key.removeprefix(prefix).partition(".")
            whole[int(parameter)][name] = tensor
    return {**state, "state": whole}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index")
        return super().find_class(module, name)


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, rank: int | None = None) -> Any:
            index = read_index(folder)
            if getattr(index, "storage_meta", None) is None:
                index.storage_meta = StorageMeta()
            index.storage_meta.load_id = self.load_id
            return index

    return Reader(str(folder))


def _planner() -> Any:
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")

    return Planner(flatten_state_dict=False, flatten_sharded_tensors=False)

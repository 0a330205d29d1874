"""Import a Hugging Face folder into ours: ``model.yaml``, safetensors under our names, tokenizer files.

Everything in the headers is checked before a weight is read: names, shapes, dtypes, presence of all shards. Shards are
then read one after the other, each tensor into its place, so peak memory is the model and one shard. ``blockwright
chat DIR`` opens folders and GGUF files without an import.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import check_origin, licences, read_json, whole, write_origin
from blockwright.blocks.checkpoint.shards import Shards, ready, write_shards
from blockwright.blocks.checkpoint.source import Source
from blockwright.blocks.compose import check, compose, read
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import idle, refusal
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.gguf import unpack
from blockwright.plugins.hub.names import Link, Row, links
from blockwright.plugins.hub.own import OWN
from blockwright.plugins.hub.packed import Unpacked, block_size
from blockwright.registry import ConfigError, did_you_mean
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers.files import VOCABULARIES, copy_files
from blockwright.training.data.tokenizers.pretrained import Pretrained

# Some checkpoints with a tied embedding store the head too.
HEAD = Row("embedding.weight", "lm_head.weight", copy_of="embedding.weight")

# Vocabulary files, of which the first is read; a tokenizer's other files: training/data/tokenizers/companions.py.


def import_folder(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    mtp: bool = False,
    max_bytes: int = 5 * 10**9,
    ignored: Collection[str] = (),
) -> str:
    """Import a checkpoint.

    Args:
        source: folder with config.json and safetensors
        out: folder to create; must not exist, or be empty
        dtype: of the parameters; None keeps the stored one (FP8 and MXFP4 become bf16)
        mtp: whether to import multi-token prediction heads
        max_bytes: per shard written
        ignored: unknown keys of config.json that the user declares to have no effect; recorded in origin.json

    Returns:
        the model_type found

    Raises:
        ConfigError: the checkpoint or a folder is unusable; nothing has been written
    """
    found = read_folder(source, dtype=dtype, mtp=mtp, ignored=ignored)
    files = companions.read(source)
    with whole(out) as folder:
        outgoing = {name: ready(tensor) for name, tensor in found.tensors().items()}
        write_shards(folder, outgoing, max_bytes)
        head = f"# Imported from a checkpoint of {found.model_type}.\n"
        (folder / "model.yaml").write_text(head + yaml.safe_dump(read(found.model), sort_keys=False))
        write_origin(found.origin, folder)
        companions.write(files, folder)
        copy_files((*VOCABULARIES, "README.md"), source, folder)
    return found.model_type


@dataclass(frozen=True)
class Found:
    """A checkpoint whose headers fit a composition.

    Args:
        model_type: of its family
        model: the composition
        origin: see blocks/checkpoint/manifest.py
        tensors: reads our tensors
    """

    model_type: str
    model: dict[str, Any]
    origin: dict[str, Any]
    tensors: Callable[[], dict[str, Tensor]]


def read_folder(
    source: Path, *, dtype: torch.dtype | None = None, mtp: bool = False, ignored: Collection[str] = ()
) -> Found:
    """Check a checkpoint by its headers; arguments and errors as in ``import_folder``."""
    values = read_json(source / "config.json")
    family = find(values)
    block = block_size(values)  # before the headers: of other tools they hold dtypes that would be refused first
    shards = Unpacked(Shards(source), block)
    _check_depth(values, len(shards.entries))
    model = family.composition(values, mtp, ignored)
    if mtp and not model.get("mtp"):
        rule = f"this checkpoint of {family.model_type} has no heads of multi-token prediction that are read here"
        raise ConfigError("--mtp", True, rule, "Leave it out")
    found_licences = licences(source)
    with torch.device("meta"):
        decoder = compose(model, device="meta")
    ours = decoder.state_dict()
    found = _pair(family, shards, decoder)
    kept = {name for name, _ in decoder.named_buffers()}  # gate biases, never rounded
    dtypes = _dtypes(found, shards, ours, dtype, kept)
    reasons, skipped = {key: why for key in values if (why := idle(key))}, {key: values[key] for key in ignored}
    came_from = {"model_type": family.model_type, "config": values, "idle": reasons, "ignored": skipped}
    came_from = check_origin({**came_from, "licences": found_licences}, str(source))
    return Found(family.model_type, model, came_from, lambda: fill(found, shards, ours, dtypes))


def find(values: Mapping[str, Any]) -> Family:
    """The family named by a config.json.

    Raises:
        ConfigError: it is unknown
    """
    model_type, known = values.get("model_type"), {**FAMILIES, OWN.model_type: OWN}
    if not isinstance(model_type, str) or model_type not in known:
        raise refusal("model_type", model_type, "is not a known architecture", did_you_mean(model_type, known))
    return known[model_type]


DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "num_nextn_predict_layers")
LANGUAGE = ("language_config", "text_config")  # of a model that holds a language model


def _check_depth(values: Mapping[str, Any], n_tensors: int) -> None:
    """Refuse a depth that contradicts the number of tensors, before anything is allocated per layer."""
    own = values.get("composition")
    inner = next((values[key] for key in LANGUAGE if isinstance(values.get(key), dict)), values)
    depths = {key: inner.get(key) for key in DEPTHS}
    if isinstance(own, dict):
        mtp = own.get("mtp")
        further = mtp if isinstance(mtp, dict) else {}
        depths |= {"composition.n_layers": own.get("n_layers"), "composition.mtp.depth": further.get("depth")}
    for key, depth in depths.items():
        if isinstance(depth, int) and depth > n_tensors:
            rule = f"cannot be the depth of a checkpoint of {n_tensors} tensors"
            raise refusal(key, depth, rule, "Fetch config.json and the shards again")


def _pair(family: Family, shards: Unpacked, decoder: Decoder) -> list[Link]:
    """Match their tensors with ours, checking every name and shape in the headers."""
    prefix = family.prefix
    bare = bool(prefix) and not any(name.startswith(prefix) for name in shards.entries)
    found: list[Link] = []
    ours, n_layers = decoder.state_dict(), len(decoder.layers)
    for link in links(family.rows(decoder), ours, n_layers):
        names = [name.removeprefix(prefix) if bare else name for name in (link.theirs, link.also) if name]
        theirs = next((name for name in names if name in shards.entries), names[0])
        link = Link(theirs, link.ours, link.row, link.expert)
        entry = shards.entries.get(theirs)
        if entry is None and link.row.copy_of:
            continue
        if entry is None:
            near = did_you_mean(theirs, list(shards.entries)[:2000])[:200]
            raise ConfigError(str(shards.folder), theirs, "this tensor is missing", f"Fetch all shards. {near}")
        if entry.shape != link.shape(ours[link.ours]):
            rule = f"must have shape {link.shape(ours[link.ours])} by config.json"
            remedy = "Fetch config.json and the shards again, from one place"
            raise ConfigError(f"{shards.folder / entry.file}: {theirs}", entry.shape, rule, remedy)
        found.append(link)
    if "head.weight" not in ours and HEAD.theirs in shards.entries:
        found.append(Link(HEAD.theirs, HEAD.copy_of, HEAD, 0))
    _refuse_extra(family, shards, {link.theirs for link in found}, n_layers, "" if not bare else prefix)
    return found


def _refuse_extra(family: Family, shards: Unpacked, used: set[str], n_layers: int, prefix: str) -> None:
    for name, entry in shards.entries.items():
        if name in used or family.leaves_out(prefix + name, n_layers):
            continue
        where = str(shards.folder / entry.file)
        raise ConfigError(
            where, name, f"is not a parameter of {family.model_type} with this config.json", "Use its own config"
        )


def _dtypes(
    found: list[Link], shards: Unpacked, ours: Mapping[str, Tensor], dtype: torch.dtype | None, kept: set[str]
) -> dict[str, torch.dtype]:
    """The dtype of each of our tensors: the requested one, else the widest of its sources."""
    chosen: dict[str, torch.dtype] = {}
    for link in found:
        stored = shards.entries[link.theirs].dtype
        if stored.is_floating_point != ours[link.ours].dtype.is_floating_point:
            where = f"{shards.folder / shards.entries[link.theirs].file}: {link.theirs}"
            raise ConfigError(where, stored, "is not a dtype of weights", "Use a checkpoint that is not quantised")
        if link.row.constant is not None:
            continue
        wanted = dtype if dtype is not None and link.ours not in kept else stored
        chosen[link.ours] = torch.promote_types(chosen.get(link.ours, wanted), wanted)
    return chosen


def fill(
    found: list[Link],
    shards: Unpacked,
    ours: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Our tensors, read from the shards one tensor at a time.

    Raises:
        ConfigError: a value is not finite, or one that is repeated, or fixed here, is another
    """
    made = {name: torch.empty(tensor.shape, dtype=dtypes[name]) for name, tensor in ours.items() if name in dtypes}
    made |= {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in ours.items() if name not in made}
    wanted: dict[str, list[Link]] = {}
    copies: dict[str, list[Link]] = {}
    for link in found:
        (wanted if link.row.stores else copies).setdefault(link.theirs, []).append(link)
    for name, tensor in shards.read(wanted):
        for link in wanted[name]:
            link.part(made[link.ours]).copy_(link.row.form.view(tensor))
    for name, tensor in shards.read(copies):
        for link in copies[name]:
            if link.row.constant is not None:
                if not torch.equal(link.part(tensor).bfloat16(), tensor.bfloat16()):  # rounded when it was made
                    rule = f"must be {link.row.constant}, the only value that is implemented"
                    raise ConfigError(f"{shards.folder}: {name}", tensor.item(), rule, "It cannot be imported")
            elif not torch.equal(link.part(made[link.ours]), link.row.form.view(tensor).to(dtypes[link.ours])):
                rule = f"must equal {link.ours}, with which our model shares it"
                remedy = "Import it without multi-token prediction heads"
                remedy = "Set tie_word_embeddings to false in config.json" if link.row is HEAD else remedy
                raise ConfigError(str(shards.folder), name, rule, remedy)
    return made


def open_folder(path: Path) -> Source | None:
    """A folder with config.json and safetensors; None for anything else.

    Raises:
        ConfigError: as for ``blockwright import``
    """
    if not (path / "config.json").is_file():
        return None
    found = read_folder(path)
    return Source(check(found.model), found.tensors(), None, path, found.origin, str(path))


def open_gguf(path: Path) -> Source | None:
    """A file of llama.cpp, dequantised; None for anything else.

    Raises:
        ConfigError: as for ``blockwright import``
    """
    if path.suffix != ".gguf" or not path.is_file():
        return None
    with TemporaryDirectory(prefix="blockwright.") as unpacked:
        folder = Path(unpacked)
        unpack(path, folder)
        found = read_folder(folder)
        words = Pretrained(str(folder / "tokenizer.json")).to_json()
        return Source(check(found.model), found.tensors(), words, None, found.origin, str(path))

"""Export a model to a folder that ``transformers`` and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import dump_json, whole, write_licences
from blockwright.blocks.checkpoint.shards import Outgoing, write_shards
from blockwright.blocks.checkpoint.source import Source, open_source
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import GENERATION, TOKENS, TRAINING, idle
from blockwright.plugins.hub.families.catalogue import FAMILIES, WRITTEN
from blockwright.plugins.hub.family import Family, UnlikeError
from blockwright.plugins.hub.names import Link, links
from blockwright.plugins.hub.own import OWN
from blockwright.registry import ConfigError, did_you_mean
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers import files as tokenizer
from blockwright.training.data.tokenizers.files import write_all

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # null where there is none: absent, it may be the class's own


def export_folder(
    path: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: torch.dtype | Literal["original"] | None = None,
    max_bytes: int = 5 * 10**9,
    beside: Mapping[str, str] | None = None,
) -> tuple[str, str | None]:
    """Export a model.

    Args:
        path: a run's folder, a training checkpoint, or an imported folder
        out: folder to create; must not exist, or be empty
        family: the model_type to export as; None detects one
        dtype: of the parameters; None keeps the stored one, ``original`` uses the published one
        max_bytes: per shard
        beside: name → text of further files

    Returns:
        the model_type written, and, if that is our own, why no other family fits

    Raises:
        ConfigError: the source is damaged, or is not of the requested family; nothing has been written
    """
    source = open_source(path)
    decoder = compose(source.model, device="meta")
    found, values, why = recognise(decoder, family, source.origin)
    wanted = _published_dtype(source.origin) if dtype == "original" else dtype
    values = {**_kept(source.origin, found), **values, **_ids(source)}
    with whole(out) as folder:
        tensors = outgoing(found, decoder, source.tensors, wanted)
        write_shards(folder, tensors, max_bytes)
        stored = str(wanted or source.tensors["embedding.weight"].dtype).removeprefix("torch.")
        # transformers before 5 looks for torch_dtype.
        dump_json(folder / "config.json", {**values, "dtype": stored, "torch_dtype": stored})
        write_all(source, folder, decoder.config["max_positions"])
        dump_json(folder / companions.GENERATION, _generation(folder, _ids(source)))
        write_licences(source.origin, folder)
        _write_beside(beside, folder)
    return found.model_type, why


def export_decoder(decoder: Decoder, out: Path, *, max_bytes: int = 5 * 10**9) -> str:
    """Export a model in memory, without a tokenizer; its weights must be whole.

    Returns:
        the model_type written
    """
    found, values, _ = recognise(decoder, None, {})
    weights = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    with whole(out) as folder:
        write_shards(folder, outgoing(found, decoder, weights, None), max_bytes)
        stored = str(decoder.embedding.weight.dtype).removeprefix("torch.")
        dump_json(folder / "config.json", {**values, **dict.fromkeys(IDS), "dtype": stored, "torch_dtype": stored})
    return found.model_type


def export_config(
    decoder: Decoder, out: Path, *, family: str | None = None, beside: Mapping[str, str] | None = None
) -> str:
    """Write the config.json of a model that has no weights yet; arguments as in ``export_folder``.

    Returns:
        the model_type written
    """
    found, values, _ = recognise(decoder, family, {})
    with whole(out) as folder:
        dump_json(folder / "config.json", {**values, **dict.fromkeys(IDS)})
        _write_beside(beside, folder)
    return found.model_type


def _write_beside(beside: Mapping[str, str] | None, folder: Path) -> None:
    for name, text in (beside or {}).items():
        (folder / name).write_text(text, encoding="utf-8")


def _published_dtype(origin: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the parameters were published.

    Raises:
        ConfigError: at ``--dtype``, when the original config.json has none
    """
    config = origin.get("config", {})
    word = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if word not in ("float32", "bfloat16", "float16", "float64"):
        rule = f"the original checkpoint names no dtype ({word})"
        raise ConfigError("--dtype", "original", rule, "Write float32, bfloat16 or float16")
    return getattr(torch, word)


def _kept(came_from: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Keys without effect from the original config.json, for other programs, if the model still is of that family."""
    config = came_from.get("config", {}) if came_from.get("model_type") == family.model_type else {}
    kept = {key: value for key, value in config.items() if idle(key) in (TRAINING, GENERATION, TOKENS)}
    return {key: value for key, value in kept.items() if key not in (*IDS, "initializer_range")}


def recognise(
    decoder: Decoder, wanted: str | None, origin: Mapping[str, Any]
) -> tuple[Family, dict[str, Any], str | None]:
    """Find the family of a decoder and its config.json, falling back to our own format with the reason.

    Args:
        decoder: on the meta device
        wanted: a model_type required by the user
        origin: the origin of the model; its family is tried first

    Raises:
        ConfigError: it is not of the requested family
    """
    known = {**FAMILIES, OWN.model_type: OWN}
    if wanted is not None and wanted not in known:
        raise ConfigError("--family", wanted, "is not a known family", did_you_mean(wanted, known))
    first = known.get(str(origin.get("model_type")))
    candidates = [first, *WRITTEN] if first else [*WRITTEN]
    if wanted:
        candidates = [family for family in (*WRITTEN, OWN) if family.model_type == wanted]
    reasons: dict[str, LookupError] = {}
    for family in candidates:
        try:
            values = family.config(decoder)
            list(links(family.rows(decoder), decoder.state_dict(), len(decoder.layers)))
            return family, values, None
        except LookupError as error:
            reasons[family.model_type] = error
    if wanted:
        rule = f"does not describe this model ({reasons[wanted]})"
        raise ConfigError("--family", wanted, rule, "Leave --family out to detect one, or our own")
    closest = next(
        (name for name, reason in reasons.items() if isinstance(reason, UnlikeError)), candidates[0].model_type
    )
    return OWN, OWN.config(decoder), f"not {closest}: {reasons[closest]}"


def outgoing(
    family: Family, decoder: Decoder, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Outgoing]:
    """Their tensors by name, each made from ours when it is written."""
    wanted: dict[str, list[Link]] = {}
    ours = {name: tensors[name] for name in decoder.state_dict()}
    for link in links(family.rows(decoder), ours, len(decoder.layers)):
        wanted.setdefault(link.theirs, []).append(link)
    kept = {name for name, _ in decoder.named_buffers()}
    found = {}
    for name, group in wanted.items():
        first = tensors[group[0].ours]
        target = first.dtype if dtype is None or group[0].ours in kept else dtype
        shape = group[0].shape(first)
        found[name] = Outgoing(torch.Size(shape).numel() * target.itemsize, _maker(group, tensors, shape, target))
    return found


def _maker(group: list[Link], tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    def make() -> Tensor:
        theirs = torch.empty(shape, dtype=dtype)
        for link in group:
            link.row.form.view(theirs).copy_(link.part(tensors[link.ours]))
        return theirs

    return make


def _ids(source: Source) -> dict[str, Any]:
    """Special tokens, from the tokenizer of the run or from the original model."""
    if source.tokenizer is not None:
        return {**dict.fromkeys(IDS), **tokenizer.special(source.tokenizer).ids()}
    config = source.origin.get("config", {})
    return {key: config[key] for key in IDS if key in config} or dict.fromkeys(IDS)


def _generation(folder: Path, ids: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the original one, completed with missing ids."""
    written = companions.read(folder)
    found = companions.values(written, companions.GENERATION) or {"_from_model_config": True}
    ends = [*_listed(found.get("eos_token_id")), *_listed(ids.get("eos_token_id"))]
    together = list(dict.fromkeys(ends))
    return {**ids, **found, "eos_token_id": together[0] if len(together) == 1 else together or None}


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]

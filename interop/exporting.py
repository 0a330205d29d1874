"""From a model of ours to a folder that ``transformers`` and vLLM load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.compose import compose
from blocks.decoder import Decoder
from interop import tokenizer
from interop.families.catalogue import FAMILIES, WRITTEN
from interop.family import Family, UnlikeError
from interop.folder import dump_json, whole
from interop.importing import TOKENIZER_FILES
from interop.names import Link, links
from interop.own import OWN
from interop.shards import Outgoing, write_shards
from interop.source import Source, open_source
from registry import ConfigError, did_you_mean

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_folder(
    path: Path,
    out: Path,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = 5 * 10**9,
) -> tuple[str, str | None]:
    """Export a model.

    Args:
        path: a run's folder, a checkpoint of training, or an imported folder
        out: folder to be made; must not exist, or be empty
        family: the model_type to export as; None finds one
        dtype: of the parameters; None keeps what is stored
        max_bytes: of one shard

    Returns:
        the model_type written, and, if that is our own, why no other fits

    Raises:
        ConfigError: the source is damaged, or is not of the family asked for; nothing has been written
    """
    source = open_source(path)
    decoder = compose(source.model, device="meta")
    found, values, why = recognise(decoder, family, source.origin)
    ids = _ids(source)
    with whole(out) as folder:
        tensors = outgoing(found, decoder, source.tensors, dtype)
        write_shards(folder, tensors, max_bytes)
        kept = dtype or source.tensors["embedding.weight"].dtype
        dump_json(folder / "config.json", {**values, **ids, "dtype": str(kept).removeprefix("torch.")})
        dump_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
        _write_tokenizer(source, folder)
    return found.model_type, why


def recognise(
    decoder: Decoder, wanted: str | None, origin: Mapping[str, Any]
) -> tuple[Family, dict[str, Any], str | None]:
    """The family of a decoder and its config.json; our own family, and the reason, when no other describes it.

    Args:
        decoder: on the meta device
        wanted: a model_type that the user insists on
        origin: what the model was imported from; tried first

    Raises:
        ConfigError: it is not of the family that was asked for
    """
    known = {**FAMILIES, OWN.model_type: OWN}
    if wanted is not None and wanted not in known:
        raise ConfigError("--family", wanted, "is no family that is known here", did_you_mean(wanted, known))
    first = known.get(str(origin.get("model_type")))
    candidates = [first, *WRITTEN] if first else [*WRITTEN]
    if wanted:
        candidates = [family for family in (*WRITTEN, OWN) if family.model_type == wanted]
    reasons: dict[str, LookupError] = {}
    for family in candidates:
        try:
            values = family.config(decoder)
            list(links(family.names, decoder.state_dict(), len(decoder.layers)))
            return family, values, None
        except LookupError as error:
            reasons[family.model_type] = error
    if wanted:
        rule = f"does not describe this model ({reasons[wanted]})"
        raise ConfigError("--family", wanted, rule, "Leave --family out: the nearest fitting one is found, or our own")
    closest = next(
        (name for name, reason in reasons.items() if isinstance(reason, UnlikeError)), candidates[0].model_type
    )
    return OWN, OWN.config(decoder), f"not {closest}: {reasons[closest]}"


def outgoing(
    family: Family, decoder: Decoder, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Outgoing]:
    """Their tensors by name, each to be made from ours when it is written."""
    wanted: dict[str, list[Link]] = {}
    for link in links(family.names, {name: tensors[name] for name in decoder.state_dict()}, len(decoder.layers)):
        wanted.setdefault(link.theirs, []).append(link)
    kept = {name for name, _ in decoder.named_buffers()}
    found = {}
    for name, group in wanted.items():
        ours = tensors[group[0].ours]
        target = ours.dtype if dtype is None or group[0].ours in kept else dtype
        shape = group[0].shape(ours)
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
    """Special tokens: of the model it came from, or of the tokenizer it was trained with."""
    if source.tokenizer is not None:
        eos = tokenizer.eos_id(source.tokenizer)
        return {"bos_token_id": eos, "eos_token_id": eos}
    config = source.origin.get("config", {})
    return {key: config[key] for key in IDS if key in config} or dict.fromkeys(IDS[:2])


def _write_tokenizer(source: Source, folder: Path) -> None:
    if source.tokenizer is not None:
        tokenizer.write(source.tokenizer, folder)
    elif source.folder is not None:
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)

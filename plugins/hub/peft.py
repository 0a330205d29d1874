"""Adapters in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

An adapter of a model that a family of transformers describes is written under that family's names, so PEFT loads it on
the published model; any other under the names of the wrapper in transformers.py. Both are read. PEFT stores a
stack of E experts as one matrix: A as [E·r,in], B as [out,r·E] with the expert varying fastest. Where it adapts several
stacks of one module it nests them, the first innermost.

A setting of adapter_config.json is read, changes nothing (``IDLE``), has the one meaning that is supported (``ONLY``),
is switched off, or is refused by its name, whichever version of PEFT wrote it.

Not supported: DoRA, biases, ranks by pattern, starts that change the base (PiSSA, OLoRA, LoftQ, …), adapters of
embeddings, and matrices that a family fuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import dump_json, read_json, whole
from blockwright.blocks.checkpoint.read import raw_weights, read_checkpoint
from blockwright.blocks.checkpoint.shards import Shards, save
from blockwright.blocks.checkpoint.source import checkpoint_of
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.linear import A, B, adaptable, is_adapter
from blockwright.plugins.hub.exporting import recognise
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.names import Link, Row, links
from blockwright.plugins.hub.own import OWN
from blockwright.registry import ConfigError

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
SIDES = ((A, ".lora_A.weight"), (B, ".lora_B.weight"))
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "target_parameters")
PROVENANCE = "where it came from, and what for"
TENSORS = "the names of the tensors in the file say it"
TRAINING = "training only"
IDLE = {
    **dict.fromkeys(("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"), PROVENANCE),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), TENSORS),
    **dict.fromkeys(("inference_mode", "lora_dropout"), TRAINING),
    "fan_in_fan_out": "how the base stores its matrices; A and B are laid out alike",
    "eva_config": "of the start with eva, which draws A and keeps the base; other ranks are in rank_pattern",
    "megatron_core": "names a package, without megatron_config",
    "qalora_group_size": "of use_qalora, which is refused",
}
# Settings with meanings that leave the base and the update as they are.
ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # they draw A and B, and keep the base
}
OFF: tuple[Any, ...] = (None, False, [], {})
LARGEST = torch.finfo(torch.float32).max


def export_adapter(run: Path, out: Path, *, family: str | None = None) -> str:
    """Write the adapter of a run; arguments as in ``write_adapter``.

    Raises:
        ConfigError: it has none
    """
    start = checkpoint_of(run)
    checkpoint = {} if start is None else read_checkpoint(start)
    settings = checkpoint.get("hyper_parameters", {}).get("adapter")
    if settings is None:
        rule = "holds no adapter"
        raise ConfigError("RUN", str(run), rule, "Name a run of adapter=lora, or leave out --adapter")
    tensors = {name: t for name, t in raw_weights(checkpoint).items() if is_adapter(name)}
    decoder = compose(checkpoint["hyper_parameters"]["model"], device="meta")
    return write_adapter(tensors, settings, decoder, out, family=family)


def write_adapter(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    decoder: Decoder,
    out: Path,
    *,
    family: str | None = None,
    base: str | None = None,
) -> str:
    """Write an adapter.

    Args:
        tensors: A and B of each adapted parameter, by our names
        settings: ``rank`` and ``alpha``
        decoder: the base, on the meta device
        out: folder to create
        family: whose names to write, as in ``export_folder``; None: the model's own, where they fit
        base: what PEFT shall load the model from

    Returns:
        the model_type whose names were written

    Raises:
        ConfigError: the folder exists, or the family does not fit
    """
    adapted = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    found, _, _ = recognise(decoder, family, {})
    names = _names(found, decoder)
    if any(name not in names for name in adapted):
        found, names = OWN, _names(OWN, decoder)
    stacks = [name for name in adapted if tensors[name + A].ndim == 3]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [names[n].rpartition(".")[0] for n in adapted if n not in stacks],
        "target_parameters": [names[n] for n in stacks],
    }
    written = {}
    for name in adapted:
        for ours, theirs in SIDES:
            tensor = tensors[name + ours]
            flat = tensor if tensor.ndim == 2 else _flat(tensor, ours)
            written[PREFIX + _module(name, stacks, names) + theirs] = flat.contiguous()
    with whole(out) as folder:
        dump_json(folder / CONFIG, config)
        save(written, folder / WEIGHTS)
    return found.model_type


def read_adapter(folder: Path, decoder: Decoder) -> tuple[dict[str, Tensor], float]:
    """Read an adapter of PEFT.

    Args:
        decoder: the base, on the meta device, with or without adapters

    Returns:
        A and B of each adapted parameter, by our names; and the factor of the update

    Raises:
        ConfigError: it is no LoRA, has settings without counterpart here, or adapts what this model has not
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ConfigError("adapter.start", config.get("peft_type"), "must be a LoRA", "Train one with peft_type LORA")
    rank, scale = _settings(config, str(folder / CONFIG))
    shards = Shards(folder, WEIGHTS)
    left, found = dict(shards.read(shards.entries)), dict[str, Tensor]()
    targets = config.get("target_parameters") or ()
    base = compose(decoder.config, device="meta")
    for ours, key, stacked in list(_places(left.keys(), targets, base)):
        for side, theirs in SIDES:
            tensor = left.pop(key + theirs)
            if tensor.ndim != 2:
                rule = f"{key + theirs} is not a matrix"
                raise ConfigError(str(folder / WEIGHTS), tuple(tensor.shape), rule, "Write the adapter again")
            if (tensor.shape[0] if side == A else tensor.shape[1]) != rank * (stacked or 1):
                rule = f"{key + theirs} is not of rank {rank}, which {CONFIG} names"
                raise ConfigError(str(folder / WEIGHTS), tuple(tensor.shape), rule, "Write the adapter again")
            found[ours + side] = _stacked(tensor, side, stacked, rank) if stacked else tensor
    if left:
        rule = "adapts what this model does not have, or what is split otherwise here"
        raise ConfigError(str(folder / WEIGHTS), next(iter(left)), rule, "Start from an adapter of this model")
    return found, scale


def _settings(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """The rank, and the factor of the update.

    Raises:
        ConfigError: a setting is missing, wrong, or has an effect that is not supported
    """
    for key, value in config.items():
        allowed = (*OFF, *ONLY.get(key, ()))
        if key not in (*READ, *IDLE) and not any(value == v and type(value) is type(v) for v in allowed):
            known = ONLY.get(key, ())
            remedy = f"Train it with one of {', '.join(map(repr, known))}" if known else "Train it without this setting"
            raise ConfigError(f"{where}: {key}", value, "is not supported here, so its effect would be lost", remedy)
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_parameters")
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"{where}: r", rank, "must be a rank, 1 or more", "Write the adapter again")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= LARGEST:
        rule = "must be a finite positive number"
        raise ConfigError(f"{where}: lora_alpha", alpha, rule, "Write the adapter again")
    if config.get("use_rslora") not in (None, True, False):
        raise ConfigError(f"{where}: use_rslora", config["use_rslora"], "must be true or false", "Write it again")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ConfigError(f"{where}: target_parameters", targets, "must be a list of names", "Write it again")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _places(keys: Collection[str], targets: Collection[str], decoder: Decoder) -> Iterator[tuple[str, str, int]]:
    """(our parameter, their key without side, number of experts or 0) of each adapter in a file.

    Args:
        keys: in the file
        targets: ``target_parameters``, whole names or their ends
    """
    parameters, can = dict(decoder.named_parameters()), adaptable(decoder)
    for family in {family.model_type: family for family in (recognise(decoder, None, {})[0], OWN)}.values():
        names = _names(family, decoder)
        stacks = [n for n in can if parameters[n].ndim == 3 and n in names and _ends(names[n], targets)]
        for name in (n for n in can if n in names and (parameters[n].ndim == 2 or n in stacks)):
            key = PREFIX + _module(name, stacks, names)
            if key + SIDES[0][1] in keys and key + SIDES[1][1] in keys:
                yield name, key, len(parameters[name]) if name in stacks else 0


def _ends(name: str, targets: Collection[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _names(family: Family, decoder: Decoder) -> dict[str, str]:
    """Our parameter → theirs, for those that are whole and laid out alike on both sides."""
    found: dict[str, list[Link]] = {}
    for link in links(family.rows(decoder), decoder.state_dict(), len(decoder.layers)):
        found.setdefault(link.ours, []).append(link)
    alike = {name: group[0] for name, group in found.items() if len(group) == 1}
    return {n: at.theirs for n, at in alike.items() if at.row.form is Row.form and at.row.part is Row.part}


def _module(name: str, stacks: list[str], names: Mapping[str, str]) -> str:
    """Where PEFT keeps the adapter of a parameter; ``stacks`` are those that are adapted."""
    module = names[name].rpartition(".")[0]
    outside = [n for n in stacks if n.rpartition(".")[0] == name.rpartition(".")[0]]
    return module + ".base_layer" * (len(outside) - 1 - outside.index(name) if name in outside else 0)


def _flat(tensor: Tensor, side: str) -> Tensor:
    return tensor.flatten(0, 1) if side == A else tensor.permute(1, 2, 0).flatten(1)


def _stacked(tensor: Tensor, side: str, experts: int, rank: int) -> Tensor:
    if side == A:
        return tensor.unflatten(0, (experts, rank)).contiguous()
    return tensor.unflatten(1, (rank, experts)).permute(2, 0, 1).contiguous()

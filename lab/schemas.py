"""``blockwright schema [DIR]``: write JSON Schemas, by which an editor completes and checks presets, experiments, ….

They are made of the signatures of all blocks that are installed, plug-ins included, so write them again after an
installation. DIR defaults to ``.schema`` in the folder ``conf`` of your own. A file says which is its own in a comment
that editors with yaml-language-server read (VS Code's YAML extension, Neovim, Emacs, …):

    # yaml-language-server: $schema=../.schema/experiment.json
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from blockwright.blocks.compose import ModelConfig
from blockwright.lab.ablation import definition as ablation
from blockwright.lab.calibration import control
from blockwright.lab.ladder import definition as ladder
from blockwright.registry import ConfigError, catalogue, json_schema, presets, user_conf
from blockwright.registry.command import Parser, run_command
from blockwright.registry.folder import write_text
from blockwright.registry.json_schema import DRAFT, Blocks, Schema, any_of, mapping, of, told
from blockwright.training.checkpoints.resume import LAST
from blockwright.training.configuration import conf
from blockwright.training.configuration.instantiate import find_target, signature

FOLDER = ".schema"  # beside the groups; Hydra reads only *.yaml
OVERRIDES: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
ANYTHING: Schema = {}
_TYPES = {bool: "boolean", int: "number", float: "number", str: "string"}


def preset() -> Schema:
    """A whole model, or what differs from the one that it inherits."""
    blocks = Blocks()
    own = json_schema.dataclass(ModelConfig)
    needed = [key for key in own.pop("required") if key != "vocab_size"]  # that of the data, unless it is written
    inherits = told({"enum": presets.names()}, "a preset, which the rest of the file patches")
    properties = {"inherits": inherits, **own["properties"], **_of_layers(blocks)}
    alone = {"if": {"not": {"required": ["inherits"]}}, "then": {"required": needed}}
    return _document("preset", {**mapping(properties), **alone}, blocks)


def experiment() -> Schema:
    """A patch of the configuration of a run: a file with ``# @package _global_``."""
    blocks = Blocks(interpolates=True)
    model = {**json_schema.dataclass(ModelConfig)["properties"], "file": {"type": "string"}, **_of_layers(blocks)}
    default = OmegaConf.to_container(conf.composed([]), resolve=False)
    assert isinstance(default, dict)
    roots = {*catalogue.kinds(catalogue.ROOT), *catalogue.settings()}
    properties = {"defaults": _defaults(), "hydra": {"type": "object"}}
    for key, value in default.items():
        if key == "model":
            properties[key] = mapping({name: json_schema.interpolated(schema) for name, schema in model.items()})
        elif key in roots:
            properties[key] = blocks.node(str(key))
        else:
            properties[str(key)] = _of_group(str(key), value)
    rate = properties["optimizer"]["properties"]
    rate["lr"] = any_of([rate["lr"], {"const": LAST}])  # training/entry/parse.py
    return _document("experiment", mapping(properties), blocks)


def of_ablation() -> Schema:
    """The definition of an ablation."""
    return _document("ablation", _definition(ablation.Definition, ablation.FILES.keys))


def of_ladder() -> Schema:
    """The definition of a ladder: an ablation's arms, and its own keys."""
    own = _definition(ladder.Settings, ladder.OWN)["properties"]
    arms = _definition(ablation.Definition, ladder.OF_ABLATION)["properties"]
    sizes = {"sizes": {"anyOf": [{"type": "object"}, {"type": "array"}]}}
    return _document("ladder", mapping({**arms, **own, **sizes}))


def of_control() -> Schema:
    """A control of ``blockwright calibrate``."""
    return _document("control", _definition(control.Control, control.FILES.keys))


DOCUMENTS: dict[str, Callable[[], Schema]] = {  # each is a group of conf
    "preset": preset,
    "experiment": experiment,
    "ablation": of_ablation,
    "ladder": of_ladder,
    "control": of_control,
}


# --- parts ------------------------------------------------------------------------------------------------------------


def _document(name: str, schema: Schema, blocks: Blocks | None = None) -> Schema:
    return {"$schema": DRAFT, "title": name, **schema, "definitions": blocks.definitions if blocks else {}}


def _of_layers(blocks: Blocks) -> dict[str, Schema]:
    """The kinds of a model, and its keys that name kinds."""
    kinds = {kind: blocks.node(kind) for kind in catalogue.kinds()}
    slots = {kind: kinds[kind] for kind in catalogue.layer_kinds()}
    none: Schema = {"type": "null"}
    of_slot = {kind: any_of([{"type": "object", "additionalProperties": node}, none]) for kind, node in slots.items()}
    variants = mapping(of_slot)
    layers = {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "array"}]}
    override = mapping({"layers": layers, **slots}, ["layers"])
    layout = mapping({kind: any_of([{"type": "string"}, {"type": "array"}, none]) for kind in slots})
    return {
        **kinds,
        "variants": told(any_of([variants, none]), "slot → name → an alternative that patterns and overrides may name"),
        "layout": told(any_of([layout, none]), "slot → pattern over the depth, such as dense*1 ffn*"),
        "overrides": any_of([{"type": "array", "items": override}, none]),
    }


def _defaults() -> Schema:
    """The list of choices: ``override /data: mixture``."""
    chosen = {}
    for group in conf.groups():
        names: list[Any] = [*conf.options(group), *catalogue.names(group.rpartition("/")[2]), None]
        one = any_of([{"enum": list(dict.fromkeys(names))}, {"type": "string", "pattern": r"^of/|\$\{"}])
        chosen[f"^(override )?/?{group}(@.*)?$"] = any_of([one, {"type": "array", "items": one}])
    item = {"type": "object", "patternProperties": chosen, "additionalProperties": False}
    return {"type": "array", "items": {"anyOf": [{"type": "string"}, item]}}


def _of_group(group: str, value: Any) -> Schema:
    """What may be set below a key of the configuration, by the value that it has by default and its group's files."""
    if not isinstance(value, Mapping):
        known = [{"type": _TYPES[type(value)]}] if type(value) in _TYPES and "${" not in str(value) else []
        return any_of([*known, {"type": "null"}, json_schema.INTERPOLATION]) if known else ANYTHING
    written = [each for file in conf.files(group) if isinstance(each := yaml.safe_load(file.read_text()), dict)]
    if any("_target_" in each for each in written):
        keys = {key for each in written for key in each} - {"defaults", "_target_"}
        targets = dict.fromkeys(each["_target_"] for each in written if "_target_" in each)
        return _of_targets(targets, dict.fromkeys(keys, ANYTHING))
    named: dict[str, list[str]] = {}
    for each in written:
        for key, node in each.items():
            if isinstance(node, Mapping) and "_target_" in node:
                named.setdefault(key, []).append(node["_target_"])
    return mapping({key: any_of([_of_targets(each), {"type": "null"}]) for key, each in named.items()}, is_open=True)


def _of_targets(targets: Iterable[str], more: Mapping[str, Schema] | None = None) -> Schema:
    """The settings of one of several classes; open where one of them passes settings on, or is not installed."""
    found: dict[str, list[Schema]] = {}
    is_open = False
    for target in targets:
        try:
            parameters, hints = signature(find_target(target, "_target_"))
        except ConfigError:
            is_open = True
            continue
        is_open |= any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for key, p in parameters.items():
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                schema = of(hints[key]) if key in hints else ANYTHING
                found.setdefault(key, []).append(json_schema.interpolated(schema))
    return mapping(
        {"_target_": {"type": "string"}, **(more or {}), **{key: any_of(each) for key, each in found.items()}},
        is_open=is_open,
    )


def _definition(cls: type, keys: Sequence[str]) -> Schema:
    """A definition in the short forms that its file may have."""
    known = json_schema.dataclass(cls)["properties"]
    # An arm that says more than its overrides; keys of a match may stand beside them
    spec = json_schema.dataclass(ablation.ArmSpec)["properties"]
    match = json_schema.dataclass(ablation.Match)["properties"]
    arm = [mapping({**spec, **match})]
    short: dict[str, Schema] = {
        "tune": {"anyOf": [{"type": "integer"}, {"type": "object", "additionalProperties": {"type": "integer"}}]},
        "seeds": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
        "arms": {"type": "object", "additionalProperties": any_of([OVERRIDES, *arm, {"type": "null"}])},
        "sizes": {"type": "object"},
    }
    texts = {key: known[key].get("description", "") for key in keys}
    return mapping(
        {key: told(any_of([short[key], {"type": "null"}]), texts[key]) if key in short else known[key] for key in keys}
    )


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(command, arguments)


def command(arguments: Sequence[str]) -> None:
    """Write the documents, and say which line names one.

    Raises:
        ConfigError: wrong arguments
    """
    parser = Parser(prog="blockwright schema", description=__doc__)
    parser.add_argument("DIR", nargs="?", type=Path)
    given = parser.parse_args(arguments).DIR
    folder = given or (user_conf.folders() or [Path("conf")])[0] / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in DOCUMENTS.items():
        write_text(folder / f"{name}.json", json.dumps(make(), indent=1, ensure_ascii=False) + "\n")
        print(f"{folder / name}.json")
    print("\nThe comment by which an editor finds it, in conf/experiment/mine.yaml:")
    print(f"# yaml-language-server: $schema={given.resolve() if given else Path('..', FOLDER)}/experiment.json")


if __name__ == "__main__":
    raise SystemExit(main())

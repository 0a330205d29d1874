"""Convert Hydra's errors to ConfigErrors, and refuse what Hydra ignores silently."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright import registry
from blockwright.blocks.model_config import ModelConfig
from blockwright.registry import ConfigError, catalogue, did_you_mean, presets
from blockwright.registry.build import fixed
from blockwright.registry.catalogue import Entry
from blockwright.training.configuration.conf import composed, groups, of_blocks, options
from blockwright.training.configuration.parts import no_class
from blockwright.training.configuration.run import GROUPS

REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # raised by composing for a user's mistake
_EMPTY = re.compile(r"\+{0,2}([^=~@]+)=\s*\{\s*\}\s*")
_TYPES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "a string"}


def explain(error: BaseException, overrides: Sequence[str]) -> ConfigError:
    """A Hydra or OmegaConf exception → path, value, rule, remedy."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if isinstance(chain[-1], ConfigError):  # of a class that Hydra has built, such as a sweeper
        return chain[-1]
    text = "\n".join(str(e) for e in chain)
    for reading in READINGS:
        found = reading(error, text, overrides)
        if found:
            return found
    noise = ("full_key:", "object_type=", "To append to your")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(noise)]
    at_fault = next((o for o in overrides if o.partition("=")[0].lstrip("~+") in lines[0]), " ".join(overrides))
    rule = ": ".join(line.rstrip(".:") for line in lines[:2])
    return ConfigError("configuration", at_fault, rule, "Look at: blockwright train --help")


def _unreadable(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    if not isinstance(error, yaml.YAMLError):
        return None
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
    rule = f"is not YAML ({getattr(error, 'problem', None) or text.splitlines()[0]})"
    return ConfigError(where, "…", rule, "Fix that line; quote values that hold braces, colons or ${…} in {…}")


def _several(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    if (found := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'\s", text)) is None:
        return None
    key, values = found.groups()
    listed = "" if "/" in key else f". A list is written {key}=[{values}]"
    rule = "a run has one value, and several are for a sweep"
    return ConfigError(key, values, rule, f"Sweep over them: blockwright train -m {key}={values}{listed}")


def _unparsed(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    if not isinstance(error, OverrideParseException):
        return None
    rule = f"cannot be read as an override ({text.splitlines()[0]})"
    remedy = "Write key=value; what holds spaces, brackets, commas or ~ is quoted twice: 'key=\"a, b\"'"
    return ConfigError("command line", error.override, rule, remedy)


def _no_name(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    if not is_no_name(error):
        return None
    for override in overrides:
        group, _, value = override.partition("=")
        is_block = group in of_blocks()
        known = registry.names(group.rpartition("/")[2]) if is_block else options(group)
        if known and value not in known and not value.startswith("of/"):
            rule = f"a group must be set to the name of one of its {'blocks' if is_block else 'files'}"
            none = f"; or ~{group} for none" if is_block else ""
            return ConfigError(group, value, rule, did_you_mean(value, known) + none)
    return None


def is_no_name(error: BaseException) -> bool:
    """Whether the error is Hydra's for ``model=null`` or ``model=3``, which has no class of its own."""
    return isinstance(error, ValueError) and str(error).startswith("Config group override must be a string")


def _no_option(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if not found:
        return None
    group, _, option = found[1].rpartition("/")
    if group.endswith("/of"):  # model/<kind>/of/NAME
        kind = group.split("/")[1]
        rule, known = f"no preset of this name has a block of kind {kind}", [f"of/{n}" for n in presets.names(kind)]
        return ConfigError(f"model/{kind}", f"of/{option}", rule, did_you_mean(f"of/{option}", known))
    known = list((error.options if isinstance(error, MissingConfigException) else None) or options(group))
    if not known:
        return ConfigError(group or option, option, "there is no such group or file", "See: blockwright train --help")
    return ConfigError(group, option, f"is not an option of {group}", did_you_mean(option, known))


def _no_group(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text)
    if not found:
        return None
    group = found[1]
    value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == group), None)
    if group == "ablation":
        rule = "is a comparison of many runs, not part of one"
        return ConfigError(group, value, rule, f"Write: blockwright ablate {value}")
    if group == "preset":
        return ConfigError(group, value, "is the folder of presets; choose a model by name", f"Write model={value}")
    rule = "the composition selects nothing for this group, so there is nothing to replace"
    if group in of_blocks():
        return ConfigError(group, value, rule, f"Add it: +{group}={value}")
    return ConfigError(group, value, rule, did_you_mean(group, groups()))


def _there_already(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Could not append to config\. An item is already at '([^']+)'", text)
    if not found:
        return None
    override = next((o for o in overrides if o.startswith(f"+{found[1]}=")), f"+{found[1]}=…")
    rule = "+ adds a setting, but this one exists already"
    return ConfigError(found[1], override.partition("=")[2], rule, f"Leave out the +: {override[1:]}")


def _chosen_already(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Multiple values for ([^\s.]+)\. To override", text)
    if not found:
        return None
    value = next((o.partition("=")[2] for o in overrides if o.startswith(f"+{found[1]}=")), None)
    listed = next((o for o in overrides if re.match(r"[^.=]+=\[.*,", o)), None)
    if value is None and listed:
        group, _, given = listed.partition("=")
        rule = f"its options each choose {found[1]}, so they cannot be combined"
        return ConfigError(group, given, rule, f"Write one: {group}={given.strip('[]').split(',')[0]}")
    rule = "+ adds a group, but one of its options is chosen already"
    return ConfigError(found[1], value or "…", rule, f"Leave out the +: {found[1]}={value or '…'}")


def _unknown_key(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Key '([^']+)' (?:is not in struct|not in '([^']+)')", text)
    if not found:
        return None
    key, owner = found[1], found[2]
    where = re.search(r"full_key: (\S+)", text)
    path = where[1] if where else key
    if override := re.search(r"Could not override '([^']+)'", text):
        path = override[1]
    value = next((o.partition("=")[2] for o in overrides if o.lstrip("+").partition("=")[0] == path), None)
    if "/" in path:
        return ConfigError(path, value, "there is no such group", did_you_mean(path, groups()))
    parts = path.split(".")
    path = ".".join(parts[: parts.index(key) + 1]) if key in parts else path  # nothing below it exists either
    if len(parts) == 2 and key == "_target_" and parts[0] in catalogue.kinds(catalogue.ROOT):
        return no_class(parts[0], value)
    for block in _blocks(owner, parts[-2:-1]):
        if key in block.schema.fixed:
            return fixed(block, key, value, path.rpartition(".")[0])
    holder = owner.removesuffix("Config") + "'s parameters" if owner else path.rpartition(".")[0] or "the configuration"
    siblings = _parameters(owner, parts[-2:-1]) or _model_keys(path) or _siblings(path, overrides)
    file = re.search(r"In '([^']+)'", text)
    rule = f"there is no {key!r} in {holder}" + (f", set in {file[1]}.yaml" if file else "")
    remedy = did_you_mean(key, siblings, "See: blockwright train --cfg job")
    if file and (group := file[1].rpartition("/")[0]) in groups():
        remedy += f". Choose another {group}, or leave it out: ~{group}"
    if key in siblings:  # of every model, but not of what is selected, such as model=file
        remedy = f"Add it: +{path}={value}"
    elif path in (f"trainer.{group}" for group in GROUPS):
        remedy = f"Write {key}=NAME: the Trainer gets what that group builds"
    elif "." not in path and (below := _below(key)):
        remedy = f"Write {' or '.join(f'{each}={value}' for each in below[:3])}"
    elif "_target_" in siblings:  # the file need not name every argument of the class
        remedy += f". For an argument of its class that is not listed: +{path}={value}"
    return ConfigError(path, "…" if value is None else value, rule, remedy)


def _below(key: str) -> list[str]:
    """Where the default configuration has a key of this name, nearest to the root first."""

    def paths(node: Any, path: str) -> Iterator[str]:
        for name, inner in node.items() if isinstance(node, Mapping) else ():
            if name == key:
                yield f"{path}{name}"
            yield from paths(inner, f"{path}{name}.")

    return sorted(paths(OmegaConf.to_container(composed([]), resolve=False), ""), key=lambda path: path.count("."))


def _no_folder(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Additional config directory '(.+)' not found", text)
    remedy = "Name a folder with groups in it: DIR/preset/NAME.yaml is model=NAME"
    return ConfigError("--config-dir", found[1], "there is no such folder", remedy) if found else None


def _wrong_type(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text)
    if not found:
        return None
    where = re.search(r"full_key: (\S+)", text) or re.search(r"merging override ([^\s=]+)", text)
    path = where[1] if where else "configuration"
    rule = f"must be {_TYPES.get(found[2], found[2])}"
    return ConfigError(path, found[1], rule, f"Write {path}=<{_TYPES.get(found[2], found[2])}>")


def _null(error: BaseException, text: str, overrides: Sequence[str]) -> ConfigError | None:
    found = re.search(r"field '([^']+)' is not Optional", text)
    if not found:
        return None
    owner, _, key = found[1].rpartition(".")
    if key == "name" and (known := registry.names(owner.rpartition(".")[2])):
        return ConfigError(
            found[1],
            "null",
            "is the name of a registered block",
            f"Write {owner.replace('.', '/')}=<{'|'.join(known)}>",
        )
    return ConfigError(found[1], "null", "must have a value", f"Leave out {found[1]}=null")


READINGS = (
    *(_unreadable, _several, _unparsed, _no_name, _no_option, _no_group),
    *(_there_already, _chosen_already, _unknown_key, _wrong_type, _null, _no_folder),
)


def _parameters(owner: str | None, kind: Sequence[str]) -> list[str]:
    """The parameters of the block whose schema has this name, without composing again."""
    return [key for block in _blocks(owner, kind) for key in ("name", *block.schema.parameters)]


def _blocks(owner: str | None, kind: Sequence[str]) -> list[Entry]:
    """The blocks of a kind whose schema has this name."""
    blocks = [registry.lookup(k, name) for k in kind for name in registry.names(k)]
    return [block for block in blocks if block.schema.dataclass.__name__ == owner]


def _model_keys(path: str) -> list[str]:
    """The keys of the model itself, likewise."""
    return [f.name for f in fields(ModelConfig)] + registry.kinds() if path.rpartition(".")[0] == "model" else []


def _selections(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose options, which compose even when a value override does not."""
    return [o for o in overrides if "." not in o.partition("=")[0]]


def _siblings(path: str, overrides: Sequence[str]) -> list[str]:
    """Keys beside the last one of ``path``, in the composition of the selections."""
    for attempt in (_selections(overrides), []):
        try:
            node = OmegaConf.select(composed(attempt), path.rpartition(".")[0] or "")
        except (HydraException, OmegaConfBaseException):
            continue
        if isinstance(node, DictConfig):
            return [str(k) for k in node]
    return []


def refuse_empty(found: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse ``key={}`` for a mapping that is not empty: Hydra merges mappings, so it would change nothing.

    Args:
        found: the composed configuration
        overrides: in Hydra's grammar

    Raises:
        ConfigError
    """
    for override in overrides:
        if written := _EMPTY.fullmatch(override):
            there = OmegaConf.select(found, written[1])
            if isinstance(there, DictConfig) and len(there):
                rule = f"is merged with the existing mapping ({', '.join(map(str, there))}), so it would change nothing"
                raise ConfigError(written[1], "{}", rule, _instead_of_empty(written[1])) from None


def _instead_of_empty(path: str) -> str:
    """The remedy for replacing or removing a mapping."""
    group = path.replace(".", "/")
    if known := sorted({*options(group), *registry.names(path.rpartition(".")[2])}):
        return f"Choose another: {group}=<{'|'.join(known)}>"
    return f"To remove it write {path}=null, or change its keys one by one"

"""The configuration of a run from its overrides: conf/ composed, or one error message.

Hydra's errors become ConfigErrors, and what Hydra ignores silently is refused. Each of ``READINGS`` recognises a
sentence of Hydra or OmegaConf, and says what to write. Any other error is shown in their own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright import registry
from blockwright.blocks.compose import ModelConfig
from blockwright.registry import ConfigError, catalogue, did_you_mean, presets
from blockwright.registry.build import fixed
from blockwright.registry.catalogue import Entry
from blockwright.training.configuration.conf import composed, groups, of_blocks, options
from blockwright.training.configuration.parts import no_class
from blockwright.training.configuration.run import GROUPS

REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # raised by composing for a user's mistake
HELP = "See: blockwright train --help"
# Groups of comparisons → the command that runs one.
OF_MANY = {"ablation": "ablate", "ladder": "ladder", "control": "calibrate --only"}
NO_NAME = "Config group override must be a string"  # begins the sentence of a ValueError
NOISE = ("full_key:", "object_type=", "To append to your")
ADVICE = ("Either ", "Or ")
EMPTY = re.compile(r"\+{0,2}([^=~@]+)=\s*\{\s*\}\s*")
TYPES = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "String": "a string"}


def explain(error: BaseException, overrides: Sequence[str]) -> ConfigError:
    """A Hydra or OmegaConf exception → path, value, rule, remedy."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:  # OmegaConf's is itself, when traced
        chain.append(cause)
    if isinstance(chain[-1], ConfigError):  # of a class that Hydra has built, such as a sweeper
        return chain[-1]
    text = "\n".join(str(e) for e in chain)
    if isinstance(error, yaml.YAMLError):
        return _unreadable(error)
    for pattern, reading in READINGS.items():
        if (found := re.search(pattern, text)) and (refusal := reading(found, text, overrides)):
            return refusal
    if isinstance(error, OverrideParseException):
        remedy = "Write key=value; what holds spaces, brackets, commas or ~ is quoted twice: 'key=\"a, b\"'"
        rule = f"cannot be read as an override ({text.splitlines()[0]})"
        return ConfigError("command line", error.override, rule, remedy)
    return _in_its_own_words(text, overrides)


def _in_its_own_words(text: str, overrides: Sequence[str]) -> ConfigError:
    """Hydra's sentence, and what it advises."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(NOISE)]
    named = [o for o in overrides if o.partition("=")[0].lstrip("~+") in lines[0]]
    at_fault = max(named, key=lambda override: len(override.partition("=")[0]), default="")
    path, _, value = at_fault.lstrip("~+").partition("=")
    advice = [line for line in lines if line.startswith(ADVICE)]
    rule = ": ".join(line.rstrip(".:") for line in lines[:2] if line not in advice)
    return ConfigError(
        path or "configuration", value or at_fault or " ".join(overrides), rule, " ".join(advice) or HELP
    )


def is_no_name(error: BaseException) -> bool:
    """True for Hydra's error of ``model=null`` or ``model=3``, which has no class of its own."""
    return isinstance(error, ValueError) and str(error).startswith(NO_NAME)


def _value(path: str, overrides: Sequence[str]) -> str | None:
    """The value that an override gives to a path; None without one."""
    given = (o.partition("=") for o in overrides)
    return next((value for key, _, value in given if key.lstrip("+") == path), None)


def _known(group: str) -> list[str]:
    """The options of a group: those of files, and registered names."""
    return sorted({*options(group), *(registry.names(group.rpartition("/")[2]) if group in of_blocks() else ())})


def _unreadable(error: yaml.YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
    rule = f"is not YAML ({getattr(error, 'problem', None) or str(error).splitlines()[0]})"
    return ConfigError(where, "…", rule, "Fix that line; quote values that hold braces, colons or ${…} in {…}")


def _no_name(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError | None:
    for group, _, value in (override.partition("=") for override in overrides):
        if (known := _known(group)) and value not in known and not value.startswith("of/"):
            none = f"; or ~{group} for none" if group in of_blocks() and "/" in group else ""
            rule = "a group must be set to the name of one of its options"
            return ConfigError(group, value, rule, did_you_mean(value, known) + none)
    return None


def _several(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    key, values = found.groups()
    listed = "" if "/" in key else f". A list is written {key}=[{values}]"
    listed += "; to compare models untrained: blockwright diff, or match" if key.startswith("model") else ""
    rule = "a run has one value, and several are for a sweep"
    return ConfigError(key, values, rule, f"Sweep over them: blockwright train -m {key}={values}{listed}")


def _no_option(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    group, _, option = found[1].rpartition("/")
    if re.fullmatch("model/[^/]+/of", group):  # model/<kind>/of/NAME
        kind = group.split("/")[1]
        rule, presets_of = f"no preset of this name has a block of kind {kind}", presets.names(kind)
        return ConfigError(
            f"model/{kind}", f"of/{option}", rule, did_you_mean(f"of/{option}", [f"of/{n}" for n in presets_of])
        )
    if not (known := _known(group)):
        return ConfigError(group or option, option, "there is no such group or file", HELP)
    remedy = did_you_mean(option, known)
    if group not in of_blocks():
        remedy += (
            f". One of yours is conf/{'preset' if group == 'model' else group}/NAME.yaml, or that of --config-dir DIR"
        )
    return ConfigError(group, option, f"is not an option of {group}", remedy)


def _no_group(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    group = found[1]
    value = _value(group, overrides)
    if group in OF_MANY:
        rule = "is a comparison of many runs, not part of one"
        return ConfigError(group, value, rule, f"Write: blockwright {OF_MANY[group]} {value}")
    if group == "preset":
        return ConfigError(group, value, "is the folder of presets; choose a model by name", f"Write model={value}")
    rule = "the composition selects nothing for this group, so there is nothing to replace"
    remedy = f"Add it: +{group}={value}" if group in of_blocks() else did_you_mean(group, groups())
    return ConfigError(group, value, rule, remedy)


def _packaged(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    file, package = found.groups()
    rule = f"places its values below {package.rpartition('.')[0]}, since it does not say that they are of the root"
    return ConfigError(f"{file}.yaml", "…", rule, "Write as its first line: # @package _global_")


def _chosen_twice(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    path, value = found[1], _value(found[1], overrides)
    listed = next((o for o in overrides if re.match(r"[^.=]+=\[.*,", o)), None)
    if value is None and listed:
        group, _, given = listed.partition("=")
        rule = f"its options each choose {path}, so they cannot be combined"
        return ConfigError(group, given, rule, f"Write one: {group}={given.strip('[]').split(',')[0]}")
    if value is None:  # a file's own list
        remedy = f"Write in the defaults list of the file: - override /{path}: NAME"
        return ConfigError(path, found[2], "is chosen by a file, but there is a choice already", remedy)
    return ConfigError(path, value, "+ adds it, but there is one already", f"Leave out the +: {path}={value}")


def _wrong_type(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    where = re.search(r"full_key: (\S+)", text) or re.search(r"merging override ([^\s=]+)", text)
    path, kind = where[1] if where else "configuration", TYPES.get(found[2], found[2])
    return ConfigError(path, found[1], f"must be {kind}", f"Write {path}=<{kind}>")


def _null(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    owner, _, key = found[1].rpartition(".")
    known = registry.names(owner.rpartition(".")[2]) if key == "name" else []
    remedy = f"Write {owner.replace('.', '/')}=<{'|'.join(known)}>" if known else f"Leave out {found[1]}=null"
    return ConfigError(found[1], "null", "must have a value", remedy)


def _unknown_key(found: re.Match[str], text: str, overrides: Sequence[str]) -> ConfigError:
    key, owner = found[1], found[2]
    where = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    path = where[1] if where else key
    value = _value(path, overrides)
    if "/" in path:
        return ConfigError(path, value, "there is no such group", did_you_mean(path, groups()))
    parts = path.split(".")
    path = ".".join(parts[: parts.index(key) + 1]) if key in parts else path  # nothing below it exists either
    if len(parts) == 2 and key == "_target_" and parts[0] in catalogue.kinds(catalogue.ROOT):
        return no_class(parts[0], value)
    blocks = _blocks(owner, parts[-2:-1])
    if holding := [block for block in blocks if key in block.schema.fixed]:
        return fixed(holding[0], key, value, path.rpartition(".")[0])
    holder = owner.removesuffix("Config") + "'s parameters" if owner else path.rpartition(".")[0] or "the configuration"
    file = re.search(r"In '([^']+)'", text)
    rule = f"there is no {key!r} in {holder}" + (f", set in {file[1]}.yaml" if file else "")
    siblings = [k for block in blocks for k in ("name", *block.schema.parameters)] or _siblings(path, overrides)
    remedy = _instead_of_key(path, key, value, siblings)
    if file and (group := file[1].rpartition("/")[0]) in groups():
        remedy += f". Choose another {group}, or leave it out: ~{group}"
    return ConfigError(path, "…" if value is None else value, rule, remedy)


def _instead_of_key(path: str, key: str, value: str | None, siblings: Sequence[str]) -> str:
    """The remedy for a key that does not exist next to its siblings."""
    if key in siblings:  # of every model, but not of what is selected, such as model=file
        return f"Add it: +{path}={value}"
    if path in (f"trainer.{group}" for group in GROUPS):
        return f"Write {key}=NAME: the Trainer gets what that group builds"
    if "." not in path and (below := _below(key)):
        return f"Write {' or '.join(f'{each}={value}' for each in below[:3])}"
    remedy = did_you_mean(key, siblings, "See: blockwright train --cfg job")
    if "_target_" in siblings:  # the file need not name every argument of the class
        remedy += f". For an argument of its class that is not listed: +{path}={value}"
    return remedy


READINGS = {
    rf"^{NO_NAME}": _no_name,
    r"Ambiguous value for argument '([^=]+)=(.*?)'\s": _several,
    r"Could not (?:find|load) '([^']+)'": _no_option,
    r"Could not override '([^']+)'\.\s*No match in the defaults list": _no_group,
    r"Multiple values for ([^\s.]+)\. To override a value use '(?:override )?[^:']*:? ?([^']*)": _chosen_twice,
    r"In '([^']+)': Could not override '[^'@]+@([^']+)'": _packaged,
    r"Key '([^']+)' (?:is not in struct|not in '([^']+)')": _unknown_key,
    r"Value '(.*)' of type '\w+' could not be converted to (\w+)": _wrong_type,
    r"field '([^']+)' is not Optional": _null,
}


def _below(key: str) -> list[str]:
    """Where the default configuration has a key of this name, nearest to the root first."""

    def paths(node: Any, path: str) -> Iterator[str]:
        for name, inner in node.items() if isinstance(node, Mapping) else ():
            if name == key:
                yield f"{path}{name}"
            yield from paths(inner, f"{path}{name}.")

    return sorted(paths(OmegaConf.to_container(composed([]), resolve=False), ""), key=lambda path: path.count("."))


def _blocks(owner: str | None, kind: Sequence[str]) -> list[Entry]:
    """The blocks of a kind whose schema has this name."""
    blocks = [registry.lookup(k, name) for k in kind for name in registry.names(k)]
    return [block for block in blocks if block.schema.dataclass.__name__ == owner]


def _siblings(path: str, overrides: Sequence[str]) -> list[str]:
    """Keys next to the last one of ``path``, in the composition of the overrides that choose options."""
    holder = path.rpartition(".")[0]
    if holder == "model":
        return [f.name for f in fields(ModelConfig)] + registry.kinds()
    for attempt in ([o for o in overrides if "." not in o.partition("=")[0]], []):  # they compose even if a value fails
        try:
            node = OmegaConf.select(composed(attempt), holder)
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
        if written := EMPTY.fullmatch(override):
            there = OmegaConf.select(found, written[1])
            if isinstance(there, DictConfig) and len(there):
                rule = f"is merged with the existing mapping ({', '.join(map(str, there))}), so it would change nothing"
                remedy = f"To remove it write {written[1]}=null, or change its keys one by one"
                if known := _known(group := written[1].replace(".", "/")):
                    remedy = f"Choose another: {group}=<{'|'.join(known)}>"
                raise ConfigError(written[1], "{}", rule, remedy) from None


def compose_config(overrides: Sequence[str], *, output_dir: str | None = None) -> DictConfig:
    """The configuration that ``blockwright train OVERRIDES`` would run.

    Args:
        overrides: in Hydra's grammar
        output_dir: value of ``paths.output_dir``, since Hydra has no run directory here

    Raises:
        ConfigError: the overrides cannot be composed
    """
    extra = [f"paths.output_dir={output_dir}"] if output_dir else []
    found = _composed([*extra, *overrides], overrides, with_hydra=False)
    refuse_empty(found, overrides)
    return found


def compose_with_hydra(overrides: Sequence[str]) -> DictConfig:
    """The same with Hydra's own configuration, in ``hydra``; raises as ``compose_config``."""
    return _composed(overrides, overrides, with_hydra=True)


def _composed(overrides: Sequence[str], known: Sequence[str], with_hydra: bool) -> DictConfig:
    try:
        return composed(overrides, with_hydra)
    except REFUSALS as error:
        raise explain(error, known) from None
    except ValueError as error:
        if is_no_name(error):
            raise explain(error, known) from None
        raise

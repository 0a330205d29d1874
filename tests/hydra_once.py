"""Hydra that reads each text of YAML, parses each override, and composes each choice of options, only once.

Tests compose a configuration some thousand times, nearly always of the same files and options: to read, parse and
merge them again is most of the time. What Hydra makes of them stays Hydra's; values on the command line are applied
each time.
"""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import _utils, base, grammar_parser

ROOT = Path(__file__).resolve().parent.parent
Key = tuple[Any, ...]


class Listed(list[Any]):
    """The parts of a configuration in their order, with what they depend on."""

    key: Key | None = None


def install() -> None:
    """Replace functions of Hydra and OmegaConf, for this process."""
    read, parse, choices = yaml.load, OverridesParser.parse_rule, defaults_list._create_interpolation_map
    texts: dict[str, Any] = {}
    parsed: dict[tuple[str, str], Any] = {}

    def read_once(file: Any, Loader: Any) -> Any:
        if Loader.__name__ != "OmegaConfLoader":
            return read(file, Loader=Loader)
        text = file if isinstance(file, str) else file.read()
        if text not in texts:
            if text is not file:
                file.seek(0)  # an error names the file
            texts[text] = read(file, Loader=Loader)
        return copy.deepcopy(texts[text])

    def parse_once(self: OverridesParser, text: str, rule: str) -> Any:
        if (text, rule) not in parsed:
            parsed[text, rule] = parse(self, text, rule)
        return copy.copy(parsed[text, rule])

    def choices_if_needed(overrides: Any, defaults: Any, self_added: bool) -> Any:
        """The choices that interpolations in a defaults list may name; made only for a list with one."""
        return choices(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None

    yaml.load = read_once
    OverridesParser.parse_rule = parse_once  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = choices_if_needed
    _read_mode_if_set()
    _remember_files()
    _remember_choices()
    _utils.parse = base.parse = functools.cache(grammar_parser.parse)  # type: ignore[attr-defined] # trees are only read


def _read_mode_if_set() -> None:
    """Hydra composes all of a command twice, first to read ``hydra.mode``, which few options set."""
    compose_for_mode = Hydra.get_mode

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        setting = any(
            word in override for override in overrides for word in ("hydra.mode", "hparams_search", "experiment")
        )
        return compose_for_mode(self, config_name, overrides) if setting else None

    Hydra.get_mode = mode  # type: ignore[method-assign]


def _remember_files() -> None:
    """A file is read and split into its defaults and its values once, for every choice that it is part of."""
    load = ConfigRepository.load_config
    loaded: dict[Key, bytes] = {}

    def load_once(self: Any, config_path: str) -> Any:
        known, state = getattr(self, "state", (None, None))
        if known is not self.sources:  # new, or with those that hydra.searchpath adds
            state = _state(self)
            self.state = (self.sources, state)
        key = (state, config_path)
        if key in loaded:
            return pickle.loads(loaded[key])
        found = load(self, config_path)
        if state is not None and found is not None and found.path.startswith(("file://", "pkg://")):
            loaded[key] = pickle.dumps(found)
        return found

    ConfigRepository.load_config = load_once  # type: ignore[method-assign]


def _remember_choices() -> None:
    """What the options of groups compose to depends on them alone, so it is made once for each choice of them."""
    list_parts, merge_parts = (
        config_loader_impl.create_defaults_list,
        ConfigLoaderImpl._compose_config_from_defaults_list,
    )
    lists: dict[Key, Any] = {}
    merged: dict[Key, bytes] = {}

    def list_once(
        repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
    ) -> Any:
        values = [o for o in overrides_list if not o.is_sweep_override() and _is_value(repo, o)]
        choices = [o.input_line for o in overrides_list if o not in values]
        state = _state(repo)
        key = None if state is None else (state, config_name, prepend_hydra, skip_missing, *choices)
        if key is None or key not in lists:
            found = list_parts(repo, config_name, overrides_list, prepend_hydra, skip_missing)
            if key is None:
                return found
            lists[key] = found
        found = copy.copy(lists[key])
        found.config_overrides, found.defaults = values, Listed(found.defaults)
        found.defaults.key = key
        return found

    def merge_once(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
        key = getattr(defaults, "key", None)
        if key is None:
            return merge_parts(self, defaults, repo)
        if key not in merged:
            merged[key] = pickle.dumps(merge_parts(self, defaults, repo))
        return pickle.loads(merged[key])

    config_loader_impl.create_defaults_list = list_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once  # type: ignore[method-assign]


def _is_value(repo: Any, override: Override) -> bool:
    """Whether an override sets a value and chooses no option, by Hydra's rule."""
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)


def _state(repo: Any) -> Key | None:
    """What options there are; None where files or classes may be those of a test, which could change them."""
    from blockwright.registry import catalogue, index, presets, user_conf

    sources: Sequence[Any] = repo.get_sources()
    files = [Path(source.path) for source in sources if source.scheme() == "file"]
    declared = index.index().blocks
    registered = [(kind, name) for kind, found in catalogue._entries.items() for name in found]
    if user_conf.folders() or not all(file.resolve().is_relative_to(ROOT) for file in files):
        return None
    if any(name not in declared.get(kind, {}) for kind, name in registered):
        return None
    names = tuple((kind, name) for kind, found in declared.items() for name in found)
    paths = tuple((source.provider, source.path) for source in sources)
    return paths, tuple(sys.path), presets.BUILTIN, names

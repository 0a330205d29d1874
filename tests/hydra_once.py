"""Hydra that reads each text of YAML, parses each override and interpolation, and composes a command, only once.

Tests compose a configuration a thousand times, nearly always of the same files and overrides: to read and parse them
again is half of the time. What Hydra makes of them stays Hydra's.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import yaml
from hydra._internal import defaults_list
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import _utils, base, grammar_parser


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

    compose_for_mode = Hydra.get_mode

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Hydra composes all of a command twice, first to read ``hydra.mode``, which few options set."""
        setting = any(
            word in override for override in overrides for word in ("hydra.mode", "hparams_search", "experiment")
        )
        return compose_for_mode(self, config_name, overrides) if setting else None

    Hydra.get_mode = mode  # type: ignore[method-assign]
    yaml.load = read_once
    OverridesParser.parse_rule = parse_once  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = choices_if_needed
    _utils.parse = base.parse = functools.cache(grammar_parser.parse)  # type: ignore[attr-defined] # trees are only read

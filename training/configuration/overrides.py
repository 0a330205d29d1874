"""The two command lines: which one this is, and what of Hydra's is passed to another process."""

from __future__ import annotations

CONFIG_FLAGS = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")
SUBCOMMANDS = ("fit", "validate", "test", "predict")  # of Lightning CLI, as the first word


def is_lightning_cli(arguments: list[str]) -> bool:
    """Whether settings are written ``--KEY VALUE``, and not ``KEY=VALUE``."""
    return bool(arguments) and arguments[0] in SUBCOMMANDS


def config_flags(arguments: list[str]) -> list[str]:
    """Hydra's options that locate the configuration."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        if argument in CONFIG_FLAGS:
            found += arguments[i : i + 2]
        elif argument.startswith(tuple(f"{flag}=" for flag in CONFIG_FLAGS)):
            found.append(argument)
    return found


def kept(overrides: list[str]) -> list[str]:
    """Overrides of Hydra's own configuration that a job needs when it runs alone."""
    return [o for o in overrides if o.lstrip("+").startswith("hydra.searchpath")]

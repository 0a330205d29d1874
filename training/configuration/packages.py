"""Refuse the callbacks and loggers of conf/ whose extras are not installed, before importing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.registry import ConfigError
from blockwright.registry.extras import has_package

NEEDS = {  # class → extra, packages of which it needs one
    "lightning.pytorch.loggers.TensorBoardLogger": ("tensorboard", ("tensorboard", "tensorboardX")),
    "lightning.pytorch.loggers.WandbLogger": ("wandb", ("wandb",)),
    "lightning.pytorch.loggers.MLFlowLogger": ("mlflow", ("mlflow", "mlflow_skinny")),
}


def check(plain: Mapping[str, Any]) -> None:
    """Refuse callbacks and loggers without their packages, in one message.

    Args:
        plain: a configuration

    Raises:
        ConfigError: with the extras to install
    """
    lacking: dict[str, tuple[str, str, str]] = {}
    for part in ("callbacks", "logger"):
        for name, node in plain[part].items():
            target = node.get("_target_") if isinstance(node, Mapping) else None
            extra, packages = NEEDS.get(str(target), ("", ()))
            if extra and not any(map(has_package, packages)):
                lacking[f"{part}.{name}"] = (str(target), extra, packages[0])
    if lacking:
        targets, extras, packages = zip(*lacking.values(), strict=True)
        rule = f"needs a package that is not installed ({', '.join(packages)})"
        leave = " ".join(f"{path}=null" for path in lacking)
        remedy = f"pip install 'blockwright[{','.join(extras)}]', or leave it out: {leave}"
        raise ConfigError(" and ".join(lacking), ", ".join(targets), rule, remedy)

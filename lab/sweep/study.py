"""The Optuna study of a search: its storage, and opening it from the search and its trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from blockwright.registry import ConfigError

if TYPE_CHECKING:
    import optuna

BUSY_S = 60  # maximum wait of a trial while another writes
FILE = "study.db"


def open_study(sweep: Path, plan: Mapping[str, Any], checked: bool = False, **settings: Any) -> optuna.Study:
    """Open or create the study of a search.

    Args:
        sweep: folder of the search
        plan: of the search; its ``study`` is {"name", "storage"}, a null storage is ``study.db`` in the folder
        checked: whether its tables are known to be of this version of Optuna
        settings: sampler, pruner

    Raises:
        ConfigError: the storage cannot be opened
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    node = OmegaConf.create({"storage": plan["study"]["storage"]})  # may name a variable of the environment
    asked = OmegaConf.to_container(node, resolve=True)["storage"]  # type: ignore[index,call-overload]
    url = asked or f"sqlite:///{sweep.resolve() / FILE}"
    busy = {"connect_args": {"timeout": BUSY_S}} if str(url).startswith("sqlite") else {}
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=busy, skip_compatibility_check=checked)
        return optuna.create_study(
            study_name=plan["study"]["name"],
            storage=storage,
            direction=plan["direction"],
            load_if_exists=True,
            **settings,
        )
    except Exception as error:  # SQLAlchemy, its drivers, alembic and Optuna have no common base class
        rule = f"cannot be opened ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        remedy = "Leave it out for a file in the sweep's folder, or correct the URL"
        if "upgrade" in str(error):  # written by an older Optuna
            remedy = f"It was written by an older Optuna: optuna storage upgrade --storage {asked or url}"
        raise ConfigError("hydra.sweeper.storage", asked or FILE, rule, remedy) from error

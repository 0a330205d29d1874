"""``blockwright train``: Hydra on KEY=VALUE overrides, or Lightning CLI; every user mistake ends in one message."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from typing import IO, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore

from blockwright.registry import REFUSED, ConfigError, user_conf
from blockwright.registry.errors import refusal_of_full, refused_path
from blockwright.registry.printing import Outlived
from blockwright.training.configuration.composing import REFUSALS, explain, is_no_name
from blockwright.training.configuration.conf import CONF, is_lightning_cli
from blockwright.training.entry.hydra_job import hydra_job
from blockwright.training.entry.ranks import is_lost_peer, leave_no_folder
from blockwright.training.processes import environment, is_out_of_time, queue_again
from blockwright.training.result import DIVERGED, PREEMPTED, Diverged, Interrupted, Pruned, refuse, stoppable

NO_STRING = re.compile(r"|null|~|true|false|[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def main() -> None:
    """Run, and turn every mistake of the user into one message and an exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing its own message, whatever is set
    # Hydra copies the whole store, though it only reads it, for each of the 200 groups that --help lists: 0.6 CPU-s of
    # 2.9, where help may take 3 (tests/test_startup.py). What the store hands out is a copy in any case.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    arguments = sys.argv[1:]
    try:
        sys.argv[1:] = arguments = user_conf.taken(arguments)
        with stoppable(), contextlib.redirect_stdout(cast(IO[str], Outlived(sys.stdout))):  # files have it all
            if is_lightning_cli(arguments):
                from blockwright.training.entry import cli

                cli.main(arguments)
            else:
                check_options(arguments)
                check_folders(arguments)
                leave_no_folder()
                hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(hydra_job)()
    except Interrupted as stop:
        if stop.checkpoint is None and is_out_of_time(stop.signum):  # during training its callback has asked
            queue_again()
        print(f"\n{stop}. {_how_to_resume(stop, arguments)}", flush=True)
        sys.exit(PREEMPTED)
    except Pruned:  # another rank of a trial, whose first one reports it
        sys.exit(0)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(DIVERGED)
    except SystemExit as end:  # parse errors are refused like others
        sys.exit(REFUSED if end.code == 2 else end.code)
    except Exception as error:
        if environment() is not None and is_lost_peer(error):
            print(f"error: another process of the run is lost ({error}). Resume from the last checkpoint", flush=True)
            sys.stdout.flush()
            os._exit(PREEMPTED)  # the process group would wait for the lost one
        refusal = refusal_of(error, arguments)
        if refusal is None:
            raise
        refuse(refusal)


def check_options(arguments: list[str]) -> None:
    """Refuse in one message what Hydra's parser would answer with its usage.

    Raises:
        ConfigError: an option that Hydra does not have, or a value that it does not take
    """

    def fail(message: str) -> NoReturn:
        remedy = "See: blockwright train --help"
        if found := re.match(r"unrecognized arguments: --([\w./@]+)", message):
            remedy = f"Settings have no dashes: {found[1]}=VALUE"
        raise ConfigError("command line", shlex.join(arguments), message, remedy)

    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    parser.parse_args(arguments)


def check_folders(arguments: list[str]) -> None:
    """Refuse a folder whose name YAML takes for a number or the like, before Hydra makes it.

    Raises:
        ConfigError: one of ``paths`` is no string
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.startswith("paths.") and NO_STRING.fullmatch(value):
            remedy = f"Write {key}=./{value}" if value not in ("", "null", "~") else f"Write {key}=FOLDER"
            raise ConfigError(key, value, "must be the name of a folder, and is read as no string", remedy)


def refusal_of(error: Exception, arguments: list[str]) -> ConfigError | None:
    """The ConfigError for an exception that is a user's mistake; None for other exceptions."""
    if isinstance(error, ConfigError):
        return error
    if (full := refusal_of_full(error)) is not None:
        return full
    if isinstance(error, REFUSALS) or is_no_name(error):
        return explain(error, [a for a in arguments if not a.startswith("-")])
    remedy = "Name a path of yours: hydra.run.dir=DIR, paths.log_dir=DIR, or what you set to this path"
    if (refusal := refused_path(error, remedy)) is not None:
        return refusal
    if type(error).__name__ == "MisconfigurationException":  # Lightning's error
        return ConfigError(
            "trainer", "…", str(error), "Check trainer, callbacks and logger: blockwright train --cfg job"
        )
    if isinstance(error, ValueError) and "`val_check_interval`" in str(error):  # Lightning knows the epoch's length
        remedy = "Write fewer steps, or trainer.check_val_every_n_epoch=null, which counts steps across epochs"
        return ConfigError("trainer.val_check_interval", "…", str(error).strip().partition(". ")[0], remedy)
    if isinstance(error, RuntimeError) and (
        found := re.match(r"Early stopping conditioned on metric `([^`]+)`", str(error))
    ):
        remedy = "Name one that is: callbacks.early_stopping.monitor=val/loss"
        return ConfigError("callbacks.early_stopping.monitor", found[1], "no such value was logged", remedy)
    return None


def _how_to_resume(stop: Interrupted, arguments: list[str]) -> str:
    if stop.sweep is not None:
        return f"Resume with: {shlex.join(['blockwright', 'sweep', 'resume', str(stop.sweep)])}"
    if stop.checkpoint is None:
        return "No training was lost: start the same command again"
    option = "--ckpt_path=" if is_lightning_cli(arguments) else "ckpt_path="
    return f"Continue with the same command and {option}{stop.checkpoint}"

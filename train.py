"""The front door.

``python train.py KEY=VALUE …`` composes conf/ with Hydra; ``python train.py fit|validate|test|predict`` is Lightning
CLI on the same configuration.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

import registry
from registry import REFUSED, ConfigError
from registry.hydra import include_config_dir
from training.checkpoints.find import LAST
from training.checkpoints.places import place_of
from training.configuration import figures
from training.configuration.composing import CONF, REFUSALS, explain, is_no_name, refuse_empty
from training.configuration.secrets import hidden, read_from_environment
from training.entry import lean
from training.entry.preflight import preflight
from training.stops import DIVERGED, PREEMPTED, Diverged, Interrupted, Pruned, stoppable

SUBCOMMANDS = ("fit", "validate", "test", "predict")
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_refusals: list[ConfigError] = []


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_main(cfg: DictConfig) -> float | None:
    """One job. In a sweep a failure becomes a row of the table and the worst possible value, not the end."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    directory = Path(HydraConfig.get().runtime.output_dir)
    value, figures = _worst(), None
    try:
        return _job(cfg, directory, sweeping)
    except Interrupted:
        from lab.sweep.callback import release

        release(directory)
        raise
    except ConfigError as error:
        if not sweeping:
            _refusals.append(error)
            return None
        status, reason = "failed", str(error)
    except Diverged as error:
        if not sweeping:
            raise
        status, reason = "diverged", str(error)
    except Pruned as stop:
        if not sweeping:
            raise
        status, reason, value, figures = "pruned", str(stop), stop.value, {stop.monitor: stop.value}
    except Exception as error:
        if not sweeping:
            raise
        status, reason = "failed", f"{type(error).__name__}: {error}"
    from lab.sweep.table import record_failure

    record_failure(directory, reason, status, figures)
    return value


def _job(cfg: DictConfig, directory: Path, sweeping: bool) -> float | None:
    refuse_empty(cfg, _overrides())
    plain = preflight(cfg, compared=sweeping)
    if (note := figures.left_out(plain)) and not _is_child():
        print(note, file=sys.stderr)
    from training.configuration import config_tree
    from training.entry import cli
    from training.entry.run import run

    shown = hidden(plain, read_from_environment(cfg))
    if not _is_child():
        cli.export(shown, directory)
    config_tree.show(shown, directory, plain["extras"]["print_config"] and not _is_child())
    arguments = pin_children(directory, plain["ckpt_path"])
    before = {name: os.environ.get(name) for name in LAUNCHED}
    try:
        metrics = run(plain, shown)
    finally:
        reset_processes(before)
    if plain["trainer"].get("dry_run"):
        return 0.0
    last = place_of(plain).checkpoints / LAST
    if last.exists() and not _is_child():
        print(f"Continue: {_continuation(arguments, plain['trainer'].get('max_steps', -1), last)}")
    value = metrics.get(cfg.optimized_metric)
    if value is None:
        known = registry.did_you_mean(cfg.optimized_metric, metrics)
        missing = ConfigError("optimized_metric", cfg.optimized_metric, "no such value was logged", known)
        if sweeping:
            raise missing
        if cfg.optimized_metric not in (note or "") and not _is_child():  # what was trained counts all the same
            print(f"warning: {missing}", file=sys.stderr)
        return None
    return value if math.isfinite(value) else _worst()


def _overrides() -> list[str]:
    """The job's own, as they were written: ``${…}`` in one is the configuration's to resolve."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[return-value]


def _continuation(arguments: list[str], steps: int, checkpoint: Path) -> str:
    """The command that trains on from a finished run, for twice its steps."""
    kept = [o for o in arguments if not o.startswith(("ckpt_path=", "trainer.max_steps="))]
    longer = [f"trainer.max_steps={2 * steps}"] if steps > 0 else []
    return shlex.join(["python", "train.py", *kept, *longer, f"ckpt_path={checkpoint}"])


def _worst() -> float:
    """What a sweeper is told of a job that failed or diverged; some cannot bear a NaN."""
    direction = HydraConfig.get().sweeper.get("direction", "minimize")
    return -math.inf if "maximize" in str(direction) else math.inf


def pin_children(directory: Path, checkpoint: str | None = None) -> list[str]:
    """Make Lightning's child processes repeat this job and nothing else.

    Its launcher runs ``sys.argv`` again for every other rank. In a sweep that would be the whole sweep, with a
    sampler's ranks meeting at different trials. So ``sys.argv`` becomes this job's own overrides, one run and no sweep
    even where an experiment's file asks for one, Hydra's run directory the job's, and the checkpoint to resume from
    the one that was found here, if any: they do not search.

    Returns:
        what a command of this job alone takes: where its configuration is, and its overrides
    """
    from lab.sweep.callback import config_flags, kept
    from lab.sweep.plan import quoted

    config = HydraConfig.get()
    own = _overrides()
    where = [*config_flags(sys.argv[1:]), *kept(config.overrides.hydra)]
    found = ["auto_resume=false", *([f"ckpt_path={quoted(checkpoint)}"] if checkpoint else [])]
    program, main_module = sys.argv[0], sys.modules["__main__"]
    if main_module.__spec__ is not None and main_module.__file__ != __file__:
        # A job that joblib or submitit runs: theirs is the module that the launcher would start again.
        program, main_module.__spec__ = __file__, None
    sys.argv = [program, *where, "hydra.mode=RUN", *own, *found]
    with read_write(config):  # type: ignore[arg-type] # typed as its schema, it is a node
        config.run.dir = str(directory)
    return [*where, *own]


def reset_processes(before: dict[str, str | None]) -> None:
    """Leave no process group behind: the next job of a sweep makes its own.

    Args:
        before: what the variables that Lightning's launcher sets were before it did
    """
    from training.entry.run import leave_processes

    leave_processes()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _is_child() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0"


def leave_no_folder() -> None:
    """Under torchrun every rank composes for itself: but for the first, they leave no folder of a run.

    A folder that is named is the same for all, who look there for the checkpoint to resume from.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        sys.argv.append("hydra.output_subdir=null")
        if not any(argument.startswith("hydra.run.dir=") for argument in sys.argv):
            sys.argv.append(f"hydra.run.dir={tempfile.mkdtemp(prefix='blockwright-rank-')}")


def _refusal(error: Exception, arguments: list[str]) -> ConfigError | None:
    """What the user is told of an exception that is a mistake of theirs; None for any other exception."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, REFUSALS) or is_no_name(error):
        return explain(error, [a for a in arguments if not a.startswith("-")])
    if type(error).__name__ == "MisconfigurationException":  # Lightning's word for it
        return ConfigError(
            "trainer", "…", str(error), "Look at trainer, callbacks and logger: python train.py --cfg job"
        )
    if isinstance(error, ValueError) and "`val_check_interval`" in str(error):  # how long an epoch is, Lightning knows
        remedy = "Write fewer steps, or trainer.check_val_every_n_epoch=null, which counts steps across epochs"
        return ConfigError("trainer.val_check_interval", "…", str(error).strip().partition(". ")[0], remedy)
    if isinstance(error, RuntimeError) and (
        found := re.match(r"Early stopping conditioned on metric `([^`]+)`", str(error))
    ):
        remedy = "Name one that is: callbacks.early_stopping.monitor=val/loss"
        return ConfigError("callbacks.early_stopping.monitor", found[1], "no such value was logged", remedy)
    return None


def _how_to_go_on(stop: Interrupted, arguments: list[str]) -> str:
    from lab.sweep.callback import begun

    if begun:
        return f"Go on with: {shlex.join(['python', '-m', 'lab.sweep', 'resume', str(begun[0])])}"
    if stop.checkpoint is None:
        return "Nothing is lost that a checkpoint does not hold: start the same command again"
    option = "--ckpt_path=" if arguments[:1] and arguments[0] in SUBCOMMANDS else "ckpt_path="
    return f"Continue with the same command and {option}{stop.checkpoint}"


def main() -> None:
    """Run, and turn every mistake of the user's into one message and an exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises here instead of printing its own account
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined] # it hands out copies; --help needs 170
    lean.import_torchmetrics_as_needed()
    arguments = sys.argv[1:]
    try:
        with stoppable():
            registry.load()
            if arguments and arguments[0] in SUBCOMMANDS:
                from training.entry import cli

                cli.main(arguments)
            else:
                leave_no_folder()
                include_config_dir(arguments)
                hydra_main()
    except Interrupted as stop:
        print(f"\n{stop}. {_how_to_go_on(stop, arguments)}", flush=True)
        sys.exit(PREEMPTED)
    except Pruned:  # another rank of a trial, whose first one tells of it
        sys.exit(0)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(DIVERGED)
    except SystemExit as end:  # what cannot even be parsed is refused like anything else
        sys.exit(REFUSED if end.code == 2 else end.code)
    except Exception as error:
        refusal = _refusal(error, arguments)
        if refusal is None:
            raise
        _refusals.append(refusal)
    if _refusals:
        print(_refusals[0].render(), file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()

"""The front door.

``python train.py KEY=VALUE …`` composes conf/ with Hydra; ``python train.py fit|validate|test|predict`` is Lightning
CLI on the same configuration.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

import registry
from registry import ConfigError
from training.composition import CONF, REFUSALS, explain
from training.preflight import preflight

SUBCOMMANDS = ("fit", "validate", "test", "predict")
REFUSED, INTERRUPTED = 2, 128  # exit codes: a configuration that cannot be right; 128 + signal when stopped by one
_refusals: list[ConfigError] = []


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_main(cfg: DictConfig) -> float | None:
    """One job. In a sweep a failure becomes a row of the table and the worst possible value, not the end."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        return _job(cfg, directory)
    except ConfigError as error:
        if not sweeping:
            _refusals.append(error)
            return None
        reason = str(error)
    except Exception as error:
        if not sweeping or _is_interruption(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    from lab.sweep import record_failure

    record_failure(directory, reason)
    print(f"job failed: {reason}", file=sys.stderr)
    return _worst()


def _job(cfg: DictConfig, directory: Path) -> float:
    plain = preflight(cfg)
    from training import cli, config_tree
    from training.run import run

    cli.export(plain, directory)
    config_tree.show(plain, directory, plain["extras"]["print_config"] and not _is_child())
    arguments = pin_children(directory)
    try:
        metrics = run(plain)
    finally:
        reset_processes()
    last = directory / "checkpoints" / "last.ckpt"
    if last.exists() and not _is_child():
        print(f"Continue: {_continuation(arguments, plain['trainer'].get('max_steps', -1), last)}")
    value = metrics.get(cfg.optimized_metric)
    if value is None:
        known = registry.did_you_mean(cfg.optimized_metric, metrics)
        raise ConfigError("optimized_metric", cfg.optimized_metric, "no such value was logged", known)
    return value if math.isfinite(value) else _worst()


def _continuation(arguments: list[str], steps: int, checkpoint: Path) -> str:
    """The command that trains on from a finished run, for twice its steps."""
    kept = [o for o in arguments if not o.startswith(("ckpt_path=", "trainer.max_steps="))]
    longer = [f"trainer.max_steps={2 * steps}"] if steps > 0 else []
    return shlex.join(["python", "train.py", *kept, *longer, f"ckpt_path={checkpoint}"])


def _worst() -> float:
    """What a sweeper is told of a job that failed or diverged; some cannot bear a NaN."""
    direction = HydraConfig.get().sweeper.get("direction", "minimize")
    return -math.inf if "maximize" in str(direction) else math.inf


def pin_children(directory: Path) -> list[str]:
    """Make Lightning's child processes repeat this job and nothing else.

    Its launcher runs ``sys.argv`` again for every other rank. In a sweep that would be the whole sweep, with a
    sampler's ranks meeting at different trials. So ``sys.argv`` becomes this job's own overrides, and Hydra's run
    directory the job's.
    """
    config = HydraConfig.get()
    own = list(config.overrides.task)
    search = [o for o in config.overrides.hydra if o.lstrip("+").startswith("hydra.searchpath")]
    sys.argv = [sys.argv[0], *_config_flags(sys.argv[1:]), *search, *own]
    with read_write(config):  # type: ignore[arg-type] # typed as its schema, it is a node
        config.run.dir = str(directory)
    return own


def _config_flags(arguments: list[str]) -> list[str]:
    flags = ("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp")
    kept: list[str] = []
    for i, argument in enumerate(arguments):
        if argument in flags:
            kept += arguments[i : i + 2]
        elif argument.startswith(tuple(f"{flag}=" for flag in flags)):
            kept.append(argument)
    return kept


def reset_processes() -> None:
    """Leave no process group behind: the next job of a sweep makes its own."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        lead = dist.get_rank() == 0
        dist.destroy_process_group()
        if lead:
            for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)


def _is_child() -> bool:
    return os.environ.get("LOCAL_RANK", "0") != "0"


def _is_interruption(error: BaseException) -> bool:
    return type(error).__name__ == "Interrupted"  # its module imports Lightning, which a refusal must not wait for


def main() -> None:
    """Run, and turn every mistake of the user's into one message and an exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises here instead of printing its own account
    arguments = sys.argv[1:]
    try:
        registry.load()
        if arguments and arguments[0] in SUBCOMMANDS:
            from training import cli

            cli.main(arguments)
        else:
            hydra_main()
    except ConfigError as error:
        _refusals.append(error)
    except REFUSALS as error:
        _refusals.append(explain(error, [a for a in arguments if not a.startswith("-")]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED + 2)
    except Exception as error:
        if not _is_interruption(error):
            raise
        print(f"\n{error}. Continue with the same command and ckpt_path={error.checkpoint}")  # type: ignore[attr-defined]
        sys.exit(INTERRUPTED + error.signum)  # type: ignore[attr-defined]
    if _refusals:
        print(_refusals[0].render(), file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()

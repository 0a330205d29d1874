"""Choose the checkpoint to resume from, and report what has changed since.

Shapes of weights are compared in ``blockwright.blocks.checkpoint.read.check_fits``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from blockwright.registry import ConfigError
from blockwright.training.checkpoints.find import by_age, first_good, good, inside, newest
from blockwright.training.checkpoints.record import Change, Past, changes, is_same_run, listed, peek, table
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import FOLDER, Run
from blockwright.training.processes import is_first
from blockwright.training.schedulers import Schedule

LATEST = "last"  # as ``ckpt_path``: the newest checkpoint, wherever it is
log = logging.getLogger(__name__)


def resolve_checkpoint(run: Run, ours: Callable[[], Mapping[str, Any]]) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    A path: itself, or its predecessor if it is damaged. ``last``: the newest undamaged one in this run's own folders;
    else, unless the run is a sweep's job, the newest of a run of this task with the same configuration, else the newest
    of any. ``auto_resume``: the same, but never one of another configuration.

    Args:
        run: its ``ckpt_path`` as written
        ours: gives the record of this run, and is called if another's is found

    Raises:
        ConfigError: there is none, or ``auto_resume`` finds one of another configuration in this run's own folders
    """
    if run.ckpt_path not in (None, LATEST):
        return _named(str(run.ckpt_path))
    if run.ckpt_path is None and not run.auto_resume:
        return None
    latest = run.ckpt_path == LATEST
    folders = dict.fromkeys((run.checkpoints, run.folder / FOLDER))
    own = first_good(path for folder in folders for path in inside(folder))
    if own is not None and not latest:
        _refuse_another(own, ours)
    runs = Path(run.paths["log_dir"]) / run.task_name
    found = own if own is not None or run.in_sweep else _among(runs, ours, any_will_do=latest)
    if found is None and latest:
        raise _none_left(run, runs)
    return str(found) if found else None


def _named(path: str) -> str:
    """A checkpoint named by its path; a damaged one without a predecessor is refused on reading."""
    if not Path(path).exists():
        raise ConfigError("ckpt_path", path, "there is no such file", "Write ckpt_path=last, or an existing file")
    return str(good(Path(path)) or path)


def _none_left(run: Run, runs: Path) -> ConfigError:
    """The error for ``last`` where there is none."""
    rule, remedy = f"no run under {runs} has left a last.ckpt", "Name the file: ckpt_path=RUN/checkpoints/last.ckpt"
    if run.in_sweep:
        rule = f"{run.checkpoints} holds no last.ckpt, and a sweep's job resumes only from its own"
        remedy = f"Resume the sweep: blockwright sweep resume {run.folder.parent}; or name the file"
    return ConfigError("ckpt_path", LATEST, rule, remedy)


def _refuse_another(found: Path, ours: Callable[[], Mapping[str, Any]]) -> None:
    past = peek(found)
    if past is not None and not is_same_run(past, ours()):
        rule = f"found {found} of another configuration ({listed(changes(past, ours()))})"
        remedy = f"Resume it anyway with ckpt_path={found}, or start a new run in another folder"
        raise ConfigError("auto_resume", True, rule, remedy)


def _among(runs: Path, ours: Callable[[], Mapping[str, Any]], any_will_do: bool) -> Path | None:
    """The newest good checkpoint among separate runs with this configuration; else of any run, or None."""
    candidates = by_age(runs)
    pasts = {path: peek(path) for path in candidates}
    # A checkpoint without a past is damaged: first_good says so.
    fits = {path: past is None or is_same_run(past, ours()) for path, past in pasts.items()}
    found = first_good(path for path in candidates if fits[path])
    other = next((path for path in candidates if not fits[path]), None)
    if other is None or (found and candidates.index(other) > candidates.index(found)):
        return found
    past = pasts[other]
    assert past is not None
    differs = f"{other}, differs: {listed(changes(past, ours()))}"
    if found:
        _tell(logging.INFO, f"resumes the newest run of this configuration; a newer one, {differs}")
        return found
    if any_will_do:
        return newest(runs)
    _tell(logging.WARNING, f"a new run: no run under {runs} has this configuration; the newest, {differs}")
    return None


def check_changes(path: str, past: Past, ours: Mapping[str, Any], run: Run) -> None:
    """Report the checkpoint and what has changed since, and refuse changes that give its weights another meaning.

    Args:
        path: of the checkpoint
        past: of the run that wrote it
        ours: the record of this run
        run: this one

    Raises:
        ConfigError: the model would compute something else with the same weights, and ``resume.changed`` forbids it
    """
    found = changes(past, ours)
    altering = [change for change in found if change.alters_weights]
    if altering and run.resume["changed"] != "allow":
        rule = f"was trained with a model to which its weights mean something else: {listed(altering)}"
        remedy = "Compose the same model, or write resume.changed=allow to continue with this one"
        raise ConfigError("ckpt_path", path, rule, remedy)
    lines = [] if not found else [f"changed since:\n{table(found)}"]
    if not past.complete:
        known = "only its model and seed are compared" if past.settings else "nothing is compared"
        lines.append(f"the checkpoint holds no configuration, so {known}")
    if run.train and (rate := _rate(past, found, run)):
        lines.append(rate)
    level = logging.WARNING if lines else logging.INFO
    _tell(level, "\n".join([f"resumes from {path} at step {past.step}", *lines]))


def _rate(past: Past, found: Sequence[Change], run: Run) -> str | None:
    """How a changed schedule or length affects the learning rate at the resumed step."""
    steps = run.trainer.get("max_steps", -1)
    schedule = instantiate(run.scheduler, "scheduler")
    if past.rate is None or not isinstance(schedule, Schedule) or not isinstance(steps, int) or past.step >= steps > 0:
        return None
    try:
        now = schedule.factor(past.step, steps)
    except ZeroDivisionError:  # a schedule that needs max_steps, but training in epochs
        return None
    if abs(now - past.rate) < 1e-6:
        return None
    ends = next((c for c in found if c.path == "trainer.max_steps"), None)
    why = f"the schedule now ends at step {steps}, there at {ends.there}" if ends else "the schedule is another"
    return f"learning rate at step {past.step}: {now:.2f} of its peak, in the checkpoint {past.rate:.2f}: {why}"


@lru_cache(maxsize=1)  # Lightning CLI compares twice
def _tell(level: int, line: str) -> None:
    if is_first():
        log.log(level, line)


def say(line: str) -> None:
    """Log a line once, on the first rank."""
    _tell(logging.WARNING, line)


# --- ``optimizer.lr=last``: start at the learning rate at which the training of the weights has ended ---


LAST = "last"


def last_rate(optimizer: Mapping[str, Any], past: Past | None) -> float:
    """The last learning rate of the run that weights come from, as a peak for this one.

    DeepSeek-V3 (arXiv 2412.19437, §4.3) extends its context at the last rate of pre-training, held constant
    (scheduler=constant); a warm-up to the old peak would undo what the decay has settled.

    Args:
        optimizer: the ``optimizer`` node, of which the class is compared: rates of different optimizers are not alike
        past: of the run; None where the weights come from none

    Raises:
        ConfigError: at ``optimizer.lr``: the weights come from no run, its rate is not recorded, or its optimizer was
            another
    """
    remedy = "Write the learning rate as a number"
    if past is None:
        rule = "is the rate at which the run that init_from names has ended, but it names no run"
        raise ConfigError("optimizer.lr", LAST, rule, remedy)
    old = past.settings.get("optimizer") or {}
    if past.rate is None or not isinstance(old.get("lr"), int | float):
        raise ConfigError("optimizer.lr", LAST, "is not recorded in the checkpoint that init_from names", remedy)
    if old.get("_target_") != optimizer.get("_target_"):
        rule = f"is of another optimizer: {old.get('_target_')} there, {optimizer.get('_target_')} here"
        raise ConfigError("optimizer.lr", LAST, rule, "Choose the run's optimizer, or write the learning rate")
    return float(old["lr"]) * past.rate

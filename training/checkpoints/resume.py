"""Choose the checkpoint to resume from, and report what has changed since.

Beside weights a checkpoint holds the position in training and the optimizer's state.
Shapes of weights are compared in ``blockwright.blocks.checkpoint.read.check_fits``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.find import by_age, first_good, good, inside, newest
from blockwright.training.checkpoints.record import Change, Past, changes, is_same_run, listed, peek, table
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import FOLDER, Run
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.processes import is_first
from blockwright.training.schedulers import Schedule

if TYPE_CHECKING:
    import lightning as L


# --- the folder of a run's checkpoints, and protection of other runs' checkpoints from being overwritten ---


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
        rule, remedy = f"no run under {runs} has left a last.ckpt", "Name the file: ckpt_path=RUN/checkpoints/last.ckpt"
        if run.in_sweep:
            rule = f"{run.checkpoints} holds no last.ckpt, and a sweep's job resumes only from its own"
            remedy = f"Resume the sweep: blockwright sweep resume {run.folder.parent}; or name the file"
        raise ConfigError("ckpt_path", LATEST, rule, remedy)
    return str(found) if found else None


def _named(path: str) -> str:
    """A checkpoint named by its path; a damaged one without a predecessor is refused on reading."""
    if not Path(path).exists():
        raise ConfigError("ckpt_path", path, "there is no such file", "Write ckpt_path=last, or an existing file")
    return str(good(Path(path)) or path)


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


# --- the position in training that a checkpoint holds: between two optimizer steps, whichever hook writes it ---


def between_steps(trainer: L.Trainer, loops: dict[str, Any]) -> None:
    """Put the loops of a checkpoint where a resumed run can continue: at the end of the last optimizer step.

    No file holds the gradients of a step in progress, so all its micro-batches are computed again. Lightning would

    * continue with the rest of them, and count the batch and the step in progress as done;
    * give an epoch of which no batch has begun the batches of the one before, and end it at once;
    * add a batch to an epoch that has ended without a validation;
    * count an epoch as ended in which training was stopped, by its time or a callback.

    Args:
        trainer: at any hook
        loops: the fit loop's state in the checkpoint, changed in place
    """
    loop, batches = trainer.fit_loop.epoch_loop, loops["epoch_loop.batch_progress"]
    now: Any = loop.batch_progress.current  # whose class Lightning does not declare
    epoch: Any = trainer.fit_loop.epoch_progress.current
    both = (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"])
    ended, unbegun = epoch.processed == epoch.ready, epoch.ready > epoch.started
    stopped = ended and epoch.ready > 0 and not loop._num_ready_batches_reached()
    if stopped and trainer.should_stop:
        for counts in both:
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    if not stopped and (ended or unbegun):
        for counts in both:
            counts["completed"] = counts["processed"]
        batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
        return
    if now.ready > now.processed or loop._should_accumulate():
        _back(batches, now.processed % trainer.accumulate_grad_batches)
        step = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        for counts in (step["total"], step["current"]):
            counts["ready"] = counts["completed"]


def _back(batches: dict[str, Any], micro_batches: int) -> None:
    """Take back micro-batches, and the batch in progress."""
    for counts in (batches["total"], batches["current"]):
        counts.update(dict.fromkeys(counts, counts["processed"] - micro_batches))
    batches["is_last_batch"] = False


# --- check that the optimizer state in a checkpoint fits the optimizer of a run ---


Groups = list[tuple[str, list[str]]]  # name of each group, and of its parameters


def check_optimizer(checkpoint: Mapping[str, Any], recipe: Any, decoder: Decoder, path: str) -> None:
    """Refuse to train with an optimizer for which the checkpoint has no state.

    Args:
        checkpoint: from ``blockwright.blocks.checkpoint.read.read_checkpoint``
        recipe: of this run; anything but an OptimizerRecipe is not checked
        decoder: on the meta device, with its adapters and frozen parts
        path: of the checkpoint, for the error message

    Raises:
        ConfigError
    """
    if not checkpoint.get("optimizer_states"):
        rule = "holds weights but no training state, so training cannot resume from it"
        raise ConfigError(
            "ckpt_path", path, rule, "Use the last.ckpt of a training, or write train=false to measure it"
        )
    names = checkpoint.get("optimizer_parameters")
    if not names or not isinstance(recipe, OptimizerRecipe):
        return
    theirs, ours = _groups_of(checkpoint["optimizer_states"][0], names[0]), _groups_for(recipe, decoder)
    if theirs != ours:
        name = type(recipe).__name__
        rule = (
            f"{path} holds the state of another optimizer: its groups are {_described(theirs)}, here {_described(ours)}"
        )
        raise ConfigError("optimizer", name, rule, f"Resume with the optimizer that wrote it; {name} needs a new run")


def _groups_of(state: Mapping[str, Any], names: list[str]) -> Groups:
    return [(str(group.get("name")), [names[i] for i in group["params"]]) for group in state["param_groups"]]


def _groups_for(recipe: OptimizerRecipe, decoder: Decoder) -> Groups:
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    groups = recipe.build(decoder).param_groups
    return [(str(group.get("name")), [names[id(p)] for p in group["params"]]) for group in groups]


def _described(groups: Groups) -> str:
    return ", ".join(f"{name} ({len(parameters)} parameters)" for name, parameters in groups)

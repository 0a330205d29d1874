"""Plan an ablation: compose, check and match every arm, and list every job. Nothing is started here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blockwright.lab.ablation import bank, design, seed_counts
from blockwright.lab.ablation.bank import Entry, Shape
from blockwright.lab.ablation.definition import Definition
from blockwright.lab.ablation.scheme import Recipe, Scheme
from blockwright.lab.match.sizing import Arm, Sized, arm_of, named, size
from blockwright.lab.statistics.tuning import Aim, composed_value
from blockwright.registry import ConfigError
from blockwright.registry.command import quoted
from blockwright.registry.reading import read as read_settings
from blockwright.training.configuration import figures, parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import Run
from blockwright.training.data.fingerprint import digest
from blockwright.training.entry.parse import parse_settings
from blockwright.training.entry.preflight import check

STEPS = "trainer.max_steps"
NO_DATA = ("seed", "batch_size", "eval_batch_size", "num_workers", "cache_dir")  # settings on which no loss depends


@dataclass(frozen=True)
class Plan:
    """The arms and jobs of an ablation.

    Args:
        definition: where it comes from
        arms: after matching
        scheme: of the jobs to come
        jobs: the first ones, as in plan.json
        shape: on which the noise depends
        noise: of earlier ablations of nearly this shape; None if there is none
        steps: optimizer steps per job of the baseline; -1 if epochs are counted
        tokens_per_step: tokens per optimizer step of the baseline, over all processes
        tokens: arm → training tokens per job; None if epochs are counted
        log_dir: parent of the runs' folders
        direction: in which the metric is better, ``minimize`` or ``maximize``
        unit: of the metric, after a space; empty if it is not declared
    """

    definition: Definition
    arms: list[Sized]
    scheme: Scheme
    jobs: list[dict[str, Any]]
    shape: Shape
    noise: Entry | None
    steps: int
    tokens_per_step: int
    tokens: dict[str, int | None]
    log_dir: str
    direction: str
    unit: str = ""

    def as_plain(self, command: Sequence[str]) -> dict[str, Any]:
        """In the format of plan.json.

        Args:
            command: the command that made it
        """
        d = self.definition
        return {
            "kind": "ablation",
            "name": d.name,
            "command": shlex.join(command),
            "metric": d.metric,
            "direction": self.direction,
            "jobs": self.jobs,
            "also": list(d.also),
            **asdict(self.scheme),
            "shape": asdict(self.shape),
            "arms": [
                {**sized.as_plain(sized.arm.name == d.baseline), "against": d.arms[sized.arm.name].against}
                for sized in self.arms
                if d.arms[sized.arm.name].compared
            ],
            "definition": asdict(d),
        }


def make(definition: Definition, overrides: Sequence[str] = ()) -> Plan:
    """Plan an ablation.

    Args:
        definition: the ablation
        overrides: for all arms, after ``base`` and before those of an arm, which take precedence

    Raises:
        ConfigError: an arm cannot be composed, built or matched, or would not be accepted by blockwright train
    """
    steps, tokens_per_step, log_dir = _lengths(definition, overrides)
    composed = _composed_arms(definition, overrides, steps, tokens_per_step)
    arms = [arm for arm, _ in composed.values()]
    targets = {name: spec.target for name, spec in definition.arms.items() if spec.target is not None}
    ways = {name: spec.match for name, spec in definition.arms.items() if spec.match is not None}
    sized = size(arms, definition.baseline, definition.budget, targets, ways)
    final = {
        one.arm.name: _composed(one.arm.name, one.overrides)[1] if one.changed else composed[one.arm.name][1]
        for one in sized
    }
    starts = {name: spec.init_from for name, spec in definition.arms.items()}
    # Refuse two arms with the same configuration and start
    seen: dict[str, str] = {}
    for name, plain in final.items():
        if (same := seen.setdefault(f"{starts[name]} {dict(plain)!r}", name)) != name:
            rule = f"is the same as arm {same}, so it would compare nothing"
            raise ConfigError("arms", name, rule, "Change one of them, or remove it")
    _compare_starts(final, starts)
    # The direction of the metric
    if definition.solved is not None:
        _meaning("solved.metric", definition.solved.metric, definition, final)
    direction = _meaning("metric", definition.metric, definition, final, ("direction", definition.direction))
    base, tokens = final[definition.baseline], {name: _tokens(plain) for name, plain in final.items()}
    steps_of_base, per_step = base["trainer"].get("max_steps", -1), _tokens_per_step(base)
    params = next(one.figures.params for one in sized if one.arm.name == definition.baseline)
    shape = _shape(definition.metric, base, params, tokens[definition.baseline], per_step)
    entries = bank.known(Path(log_dir))
    recipes, aim = _recipes(definition, sized, final), _aim(definition, final)
    scheme = seed_counts.make(definition, recipes, aim, shape, entries)
    noise = seed_counts.noise_of(definition, shape, entries)
    jobs = design.first(scheme)
    for job in jobs if definition.lr or definition.tune else ():  # an optimizer may take no lr, or not this one
        if job["arm"] == definition.baseline:
            _composed(definition.baseline, job["overrides"])
    unit = getattr(figures.declaration(definition.metric, base), "unit", "")
    of_base = (steps_of_base, per_step, tokens, log_dir, direction, unit and f" {unit}")
    return Plan(definition, sized, scheme, jobs, shape, noise, *of_base)


def _recipes(definition: Definition, sized: Sequence[Sized], final: Mapping[str, Run]) -> dict[str, Recipe]:
    """What the jobs of each arm have in common."""
    recipes = {}
    for one in sized:
        name = one.arm.name
        spec = definition.arms[name]
        values = {path: composed_value(final[name], path, name) for path in definition.tune or ()}
        recipes[name] = Recipe(tuple(one.overrides), spec.init_from, values, spec.compared)
    return recipes


def _shape(metric: str, base: Run, params: float, tokens: int | None, per_step: int) -> Shape:
    """The shape of the baseline."""
    optimizer = base.optimizer
    lr = optimizer.get("lr")
    trainer = base.trainer
    data = {key: value for key, value in base.data.items() if key not in NO_DATA}
    windows = [trainer.get(key) for key in ("limit_val_batches", "limit_test_batches")]
    settings = ", ".join(f"{key}={value}" for key, value in sorted(base.scheduler.items()) if key != "_target_")
    scheduler = f"{str(base.scheduler.get('_target_')).rpartition('.')[2]}({settings})"
    return Shape(
        metric,
        params,
        base.model.get("d_model"),
        base.model.get("n_layers"),
        tokens or None,
        per_step or None,
        str(optimizer.get("_target_")).rpartition(".")[2],
        lr if isinstance(lr, float) and lr > 0 else None,
        scheduler,
        str(trainer.get("precision")),
        digest(data, dict(base.task), windows, [name for name, node in base.callbacks.items() if node], _sizes(data)),
    )


def _sizes(node: Any) -> list[int]:
    """Bytes of the files that a node names: other texts may have the path of this one."""
    if isinstance(node, Mapping | list | tuple):
        return [size for each in (node.values() if isinstance(node, Mapping) else node) for size in _sizes(each)]
    return [Path(node).stat().st_size] if isinstance(node, str) and Path(node).is_file() else []


def _composed_arms(
    definition: Definition, overrides: Sequence[str], steps: list[str], tokens_per_step: int
) -> dict[str, tuple[Arm, Run]]:
    """Every arm before it is matched; one of another batch size with its own number of steps."""
    common = [f"task_name={quoted(definition.name)}", *definition.base]
    composed = {}
    for name, spec in definition.arms.items():
        composed[name] = _composed(name, [*common, *steps, *overrides, *spec.overrides])
        if steps and (per_step := _tokens_per_step(composed[name][1])) != tokens_per_step:
            steps_of_arm = _steps(definition, per_step, name)
            composed[name] = _composed(name, [*common, *steps_of_arm, *overrides, *spec.overrides])
    return composed


def _composed(name: str, overrides: Sequence[str]) -> tuple[Arm, Run]:
    """An arm, and its whole configuration as checked by blockwright train."""
    with named(name):
        config = compose_config(overrides, output_dir=".")
        run = parse_settings(config)
        check(run)
        return arm_of(name, overrides, config, run.model), run


def _compare_starts(final: Mapping[str, Run], trained: Mapping[str, str | None]) -> None:
    """Refuse an arm whose weights come from an arm with a model from which its starts cannot make them."""
    for name, other in trained.items():
        if other is not None:
            with named(name):
                run = replace(final[name], init_from=f"arm {other}")
                for start in parts.starts(run):
                    start.compare(final[other].model, run.model, run.resume["changed"] == "allow")


def _aim(definition: Definition, final: Mapping[str, Run]) -> Aim | None:
    """The figure that judges the tries, if it is not the metric."""
    if (name := definition.tuned_by) in (None, definition.metric):
        return None
    return read_settings(Aim, {"metric": name, "direction": _meaning("tuned_by", name, definition, final)})


def _meaning(path: str, name: str, definition: Definition, final: Mapping[str, Run], *asked: tuple[str, Any]) -> str:
    """The direction of a figure, which all arms must measure, and mean the same by."""
    figures.refuse_misspelt(path, name)
    found: dict[str, str] = {}
    for arm, plain in final.items():
        if definition.arms[arm].compared:
            with named(arm):
                figures.refuse_unmeasured(path, name, plain)
                found[arm] = figures.direction(plain, *asked, path=path, name=name)
    if len(set(found.values())) > 1:
        rule = f"has more than one meaning: {', '.join(f'{arm} is to {way} it' for arm, way in found.items())}"
        raise ConfigError(path, name, rule, "Compare arms by a figure that they share")
    return next(iter(found.values()))


def _lengths(definition: Definition, overrides: Sequence[str]) -> tuple[list[str], int, str]:
    """The override for the number of steps, tokens per step, and the log folder."""
    config = compose_config([*definition.base, *overrides])
    per_step = _tokens_per_step(config)
    if definition.tokens is None or any(o.lstrip("+").startswith(f"{STEPS}=") for o in overrides):
        return [], per_step, config.paths.log_dir
    return _steps(definition, per_step), per_step, config.paths.log_dir


def _steps(definition: Definition, per_step: int, arm: str = "") -> list[str]:
    """The override that makes a job train on the definition's tokens."""
    tokens = definition.tokens or 0
    if not per_step:
        rule = "this data has no data.sequence_length or data.batch_size to count tokens by"
        raise ConfigError("tokens", tokens, rule, "Leave it out, and write trainer.max_steps=N in base")
    if tokens < per_step:
        of = f" of arm {arm}" if arm else ""
        rule = f"is less than one step{of} ({per_step:,} tokens: data.batch_size × data.sequence_length)"
        raise ConfigError("tokens", tokens, rule, f"Write tokens={100 * per_step} or more")
    return [f"{STEPS}={tokens // per_step}"]


def _tokens_per_step(config: Mapping[str, Any]) -> int:
    """0 for data, as of a plug-in, whose settings do not say."""
    data, trainer = config["data"], config["trainer"]
    length, rows = data.get("sequence_length") or 0, data.get("batch_size") or 0
    return int(length * rows * trainer.get("accumulate_grad_batches", 1))


def _tokens(plain: Mapping[str, Any]) -> int | None:
    if not plain["train"]:
        return 0
    steps = plain["trainer"].get("max_steps", -1)
    return steps * _tokens_per_step(plain) or None if steps > 0 else None

"""Every figure that a task or a callback logs is declared there: its unit, and which way it is better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF
from blockwright.training.configuration.instantiate import find_target, instantiate
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight
from blockwright.training.figure import Figure

pytestmark = pytest.mark.xdist_group("figures")  # one run is the start of another

TINY = ["logger=none", "extras.print_config=false", "callbacks.report.sample_tokens=0", "scheduler.warmup=1",
        "model.n_layers=2", "model.d_model=32", "model.max_positions=96", "trainer.max_steps=2",
        "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "data.batch_size=2", "test=false"]  # fmt: skip
SORTING = ["data.tokenizer.vocab_size=16", "data.corpus.train=8", "data.corpus.held_out=2"]
PAIRS = ["data=sorting_preferences", *SORTING]
OF_TASK = {  # what a task trains on, if it is not text
    "grpo": ["data=sorting_prompts", *SORTING, "task.group_size=2", "task.max_new_tokens=4", "task/penalty=k3",
             "task/correction=truncate", "task.reference=START", "task/surrogate=clip"],
    "preference": [*PAIRS, "task/preference=orpo"],
    "reward": PAIRS,
    "distill": ["init_from=START"],
}  # fmt: skip
OF_CALLBACK = {  # what a callback needs of a run of text
    "extrapolation": ["callbacks.extrapolation.multiples=[2]"],
    "long_context": ["callbacks.long_context.lengths=[64]", "callbacks.long_context.samples=1",
                     "callbacks.long_context.symbols=[1,64]", "callbacks.long_context.stretches=1"],
    "throughput": ["+callbacks.throughput.warmup=0"],
    "experts": ["callbacks.experts.steps=1", "callbacks.experts.below=0.99"],
    "pictures": [],  # of data of its own: see below
    "pruning": [],  # in a search alone; it logs nothing
}  # fmt: skip
TASKS = sorted(file.stem for file in (CONF / "task").glob("*.yaml") if file.stem != "base")
CALLBACKS = sorted(file.stem for file in (CONF / "callbacks").glob("*.yaml") if file.stem not in ("default", "none"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Callable[..., Path]:
    """Trains two steps and hands back the run's folder, once for each name."""
    place, done = tmp_path_factory.mktemp("figures"), dict[str, Path]()
    text = ["data=text", f"data.corpus.files={corpus_file}", "data.corpus.val_fraction=0.3",
            "data.sequence_length=32", "data.eval_windows=2"]  # fmt: skip

    def make(name: str, overrides: list[str]) -> Path:
        if name not in done:
            of_data = [] if any(each.startswith("data=") for each in overrides) else text
            start = str(place / "causal_lm")
            given = [*of_data, *TINY, f"paths.data_dir={place}", *(each.replace("START", start) for each in overrides)]
            execute(preflight(compose_config(given, output_dir=str(place / name))))
            done[name] = place / name
        return done[name]

    return make


@pytest.fixture
def of_text(trained: Callable[..., Path]) -> Path:
    """A run of text with every callback that can be in one."""
    chosen = [name for name in CALLBACKS if name not in ("pictures", "pruning")]
    with_all = [
        "test=true",
        f"callbacks=[{','.join(chosen)}]",
        *(each for name in chosen for each in OF_CALLBACK.get(name, [])),
    ]
    return trained("causal_lm", with_all)


def undeclared(folder: Path) -> set[str]:
    """Figures that a run has logged, and nothing declares."""
    results = json.loads((folder / "results.json").read_text())
    assert len(results["metrics"]) > 5
    return set(results["metrics"]) - set(results["figures"])


@pytest.mark.parametrize("task", [t if t == "causal_lm" else pytest.param(t, marks=pytest.mark.slow) for t in TASKS])
def test_every_figure_that_a_task_logs_is_declared(task: str, trained: Callable[..., Path], of_text: Path) -> None:
    folder = of_text if task == "causal_lm" else trained(task, [f"task={task}", *OF_TASK.get(task, [])])
    assert undeclared(folder) == set()


def figures_of(callback: str) -> tuple[Figure, ...]:
    node = yaml.safe_load((CONF / "callbacks" / f"{callback}.yaml").read_text())[callback]
    return getattr(find_target(node["_target_"], callback), "figures", ())


def test_what_a_callback_declares_says_its_direction_or_that_it_has_none() -> None:
    every = [figure for callback in CALLBACKS for figure in figures_of(callback)]
    assert len(every) > 10 and all(isinstance(figure, Figure) for figure in every)


def test_every_callback_has_logged_what_it_declares(of_text: Path) -> None:
    """Nothing is declared that no run logs; what needs rewards, pictures or a bad step is left out."""
    logged = json.loads((of_text / "results.json").read_text())["metrics"]
    for callback in set(CALLBACKS) - {"pictures", "completions", "guard"}:
        for figure in figures_of(callback):
            if not figure.name.startswith(("rollout_", "update_")):
                assert any(map(figure.stands_for, logged)), f"{callback}: {figure.names}"


def test_answers_about_pictures_are_declared_whatever_is_asked() -> None:
    """Without a run: names come from the corpus, of a plug-in too."""
    declared = instantiate(
        {"_target_": "blockwright.plugins.vision.asking.callback.Asking", "directory": "x"}, "x"
    ).figures
    found = {name: next(f.better for f in declared if f.stands_for(f"pictures/{name}")) for name in (
        "read_exact", "where_overlap", "where_constant", "blanked_read_exact", "shuffled_count_exact",
    )}  # fmt: skip
    assert found == {"read_exact": "more", "where_overlap": "more", "where_constant": None, "blanked_read_exact": None,
                     "shuffled_count_exact": None}  # fmt: skip

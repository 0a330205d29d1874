"""Every figure that a task or a callback logs is declared there: its unit, and which way it is better."""

import json
from pathlib import Path

import pytest
import yaml

from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF, files
from blockwright.training.configuration.instantiate import find_target
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight
from blockwright.training.figure import Figure

pytestmark = pytest.mark.xdist_group("figures")  # one run is the start of another

TINY = ["logger=none", "callbacks.report.sample_tokens=0", "scheduler.warmup=1",
        "model.n_layers=2", "model.d_model=32", "model.max_positions=96", "trainer.max_steps=2",
        "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "data.batch_size=2", "test=false"]  # fmt: skip
OF_CALLBACK = {  # what a callback needs of a run of text
    "throughput": ["+callbacks.throughput.warmup=0"],
    "experts": ["callbacks.experts.steps=1", "callbacks.experts.below=0.99"],
    "pruning": [],  # in a search alone; it logs nothing
}
CALLBACKS = sorted(file.stem for file in (CONF / "callbacks").glob("*.yaml") if file.stem not in ("default", "none"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_file):
    """Trains two steps and hands back the run's folder, once for each name."""
    place, done = tmp_path_factory.mktemp("figures"), dict[str, Path]()
    text = ["data=text", f"data.corpus.files={corpus_file}", "data.corpus.val_fraction=0.3",
            "data.sequence_length=32", "data.eval_windows=2"]  # fmt: skip

    def make(name, overrides):
        if name not in done:
            of_data = [] if any(each.startswith("data=") for each in overrides) else text
            start = str(place / "causal_lm")
            given = [*of_data, *TINY, f"paths.data_dir={place}", *(each.replace("START", start) for each in overrides)]
            execute(preflight(compose_config(given, output_dir=str(place / name))))
            done[name] = place / name
        return done[name]

    return make


@pytest.fixture
def of_text(trained):
    """A run of text with every callback that can be in one."""
    chosen = [name for name in CALLBACKS if name != "pruning"]
    with_all = [
        "test=true",
        f"callbacks=[{','.join(chosen)}]",
        *(each for name in chosen for each in OF_CALLBACK.get(name, [])),
    ]
    return trained("causal_lm", with_all)


def undeclared(folder):
    """Figures that a run has logged, and nothing declares."""
    results = json.loads((folder / "results.json").read_text())
    assert len(results["metrics"]) > 5
    return set(results["metrics"]) - set(results["figures"])


@pytest.mark.slow
def test_every_figure_of_a_run_of_text_is_declared(of_text):
    assert undeclared(of_text) == set()


def figures_of(callback):
    (file,) = (file for file in files("callbacks") if file.stem == callback)
    node = yaml.safe_load(file.read_text())[callback]
    return getattr(find_target(node["_target_"], callback), "figures", ())


def unlogged(callback, folder):
    """Figures that a callback declares and a run has not logged."""
    logged = json.loads((folder / "results.json").read_text())["metrics"]
    return [figure.name for figure in figures_of(callback) if not any(map(figure.stands_for, logged))]


def test_what_a_callback_declares_says_its_direction_or_that_it_has_none():
    every = [figure for callback in CALLBACKS for figure in figures_of(callback)]
    assert len(every) > 5 and all(isinstance(figure, Figure) for figure in every)


@pytest.mark.slow
@pytest.mark.parametrize("callback", sorted(set(CALLBACKS) - {"completions", "guard"}))
def test_every_callback_has_logged_what_it_declares(callback, of_text):
    assert [name for name in unlogged(callback, of_text) if not name.startswith(("rollout_", "update_"))] == []

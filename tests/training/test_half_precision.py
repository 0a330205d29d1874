"""Half precision is a condition of every task, objective and callback: what each logs and keeps, next to fp32.

Two comparisons. Under a bf16 *default dtype* with fp32 weights everything must be bit-identical: nothing that is made
from Python numbers, or from counts, may depend on it. With bf16 *products* (``bf16-true``, ``bf16-mixed``) the figures
may differ by their rounding, from the same rounded weights; counts and dtypes may not. Callbacks come from the folder
of options, so that a new one is included. Tests of plug-ins give their tasks and callbacks as other ``cases``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blockwright.blocks.precision import default_dtype
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import OWN
from blockwright.training.entry.preflight import preflight
from blockwright.training.figure import find, of_run
from tests import built

pytestmark = pytest.mark.xdist_group("half_precision")  # its runs are compared with each other
CONDITIONS = ("default dtype", "bf16-true", "bf16-mixed")
ROUNDING = ("load", "accuracy")  # decides them: which expert is chosen, and which of two equal policies wins
Run = dict[str, Any]
Cases = dict[str, list[str]]

SMALL = [
    *("model.n_layers=2", "model.d_model=32", "model.max_positions=64", "model/gating=sigmoid_bias"),
    *("model.attention.kv_lora_rank=8", "model.ffn.n_experts=4", "model.gating.top_k=2", "data.sequence_length=16"),
    *("model.init.std=0.3", "data.batch_size=4", "data.eval_batch_size=4", "optimizer=adamw", "optimizer.lr=1e-4"),
    *("scheduler=constant", "scheduler.warmup=1", "trainer.max_steps=2", "trainer.val_check_interval=2"),
    *("trainer.log_every_n_steps=1", "trainer.num_sanity_val_steps=0"),
]
SORTING = ["data=sorting", "data.tokenizer.vocab_size=16", "data.corpus.train=8", "data.corpus.held_out=4"]
TEXT = ["data=text", "data.corpus.files={corpus}", "data.sequence_length=32", "data.eval_windows=4"]
OTHER_CALLBACKS = {"none": "is no callback", "pruning": "compares a logged figure in a search, and computes nothing"}
CALLBACKS = sorted({file.stem for file in (CONF / "callbacks").glob("*.yaml")} - set(OTHER_CALLBACKS) - {"default"})


@pytest.fixture(scope="module")
def cases() -> Cases:
    """Task → its data and callbacks."""
    with_all = [*TEXT, f"callbacks=[default,{','.join(CALLBACKS)}]", "callbacks.qk_clip.threshold=0.5"]
    return {"causal_lm": with_all, "recall": ["data=copying", "data.held_out=4"]}


@pytest.fixture(scope="module")
def watch() -> Callable[[], Any]:
    """A context that records more of a run: here nothing."""
    return lambda: contextlib.nullcontext([])


class Begin(L.Callback):
    """Rounds the weights to bf16, whatever their dtype, and then lowers the default dtype, if asked to."""

    def __init__(self, default: torch.dtype) -> None:
        self.default = default
        self.logged: list[dict[str, float]] = []  # at each step, and at its validation
        self.counts: list[dict[str, float]] = []  # that the losses of each step are divided by

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        for parameter in task.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
        torch.set_default_dtype(self.default)

    def on_before_backward(self, trainer: L.Trainer, task: Any, loss: Tensor) -> None:
        assert torch.get_default_dtype() == self.default
        self.counts.append({name: float(value) for name, value in task.step._totals.items()})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append(_figures(trainer))


def _figures(trainer: L.Trainer) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("speed/")}


@pytest.fixture(scope="module")
def run(cases: Cases, watch: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """A run of two steps, with its validation; once for each case and condition."""
    folder, done = tmp_path_factory.mktemp("half"), dict[tuple[str, str], Run]()
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"To be, or not to be: line {i} of the corpus.\n" for i in range(300)))

    def fit(name: str, condition: str) -> Run:
        if (name, condition) not in done:
            words = [word.format(start=folder / "start.ckpt", corpus=corpus) for word in cases[name]]
            done[name, condition] = _fit(name, words, condition, folder, watch())
        return done[name, condition]

    _fit("causal_lm", SORTING, "fp32", folder, contextlib.nullcontext([]), start=True)
    return fit


def _fit(name: str, words: list[str], condition: str, folder: Path, watched: Any, start: bool = False) -> Run:
    paths = [f"paths.data_dir={folder}/data", f"data.cache_dir={folder}/{condition}/{name}"]
    out = folder / ("start" if start else condition) / name
    plain = preflight(compose_config([f"task={name}", *SMALL, *words, *paths], output_dir=str(out)))
    ours = {k: v for k, v in plain["trainer"].items() if k not in ("_target_", "default_root_dir", "plugins", *OWN)}
    ours |= {"precision": condition} if condition.startswith("bf16") else {}
    begin = Begin(torch.bfloat16 if condition == "default dtype" else torch.float32)
    callbacks = [instantiate(node, f"callbacks.{key}") for key, node in plain["callbacks"].items()]
    trainer = L.Trainer(**{**ours, "logger": False}, default_root_dir=out, callbacks=[begin, *callbacks])
    task, data = parts.build("task", plain), parts.build("data", plain)
    try:
        with watched as seen:
            trainer.fit(task, data)
        stored = trainer._checkpoint_connector.dump_checkpoint()
        for parameter in task.parameters() if start else ():
            parameter.data.copy_(parameter.data.bfloat16())
        if start or name == "reward":
            trainer.save_checkpoint(folder / ("start.ckpt" if start else f"{condition}.ckpt"))
        logged = {**trainer.callback_metrics, **trainer.logged_metrics}
        undeclared = [figure for figure in logged if find(figure, of_run(trainer)) is None]
        with default_dtype(begin.default):
            trainer.validate(task, data, verbose=False)
    finally:
        torch.set_default_dtype(torch.float32)
    figures = [*begin.logged, _figures(trainer)]  # the last are those of the validation alone
    weights = {name for name, _ in task.named_parameters()}
    found = {"figures": figures, "stored": stored, "seen": seen, "counts": begin.counts}
    found["undeclared"] = undeclared
    return {**found, "weights": weights, "folder": folder}


def assert_same_bits(plain: Run, low: Run) -> None:
    """Figures, weights, optimizer, sums, rollouts, and what callbacks store and measure."""
    assert low["figures"] == plain["figures"] and not plain["undeclared"]
    assert [name for name in plain["figures"][0] if name.startswith("train/")] and plain["figures"][-1]
    for kept in plain["stored"].keys() - {"callbacks", "loops"}:  # which have times and paths
        one, other = (tree_leaves(each["stored"][kept]) for each in (plain, low))
        for a, b in zip(one, other, strict=True):
            same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b or kept == "hparams"
            assert same, kept
    guard = next((v for k, v in plain["stored"]["callbacks"].items() if "Guard" in k), None)
    assert guard == next((v for k, v in low["stored"]["callbacks"].items() if "Guard" in k), None)


def assert_rounded(plain: Run, low: Run, same_batches: bool = True) -> None:
    """Figures but for the rounding of products; sums are exact, and no sum or bias of a gate is ever cast.

    Args:
        plain, low: runs in fp32 and in bf16
        same_batches: false for two samplers, whose completions may differ
    """
    parameters = [key for key in low["stored"]["state_dict"] if key in plain["weights"]]
    for name, value in low["stored"]["state_dict"].items():
        assert name in parameters or value.dtype == plain["stored"]["state_dict"][name].dtype, name
    first, low_first = plain["figures"][0], low["figures"][0]
    assert low_first.keys() == first.keys()
    if same_batches:
        assert low["counts"] == plain["counts"]
        for name, value in first.items():
            undecided = any(part in name for part in ROUNDING)
            assert undecided or low_first[name] == pytest.approx(value, 0.05, 0.05), name


def test_every_task_of_the_core_is_a_case(cases: Cases) -> None:
    assert sorted(cases) == built.names("task", "blockwright.training")


@pytest.mark.slow
def test_default_dtype_changes_no_bit_of_a_run(run: Callable[[str, str], Run]) -> None:
    assert_same_bits(run("causal_lm", "fp32"), run("causal_lm", "default dtype"))


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS[1:])
def test_figures_are_those_of_the_same_rounded_weights(condition: str, run: Callable[[str, str], Run]) -> None:
    assert_rounded(run("causal_lm", "fp32"), run("causal_lm", condition))

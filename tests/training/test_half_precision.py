"""Half precision is a condition of every task, objective and callback: what each logs and keeps, beside fp32.

Two comparisons. Under a bf16 *default dtype* with fp32 weights everything must be bit-identical: nothing that is made
from Python numbers, or from counts, may depend on it. With bf16 *products* (``bf16-true``, ``bf16-mixed``) the figures
may differ by their rounding, from the same rounded weights; counts, dtypes and the first ratio of a policy may not.
Members come from the registry and from the folders of options, so that a new one is included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.precision import default_dtype
from blockwright.plugins.alignment.policy import PolicyObjective
from blockwright.plugins.alignment.preferences import Answers
from blockwright.plugins.alignment.teaching import Lesson
from blockwright.registry import Node, Scope
from blockwright.training.configuration import conf, parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import OWN
from blockwright.training.entry.preflight import preflight
from blockwright.training.figure import find, of_run

pytestmark = pytest.mark.xdist_group("half_precision")  # its runs are compared with each other
TASKS = registry.names("task")
CONDITIONS = ("default dtype", "bf16-true", "bf16-mixed")
ROUNDING = ("load", "accuracy")  # decides them: which expert is chosen, and which of two equal policies wins
Run = dict[str, Any]

# --- tasks and callbacks ----------------------------------------------------------------------------------------------

SMALL = [
    *("model.n_layers=2", "model.d_model=32", "model.max_positions=64", "model/gating=sigmoid_bias"),
    *("model.attention.kv_lora_rank=8", "model.ffn.n_experts=4", "model.gating.top_k=2", "data.sequence_length=16"),
    *("model.init.std=0.3", "data.batch_size=4", "data.eval_batch_size=4", "optimizer=adamw", "optimizer.lr=1e-4"),
    *("scheduler=constant", "scheduler.warmup=1", "trainer.max_steps=2", "trainer.val_check_interval=2"),
    *("trainer.log_every_n_steps=1", "trainer.num_sanity_val_steps=0", "extras.print_config=false"),
]
SORTING = ["data.tokenizer.vocab_size=16", "data.corpus.train=8", "data.corpus.held_out=4"]
DATA = {  # of a task that does not read text
    "distill": ["data=sorting", *SORTING, "init_from={start}"],
    "grpo": [
        *("data=sorting_prompts", *SORTING, "data.updates=2", "task.group_size=4", "task.max_new_tokens=4"),
        *("init_from={start}", "task/penalty=k3", "task.reference={start}", "task/correction=mask"),
        *("task/reward=regex_format", "task.reward.pattern='[0-4].*'"),  # about half of random answers: a spread
    ],
    "preference": ["data=sorting_preferences", *SORTING, "init_from={start}"],
    "reward": ["data=sorting_preferences", *SORTING, "init_from={start}"],
}
TEXT = [
    "data.sequence_length=32",
    "data.transforms.recall.every=16",
    "data.transforms.recall.length=3",
    "data=text",
    "data.corpus.files={corpus}",
    "data.eval_windows=4",
    "data/transforms=recall",
]
OTHER_CALLBACKS = {
    "none": "is no callback",
    "pruning": "compares a logged figure in a search, and computes nothing",
    "pictures": "needs a model with images; it measures by Task.objective, in the context of a validation",
}
CALLBACKS = sorted({file.stem for file in conf.files("callbacks")} - set(OTHER_CALLBACKS))
OF_TEXT = [
    "data.sequence_length=32",
    "data.transforms.recall.every=16",
    "data.transforms.recall.length=3",
    # callbacks that measure longer windows of a text, and what makes them quick
    f"callbacks=[{','.join(['default', *(c for c in CALLBACKS if c != 'default')])}]",
    *("callbacks.long_context.samples=2", "callbacks.qk_clip.threshold=0.5", "callbacks.extrapolation.multiples=[2]"),
]


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
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """A run of two steps, with its validation; once for each task and condition."""
    folder, done = tmp_path_factory.mktemp("half"), dict[tuple[str, str], Run]()
    corpus_file = folder / "corpus.txt"
    corpus_file.write_text("".join(f"To be, or not to be: line {i} of the corpus.\n" for i in range(300)))

    def fit(task: str, condition: str) -> Run:
        if (task, condition) not in done:
            done[task, condition] = _fit(task, condition, folder, corpus_file)
        return done[task, condition]

    _fit("causal_lm", "fp32", folder, corpus_file, start=True)
    return fit


def _fit(name: str, condition: str, folder: Path, corpus: Path, start: bool = False) -> Run:
    given = ["data=sorting", *SORTING] if start else DATA.get(name, [*TEXT, *OF_TEXT])
    words = [word.format(start=folder / "start.ckpt", corpus=corpus) for word in given]
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
        with _policies() as seen:
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
    found = {"figures": figures, "stored": stored, "policies": seen, "counts": begin.counts}
    found["undeclared"] = undeclared
    return {**found, "weights": weights, "folder": folder}


class _policies:  # noqa: N801 # a context
    """Records the log-probabilities of each policy update, and what they are compared with."""

    def __enter__(self) -> list[tuple[Tensor, Any]]:
        self.whole, seen = PolicyObjective.__call__, list[tuple[Tensor, Any]]()

        def watched(policy: PolicyObjective, logp: Tensor, given: Any) -> Any:
            seen.append((logp.detach().clone(), given))
            return self.whole(policy, logp, given)

        PolicyObjective.__call__ = watched  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_: object) -> None:
        PolicyObjective.__call__ = self.whole  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_default_dtype_changes_no_bit_of_a_run(task: str, run: Callable[[str, str], Run]) -> None:
    """Figures, weights, optimizer, sums, rollouts, and what callbacks store and measure."""
    plain, low = run(task, "fp32"), run(task, "default dtype")
    assert low["figures"] == plain["figures"] and not plain["undeclared"]
    assert [name for name in plain["figures"][0] if name.startswith("train/")] and plain["figures"][-1]
    for _, given in plain["policies"]:  # else nothing of a rollout would reach the weights
        assert given.advantage.any()
    for kept in plain["stored"].keys() - {"callbacks", "loops"}:  # which have times and paths
        one, other = (tree_leaves(each["stored"][kept]) for each in (plain, low))
        for a, b in zip(one, other, strict=True):
            same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b or kept == "hparams"
            assert same, kept
    guard = next((v for k, v in plain["stored"]["callbacks"].items() if "Guard" in k), None)
    assert guard == next((v for k, v in low["stored"]["callbacks"].items() if "Guard" in k), None)


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS[1:])
@pytest.mark.parametrize("task", TASKS)
def test_figures_are_those_of_the_same_rounded_weights(
    task: str, condition: str, run: Callable[[str, str], Run]
) -> None:
    """But for the rounding of products; sums are exact, and no sum or bias of a gate is ever cast."""
    plain, low = run(task, "fp32"), run(task, condition)
    parameters = [key for key in low["stored"]["state_dict"] if key in plain["weights"]]
    for name, value in low["stored"]["state_dict"].items():
        assert name in parameters or value.dtype == plain["stored"]["state_dict"][name].dtype, name
    first, low_first = plain["figures"][0], low["figures"][0]
    assert low_first.keys() == first.keys()
    if not low["policies"]:  # else two samplers, whose completions may differ
        assert low["counts"] == plain["counts"]
        for name, value in first.items():
            undecided = any(part in name for part in ROUNDING)
            assert undecided or low_first[name] == pytest.approx(value, 0.05, 0.05), name


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["fp32", *CONDITIONS])
def test_first_ratio_of_a_policy_is_1(condition: str, run: Callable[[str, str], Run]) -> None:
    """And what it is compared with are the numbers that were recorded, in fp32.

    So is the correction. It is 1 where products are fp32; in bf16 it weighs what the sampler's products of single
    tokens, with caches, differ by from those of packed rows.
    """
    found = run("grpo", condition)
    (logp, given), (after, _) = found["policies"]
    assert torch.equal((logp - given.old) * given.mask, torch.zeros_like(logp))
    assert not torch.equal(after, logp)
    for name in ("old", "sampler", "advantage", "reference"):
        assert getattr(given, name).dtype == torch.float32, name
    rounding = 1e-5 if condition in ("fp32", "default dtype") else 0.1
    assert ((given.old - given.sampler) * given.mask).abs().max() < rounding
    (rollout,) = found["stored"]["rollouts"][0].values()
    for name in ("old", "sampler"):
        recorded = {value for row in rollout[name] for value in row}
        assert set(getattr(given, name)[given.mask > 0].tolist()) <= recorded, name
    factors = ((given.old - given.sampler).double() * given.mask).sum(1, keepdim=True).exp()
    correction = float((factors * given.mask).sum() / given.mask.sum())
    assert found["figures"][0]["train/correction"] == pytest.approx(correction, 1e-6)
    assert correction == pytest.approx(1, abs=rounding)
    if condition != "bf16-mixed":  # there the reference and the policy may be scored beside other rows
        assert ((given.old - given.reference) * given.mask).abs().max() < rounding


def test_every_callback_runs_or_has_a_reason() -> None:
    assert OTHER_CALLBACKS.keys() <= {file.stem for file in conf.files("callbacks")}


# --- objectives -------------------------------------------------------------------------------------------------------

B, T, P, G, F = 3, 5, 2, 4, 2
NODES = {  # of rewards and losses that need settings
    "length": {"longest": 8, "buffer": 4},
    "levelled": {"reward": "arithmetic"},
    "regex_format": {"pattern": ".*1"},
    "shuffled": {"reward": "arithmetic"},
    "weighted": {"rewards": ["arithmetic", "exact_match"], "weights": [0.3, 0.7]},
}
WITHOUT_TENSORS = {"reasoning_gym", "unit_tests"}  # another package, or another process, judges a text
COLUMNS = {"answer": ["1", "257", "3"], "n_tokens": [3, 6, 9]}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * -8


def answers(seed: int) -> Answers:
    return Answers(drawn(B, seed=seed), torch.tensor([3.0, 7.0, 257.0], dtype=torch.float32), drawn(B, seed=seed + 1))


def lesson() -> Lesson:
    frame = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "max_positions": 64, "ffn": {"name": "swiglu", "d_ff": 24}}
    frame |= {"position": "rope", "norm": "rmsnorm", "residual": "prenorm"}
    models = [compose({**frame, "attention": name}, seed=0) for name in ("gqa", "mha")]
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    return Lesson(models[0], models[1].requires_grad_(False), tokens, tokens.roll(-1, 1))


LESSON = lesson()
MASK = torch.arange(T) < torch.tensor([5, 2, 4])[:, None]
OLD, LOGP = drawn(B, T, seed=1), drawn(B, T, seed=2)
ADVANTAGE = torch.tensor([-1.1, 0.3, 0.8])
CALLS: dict[str, Callable[[Any], Any]] = {
    "advantage": lambda f: f(-drawn(P, G, F), drawn(F)),
    "average": lambda f: (f.weights(MASK), f.weights(MASK.float()), f.count(MASK)),
    "correction": lambda f: f(LOGP, OLD, drawn(B, T, seed=3), ADVANTAGE, MASK.float()),
    "penalty": lambda f: f(LOGP, drawn(B, T, seed=4), OLD),
    "preference": lambda f: (f(answers(0), answers(5)), f.reward(answers(0))),
    "ratio": lambda f: f(LOGP, OLD, MASK.float()),
    "reward": lambda f: torch.tensor(f(["a", "b", "c"], ["1", "256", "2"], **COLUMNS), dtype=torch.float64),
    "surrogate": lambda f: tuple(f(LOGP, OLD, ADVANTAGE, MASK.float())),
    "teaching": lambda f: f(LESSON)[0].detach(),
}
KINDS = [
    family.kind
    for family in registry.families()
    if re.match(r"blockwright\.plugins\.alignment\.(?!rollouts)", family.contract.__module__)
]
OBJECTIVES = [
    pytest.param(kind, name, marks=pytest.mark.slow if name == "reward_model" else ())  # which needs a run
    for kind in KINDS
    for name in registry.names(kind)
    if name not in WITHOUT_TENSORS
]


@pytest.mark.parametrize(("kind", "name"), OBJECTIVES)
def test_objective_depends_on_neither_default_dtype_nor_autocast(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    """But for models of its own, which autocast lowers: a teacher."""
    more = NODES.get(name, {})
    if name == "reward_model":
        more = {"run": str(request.getfixturevalue("run")("reward", "fp32")["folder"] / "fp32.ckpt")}
    scope = Scope({"ratio": Node("sequence", "task.ratio")}, {"max_new_tokens": 257})
    objective = registry.build(kind, Node({"name": name, **more}, f"task.{kind}"), scope)
    plain = tree_leaves(CALLS[kind](objective))
    with default_dtype(torch.bfloat16):
        low = tree_leaves(CALLS[kind](objective))
    with torch.autocast("cpu", torch.bfloat16):
        within = tree_leaves(CALLS[kind](objective)) if kind not in ("teaching", "reward") else plain
    for one, *others in zip(plain, low, within, strict=True):
        assert all(torch.equal(one, other) and one.dtype == other.dtype for other in others)
